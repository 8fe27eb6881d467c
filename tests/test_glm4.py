"""GLM-4 in the format of transformers, from its data to its answers."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from common.arguments import DataArguments, PrefixArguments
from common.data.dataset import prepare_dataset
from common.encoding import conversation_of, encode_chat, encode_eval, encode_texts, encode_train, stop_ids
from common.errors import UserError
from common.loading import find_trained, load_model, load_tokenizer
from common.methods.prefix import PTuning, with_prefix
from common.tokenizers.base import Turn

GLM_SPECIALS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
# As in glm-4-9b-chat-hf: an empty message is left out.
GLM_TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['content'] %}"
    "<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As in GLM-4-9B-0414: metadata only where there is some, and an empty message stays.
GLM4_TEMPLATE = (
    "[gMASK]<sop>{%- for m in messages %}<|{{ m.role }}|>{{ (m.metadata or '') + '\n' + m.content }}{%- endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 256,
    "eos_token_id": [256, 260, 262],
}


@pytest.fixture(scope="module", params=["glm", "glm4", "edge"])
def glm_folder(request, tmp_path_factory) -> Path:
    """A random model with one token a byte, the special tokens after them."""
    folder = tmp_path_factory.mktemp(request.param)
    alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(GLM_SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="left"
    )
    fast.chat_template = GLM4_TEMPLATE if request.param == "glm4" else GLM_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    edge = {"tie_word_embeddings": True, "partial_rotary_factor": 1.0} if request.param == "edge" else {}
    glm4 = request.param == "glm4"
    model = Glm4ForCausalLM(Glm4Config(**SIZES)) if glm4 else GlmForCausalLM(GlmConfig(**SIZES, **edge))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def glm_tokenizer(glm_folder):
    return load_tokenizer(glm_folder)


def glm_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_labels_of_glm4_are_those_of_chatglm3(glm_tokenizer):
    """The role token of an answer is given, its text is learned, and so is the token after it."""
    chat = [
        Turn("system", "s"),
        Turn("user", "u"),
        Turn("assistant", "c", metadata="tool", loss=True),
        Turn("observation", "o"),
        Turn("assistant", "a", loss=True),
        Turn("user", "v"),
        Turn("assistant", "b"),
    ]
    row = encode_train(glm_tokenizer, [chat], 100, 100)[0]
    text = (
        "[gMASK]<sop><|system|>\ns<|user|>\nu<|assistant|>tool\nc<|observation|>\no<|assistant|>\na<|user|>\nv"
        "<|assistant|>\nb<|endoftext|>"
    )
    assert glm_tokenizer.decode(row.input_ids) == text
    learned = [token if label != -100 else -100 for token, label in zip(row.input_ids, row.labels, strict=True)]
    assert learned == row.labels
    runs = "".join(glm_tokenizer.decode([label]) if label != -100 else "·" for label in row.labels)
    assert (
        runs == "·" * 2 + "·" * 3 + "·" * 3 + "·tool\nc<|observation|>" + "·" * 2 + "·\na<|user|>" + "·" * 2 + "·" * 4
    )


def test_questions_of_glm4(glm_tokenizer):
    chat = conversation_of("v", "b", [["u", "a"]])
    row = encode_eval(glm_tokenizer, [chat], 100, 100)[0]
    assert glm_tokenizer.decode(row.prompt_ids) == "[gMASK]<sop><|user|>\nu<|assistant|>\na<|user|>\nv<|assistant|>"
    assert row.reference == "b"
    assert stop_ids(glm_tokenizer) == [256, 260, 262]


def test_a_chat_with_glm4_asks_the_assistant(glm_tokenizer):
    """Also where its template leaves out an empty message, as the answer still is."""
    ids = encode_chat(glm_tokenizer, "v", [["u", "a"]])
    assert glm_tokenizer.decode(ids) == "[gMASK]<sop><|user|>\nu<|assistant|>\na<|user|>\nv<|assistant|>"


def test_text_blocks_of_glm4(glm_tokenizer):
    rows = encode_texts(glm_tokenizer, ["abcdef"], 5)
    assert [glm_tokenizer.decode(row.input_ids) for row in rows] == [
        "[gMASK]<sop>abc",
        "[gMASK]<sop>def",
        "[gMASK]<sop><|endoftext|>",
    ]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def start(method: str, model: Path, output: Path, monkeypatch, *flags: str) -> None:
    """Runs its main.py in this process, on four equal rows."""
    data = output.parent / "chats.json"
    rows = [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "ab"}]}] * 4
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = str(ROOT / method / "main.py")
    argv = [program, "--model_name_or_path", str(model), "--output_dir", str(output), "--use_cpu"]
    argv += ["--conversation_column", "messages", "--max_source_length", "16", "--max_target_length", "16"]
    monkeypatch.setattr(sys, "argv", [*argv, "--train_file", str(data), "--test_file", str(data), *flags])
    runpy.run_path(program, run_name="__main__")


TWO_STEPS = ["--do_train", "--max_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2"]
PREDICTION = ["--do_predict", "--max_new_tokens", "4", "--report_to", "none"]


def test_the_loss_of_glm4_is_that_of_transformers(glm_folder):
    """With logits of labelled positions only; the class is named as transformers names it, so it is saved so."""
    ours = load_model(glm_folder)
    kind = {"glm": GlmForCausalLM, "glm4": Glm4ForCausalLM}[ours.config.model_type]
    theirs = kind.from_pretrained(glm_folder, dtype=torch.float32).eval()
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    output = ours(ids, labels=labels, loss_only=True, num_items_in_batch=7)
    expected = theirs(ids, labels=labels, num_items_in_batch=7)
    assert output.logits is None and type(ours) is not kind and type(ours).__name__ == kind.__name__
    torch.testing.assert_close(output.loss, expected.loss)
    torch.testing.assert_close(ours(ids).logits, expected.logits)


def test_glm4_learns_to_end_its_answer(glm_folder, tmp_path):
    """Its end token is its pad token too, and must stay a label."""
    tokenizer = load_tokenizer(glm_folder)
    (tmp_path / "rows.json").write_text('{"prompt": "a", "response": "b"}')
    [row] = prepare_dataset(DataArguments(), str(tmp_path / "rows.json"), tokenizer, "train").rows
    assert row["labels"][-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_lora_on_glm4_trains_and_answers(glm_folder, tmp_path, monkeypatch):
    start("lora", glm_folder, tmp_path / "out", monkeypatch, *TWO_STEPS, *PREDICTION, "--evaluate_base")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in adapter}
    assert modules == {"q_proj", "k_proj", "v_proj"}
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())  # B starts at zero
    answers = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    assert [json.loads(line)["labels"] for line in answers] == ["ab"] * 4


def test_full_training_on_glm4_moves_every_parameter(glm_folder, tmp_path, monkeypatch):
    start("full", glm_folder, tmp_path / "out", monkeypatch, *TWO_STEPS, *PREDICTION)
    before, after = weights_of(glm_folder), weights_of(tmp_path / "out")
    assert set(after) == set(before)
    assert [name for name in before if torch.equal(before[name].float(), after[name].float())] == []
    assert len((tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()) == 4
    assert load_model(tmp_path / "out").config.model_type in ("glm", "glm4")
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(glm_folder).chat_template


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer.json", "<html>", "tokenizer.json is an HTML page, not the vocabulary"),
        ("tokenizer.json", '{"version": "1.0", "model": {', "tokenizer.json can't be read: copy or download it again"),
        (
            "config.json",
            '{"model_type": "glm", "num_hidden_layers": "two"}',
            "num_hidden_layers is 'two', not a number",
        ),
    ],
)
def test_broken_files_of_glm4_are_named(file, content, says, glm_folder, tmp_path):
    broken = shutil.copytree(glm_folder, tmp_path / "glm")
    (broken / file).write_text(content)
    with pytest.raises(UserError, match=says):
        load_tokenizer(broken)


def test_shards_of_glm4_without_their_index_are_read(glm_folder, tmp_path):
    folder = shutil.copytree(glm_folder, tmp_path / "glm")
    weights = weights_of(folder)
    (folder / "model.safetensors").unlink()
    for number in (1, 2):
        shard = {name: weights[name] for name in list(weights)[number - 1 :: 2]}
        save_file(shard, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    expected = load_model(glm_folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(folder).state_dict().items())


# P-Tuning v2


@torch.no_grad()
def test_a_prefix_is_what_a_cache_of_transformers_holds(glm_folder):
    """Logits of padded rows, and greedy answers with a cache and without one."""
    torch.manual_seed(0)
    ours = load_model(glm_folder, pre_seq_len=5)
    theirs = {"glm": GlmForCausalLM, "glm4": Glm4ForCausalLM}[ours.config.model_type].from_pretrained(
        glm_folder, dtype=torch.float32
    )
    ids = torch.randint(256, (3, 12))
    mask = (torch.arange(12) >= torch.tensor([[0], [4], [7]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    for layer, states in enumerate(ours.model.prefix_encoder(3)):
        cache.update(*states, layer)
    seen = torch.cat((torch.ones(3, 5, dtype=torch.long), mask), dim=1)
    expected = theirs(ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits
    found = ours(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    assert (found - load_model(glm_folder)(ids, attention_mask=mask, position_ids=positions).logits).abs().max() > 1e-3
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    answers = [ours.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False)]
    assert torch.equal(*answers)
    made = []
    ours.model.prefix_encoder.register_forward_hook(lambda *_: made.append(1))
    with with_prefix(ours, None):
        base = ours.generate(ids, **settings)
    assert torch.equal(ours.generate(ids, **settings), answers[0]) and not torch.equal(base, answers[0])
    assert len(made) == 1  # not for every token


def test_gradients_of_a_prefix_are_those_without_checkpointing_and_of_the_loss(glm_folder):
    torch.manual_seed(0)
    model, ids, gradients = load_model(glm_folder, pre_seq_len=5).train(), torch.randint(256, (3, 12)), []
    model.model.prefix_encoder.dropout.p = 0.0
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids, loss_only=True).loss.backward()
        gradients.append(model.model.prefix_encoder.embedding.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
    weight, step = model.model.prefix_encoder.embedding.weight.data, 1e-2 * gradients[0] / gradients[0].norm()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss for change in (step, -2 * step) if weight.add_(change) is weight]
    assert (losses[0] - losses[1]).item() == pytest.approx(2e-2 * gradients[0].norm().item(), rel=0.02)


def test_p_tuning_on_glm4_trains_and_answers_beside_its_base(glm_folder, tmp_path, monkeypatch):
    flags = ["--pre_seq_len", "4", "--evaluate_base", "--do_eval", "--validation_file", str(tmp_path / "chats.json")]
    start("ptuning", glm_folder, tmp_path / "out", monkeypatch, *TWO_STEPS, *PREDICTION, *flags)
    losses = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert losses["eval_loss"] < losses["eval_base_loss"]
    stored = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert list(stored) == ["transformer.prefix_encoder.embedding.weight"]
    assert find_trained(str(tmp_path / "out")) == (str(glm_folder), {"ptuning_checkpoint": str(tmp_path / "out")})
    tuned = load_model(glm_folder, ptuning_checkpoint=tmp_path / "out")
    base = load_model(glm_folder)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-3
        with PTuning(PrefixArguments()).base(tuned) as plain:
            torch.testing.assert_close(plain(ids).logits, base(ids).logits, rtol=0, atol=1e-5)
    assert all(torch.equal(tensor, tuned.state_dict()[name]) for name, tensor in base.state_dict().items())
    other = load_model(glm_folder, pre_seq_len=4)
    with pytest.raises(UserError, match="holds no prefix"):
        load_model(glm_folder, ptuning_checkpoint=glm_folder)
    PTuning(PrefixArguments()).restore(other, tmp_path / "out")
    assert torch.equal(other.model.prefix_encoder.embedding.weight, tuned.model.prefix_encoder.embedding.weight)
