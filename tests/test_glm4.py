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
from transformers import Glm4Config, Glm4ForCausalLM, GlmConfig, GlmForCausalLM, PreTrainedTokenizerFast

from common.arguments import DataArguments
from common.data.dataset import prepare_dataset
from common.encoding import conversation_of, encode_chat, encode_eval, encode_texts, encode_train, stop_ids
from common.errors import UserError
from common.loading import load_model, load_tokenizer
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


@pytest.fixture(scope="module", params=["glm", "glm4"])
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
    fast.chat_template = GLM_TEMPLATE if request.param == "glm" else GLM4_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = GlmForCausalLM(GlmConfig(**SIZES)) if request.param == "glm" else Glm4ForCausalLM(Glm4Config(**SIZES))
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


def test_p_tuning_on_glm4_is_refused(glm_folder):
    with pytest.raises(UserError, match="P-Tuning v2 is for models in their first format; .* is a GLM-4 in that of"):
        load_model(glm_folder, pre_seq_len=4)
