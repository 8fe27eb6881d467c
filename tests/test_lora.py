"""LoRA: what trains, what stays, what is saved, loaded, merged and refused, on small random models."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from shell import ROOT, run_program
from test_caches import full_disk
from torch import Tensor
from transformers import PreTrainedModel

from common.arguments import LoraArguments
from common.errors import UserError
from common.finetune import run
from common.flags import parse_arguments
from common.loading import find_trained, load_model, load_tokenizer
from common.methods.lora import OLD_KEYS, Lora, attach_lora, load_adapter
from common.models import chatglm, chatglm2
from common.models.registry import open_model

METHOD = Lora(LoraArguments())

KINDS = ("chatglm", "chatglm2")
ATTENTION = {
    "chatglm": "transformer.layers.{}.attention.query_key_value",
    "chatglm2": "transformer.encoder.layers.{}.self_attention.query_key_value",
}
LINEAR = ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
INPUT_IDS = torch.tensor([[5, 6, 7, 61, 62, 9, 10, 63], [8, 5, 61, 62, 11, 12, 13, 63]])
LABELS = INPUT_IDS.masked_fill(torch.arange(8) < 4, -100)


def make_model(kind: str, **config) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4} | config
    if kind == "chatglm2":
        sizes = {"padded_vocab_size": 64, "kv_channels": 8, "ffn_hidden_size": 48, "seq_length": 64} | sizes
        return chatglm2.ChatGLMForConditionalGeneration(chatglm2.ChatGLMConfig(**sizes)).eval()
    special = {"mask_token_id": 60, "gmask_token_id": 61, "bos_token_id": 62, "eos_token_id": 63}
    sizes = {"vocab_size": 64, "inner_hidden_size": 64} | special | sizes
    return chatglm.ChatGLMForConditionalGeneration(chatglm.ChatGLMConfig(**sizes)).eval()


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def base(kind) -> PreTrainedModel:
    return make_model(kind)


def attach(model: PreTrainedModel, **flags) -> PeftModel:
    return attach_lora(model, LoraArguments(**{"lora_dropout": 0.0} | flags))


def trained(model: PreTrainedModel, **flags) -> PeftModel:
    """With an adapter that changes something: B, which starts at zero, is random."""
    adapted = attach(model, **flags)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def trainable(model: PeftModel) -> dict[str, Tensor]:
    """By the names that they have in the base, followed by lora_A, lora_B …"""
    prefix = "base_model.model."
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(name.startswith(prefix) for name in parameters)
    return {name.removeprefix(prefix): parameter for name, parameter in parameters.items()}


def targets_of(model: PeftModel) -> list[str]:
    return sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in trainable(model)})


@torch.no_grad()
def logits_of(model: PreTrainedModel | PeftModel) -> Tensor:
    return model(input_ids=INPUT_IDS).logits


# What trains


def test_only_the_two_matrices_of_every_attention_train(base, kind):
    model = attach(base, lora_rank=4)
    expected = {
        f"{ATTENTION[kind].format(layer)}.lora_{matrix}.default.weight" for layer in range(2) for matrix in "AB"
    }
    assert set(trainable(model)) == expected
    assert {min(parameter.shape) for parameter in trainable(model).values()} == {4}


def test_the_adapter_is_float32_on_a_16_bit_base(base):
    model = attach(base.bfloat16())
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert base.get_input_embeddings().weight.dtype == torch.bfloat16
    model(input_ids=INPUT_IDS, labels=LABELS).loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in trainable(model).values())


def test_the_base_stays_bit_for_bit_while_the_adapter_learns(base):
    """With an optimizer that was given everything, and weight decay."""
    model = attach(base).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2, weight_decay=0.1)
    losses = []
    for _ in range(20):
        loss = model(input_ids=INPUT_IDS, labels=LABELS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_matrix(base, checkpointing):
    """Also with activation checkpointing, whose first layer gets nothing that needs a gradient."""
    model = trained(base).train()
    model(input_ids=INPUT_IDS, labels=LABELS).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable()
    model(input_ids=INPUT_IDS, labels=LABELS).loss.backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("dense,dense_h_to_4h,dense_4h_to_h", LINEAR[:3]),
        ("query_key_value, dense", ["dense", "query_key_value"]),
        ("all-linear", LINEAR),
    ],
)
def test_other_targets(base, target, names):
    """The output layer is none of all-linear."""
    model = attach(base, lora_target=target)
    assert targets_of(model) == names
    assert len(trainable(model)) == 2 * 2 * len(names)


def test_an_unknown_target_is_refused_with_those_that_exist(base):
    with pytest.raises(
        UserError, match="has no linear layer q_proj; there are dense, dense_4h_to_h, .*, or all-linear"
    ):
        attach(base, lora_target="query_key_value,q_proj")


def test_a_new_adapter_changes_nothing(base):
    before = logits_of(base)
    assert torch.equal(logits_of(attach(base)), before)


def effect_of(adapted: PeftModel) -> Tensor:
    """What the adapter adds to the first attention's weight."""
    layer = next(module for name, module in adapted.named_modules() if name.endswith("query_key_value"))
    return layer.get_delta_weight("default")


@pytest.mark.parametrize(("flags", "scale"), [({}, 32 / 16), ({"use_rslora": True}, 32 / 4)])
def test_the_adapter_is_scaled_by_alpha_over_the_rank_or_its_root(base, flags, scale):
    adapted = trained(base, lora_rank=16, lora_alpha=32, **flags)
    first, second = (next(p for n, p in trainable(adapted).items() if f"lora_{matrix}" in n) for matrix in "AB")
    torch.testing.assert_close(effect_of(adapted), scale * (second @ first))


def test_dora_learns_a_magnitude_for_every_output(base, kind):
    model = attach(base, use_dora=True)
    magnitudes = {n: p for n, p in trainable(model).items() if "lora_magnitude_vector" in n}
    assert len(magnitudes) == 2
    assert len(trainable(model)) == 6
    weight = base.get_submodule(ATTENTION[kind].format(0)).base_layer.weight
    found = next(p for n, p in magnitudes.items() if ATTENTION[kind].format(0) in n)
    torch.testing.assert_close(found.detach(), weight.norm(dim=1))


def test_lora_plus_learns_the_b_matrices_faster(base):
    method = Lora(LoraArguments(loraplus_lr_ratio=16.0))
    args = parse_arguments(LoraArguments, ["--learning_rate", "1e-3", "--use_cpu", "--weight_decay", "0.1"])[3]
    model = method.attach(base)
    rates = {
        parameter: group["lr"] for group in method.optimizer(model, args).param_groups for parameter in group["params"]
    }
    assert {rates[p] for n, p in trainable(model).items() if "lora_A" in n} == {1e-3}
    assert {rates[p] for n, p in trainable(model).items() if "lora_B" in n} == {1.6e-2}
    assert METHOD.optimizer(model, args) is None


# Adapter folders


@pytest.mark.parametrize("flags", [{}, {"lora_target": "all-linear"}, {"use_dora": True}, {"use_rslora": True}])
def test_save_and_load(base, kind, flags, tmp_path):
    """Into the standard form of PEFT, and back with equal logits; it may be trained further."""
    adapted = trained(base, **flags)
    METHOD.save(adapted, tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {file.name for file in tmp_path.iterdir()}
    assert not json.loads((tmp_path / "adapter_config.json").read_text()).keys() - OLD_KEYS  # PEFT 0.10 reads it
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert f"base_model.model.{ATTENTION[kind].format(0)}.lora_A.weight" in names
    loaded = load_adapter(make_model(kind), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(adapted))
    assert set(trainable(loaded)) == set(trainable(adapted))


def test_restoring_reads_into_the_same_model(base, tmp_path):
    adapted = trained(base)
    METHOD.save(adapted, tmp_path)
    expected = logits_of(adapted)
    for parameter in trainable(adapted).values():
        torch.nn.init.normal_(parameter)
    METHOD.restore(adapted, tmp_path)
    assert torch.equal(logits_of(adapted), expected)


def test_without_the_adapter_is_the_base_model(base):
    before = logits_of(base)
    adapted = trained(base)
    tuned = logits_of(adapted)
    with pytest.raises(KeyError), METHOD.base(adapted) as plain:
        assert torch.equal(logits_of(plain), before)
        raise KeyError  # the adapter also comes back after an error
    assert torch.equal(logits_of(adapted), tuned)
    assert (tuned - before).abs().max() > 1e-3


def test_several_adapters_take_turns_over_one_base(base, kind, tmp_path):
    """One trained otherwise beside the first, which is active again afterwards, also after an error."""
    first, other = trained(base), trained(make_model(kind), lora_rank=4, use_dora=True, lora_target="all-linear")
    METHOD.save(other, tmp_path / "1.5")
    expected = logits_of(first), logits_of(other)
    with METHOD.base(first) as plain:
        untrained = logits_of(plain)
    choose = METHOD.more(first, tmp_path / "1.5")
    assert torch.equal(logits_of(first), expected[0])
    with pytest.raises(KeyError), choose() as model:
        torch.testing.assert_close(logits_of(model), expected[1], rtol=0, atol=1e-5)
        raise KeyError
    assert torch.equal(logits_of(first), expected[0])
    with METHOD.base(first) as plain:
        assert torch.equal(logits_of(plain), untrained)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": 64}, "belongs to a model of another size: size mismatch for .*query_key_value"),
        ({"num_layers": 3}, "belongs to another model: .*layers.2.*query_key_value.* does not fit"),
        ({"num_layers": 1}, "belongs to another model: .*layers.1.*query_key_value.* does not fit"),
    ],
)
def test_an_adapter_of_another_size_is_refused(base, kind, config, says, tmp_path):
    METHOD.save(trained(base), tmp_path)
    with pytest.raises(UserError, match=says) as error:
        load_adapter(make_model(kind, **config), tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_adapter_of_another_generation_is_refused(base, kind, tmp_path):
    """Though the layers that it changes have the same name in both."""
    METHOD.save(trained(base), tmp_path)
    with pytest.raises(UserError, match="belongs to another model: .*query_key_value.* does not fit"):
        load_adapter(make_model(KINDS[kind == "chatglm"]), tmp_path)


def test_an_adapter_of_foreign_layers_is_refused(base, tmp_path):
    METHOD.save(trained(base), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj"]}))
    with pytest.raises(UserError, match="belongs to another model: it changes q_proj, v_proj, and this one has dense"):
        load_adapter(make_model("chatglm2"), tmp_path)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("no folder", "holds no LoRA adapter"),
        ("no config", "holds no LoRA adapter: adapter_config.json is missing or broken"),
        ("broken config", "holds no LoRA adapter: adapter_config.json is missing or broken"),
        ("another kind", "holds an adapter of the kind IA3, not LORA"),
        ("no weights", "holds no adapter weights"),
        ("cut weights", "adapter_model.safetensors is truncated"),
        ("pointer", "adapter_model.safetensors is a Git LFS pointer, not the weights: run git lfs pull, or copy it"),
    ],
)
def test_a_folder_without_a_whole_adapter_is_refused(damage, says, tmp_path):
    folder = tmp_path / "adapter"
    METHOD.save(trained(make_model("chatglm2")), folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if damage == "no folder":
        shutil.rmtree(folder)
    elif damage == "no config":
        config.unlink()
    elif damage == "broken config":
        config.write_text("{")
    elif damage == "another kind":
        config.write_text(json.dumps({"peft_type": "IA3"}))
    elif damage == "no weights":
        weights.unlink()
    elif damage == "pointer":
        weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=says):
        load_adapter(make_model("chatglm2"), folder)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora_rank": 16}, "was trained with --lora_rank 4, not 16: leave it out"),
        ({"lora_alpha": 64}, "was trained with --lora_alpha 32, not 64"),
        ({"lora_dropout": 0.5}, "was trained with --lora_dropout 0.1, not 0.5"),
        ({"lora_target": "dense, query_key_value"}, "with --lora_target query_key_value, not dense,query_key_value"),
        ({"lora_target": "all-linear"}, "with --lora_target query_key_value, not dense,dense_4h_to_h,dense_h_to_4h"),
        ({"use_dora": True}, "was trained with --use_dora False, not True"),
        ({"use_rslora": True}, "was trained with --use_rslora False, not True"),
        ({"lora_rank": 4, "lora_target": "query_key_value"}, ""),
        ({"lora_rank": 8}, ""),  # the default, which train.sh always gives
    ],
)
def test_flags_that_contradict_a_trained_adapter_are_refused(flags, says, demo_adapter):
    """Also of a LoRA that changes other layers; what equals the adapter, or the default, contradicts nothing."""
    demo, method = open_model("demo3"), Lora(LoraArguments(str(demo_adapter), **flags))
    if not says:
        method.check(demo, do_train=True)
        return
    with pytest.raises(UserError, match=says):
        method.check(demo, do_train=True)


@pytest.fixture
def demo_adapter(tmp_path) -> Path:
    METHOD.save(attach_lora(load_model("demo3"), LoraArguments(lora_rank=4)), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite_adapter(folder: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """Changes entries of adapter_config.json, and adds tensors."""
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(content | config))
    stored = load_file(folder / "adapter_model.safetensors")
    save_file(stored | weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


EMBEDDING = "base_model.model.transformer.embedding.word_embeddings"


@pytest.mark.parametrize(
    ("config", "weights", "says"),
    [
        (
            {"target_modules": "query_key_value"},
            {},
            r'text .query_key_value., .* write a list, as \["query_key_value"\]',
        ),
        ({"target_modules": "("}, {}, "a pattern of whole names, and no layer's name fits"),
        ({"target_modules": None}, {}, "target_modules is None: it must list names of layers"),
        ({"target_modules": []}, {}, "PEFT can't use it: No `target_modules` passed"),
        ({"target_modules": ["query_key_value", "word_embeddings"]}, {}, r"trains embeddings \(word_embeddings\)"),
        ({}, {f"{EMBEDDING}.lora_embedding_A": torch.ones(4, 9)}, "also trains embeddings .*, which is not supported"),
        ({"modules_to_save": ["output_layer"]}, {}, "modules_to_save names output_layer, and the adapter holds no"),
        ({"modules_to_save": "output_layer"}, {}, "modules_to_save is 'output_layer': it must list names of layers"),
        ({"r": "4"}, {}, "r is '4', not a number of at least 1"),
        ({"r": 2.5}, {}, "r is 2.5, not a number"),
        ({"lora_alpha": None}, {}, "lora_alpha is None, not a number"),
        ({"lora_dropout": "much"}, {}, "PEFT can't use it"),
        ({"layers_to_transform": [99]}, {}, "PEFT can't use it: Target modules"),
        ({"r": 8}, {}, "belongs to a model of another size"),
    ],
)
def test_an_adapter_that_can_not_be_used_is_refused_before_its_base_is_loaded(
    config, weights, says, demo_adapter, monkeypatch
):
    rewrite_adapter(demo_adapter, config, weights)
    monkeypatch.setattr("common.loading.load_base", None)
    with pytest.raises(UserError, match=says) as error:
        load_model("demo3", adapter=demo_adapter)
    assert str(demo_adapter) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({"target_modules": r".*\.query_key_value"}, {}),
        ({"init_lora_weights": "pissa"}, {}),
        (
            {"modules_to_save": ["output_layer"]},
            {"base_model.model.transformer.output_layer.weight": torch.zeros(3584, 192)},
        ),
    ],
)
def test_an_adapter_of_another_program_is_read(config, weights, demo_adapter):
    rewrite_adapter(demo_adapter, config, weights)
    assert isinstance(load_model("demo3", adapter=demo_adapter), PeftModel)


# Merging


@pytest.fixture
def checkpoint(kind, demo_folder, small_vocabulary, tmp_path) -> Path:
    """A base in the original format: the demo, or a small random ChatGLM2."""
    folder = tmp_path / f"{kind}-6b"
    if kind == "chatglm":
        shutil.copytree(demo_folder, folder)
        return folder
    model = make_model(kind, padded_vocab_size=416, seq_length=128)
    model.config.save_pretrained(folder)
    torch.save(model.original_state_dict(), folder / "pytorch_model.bin")
    shutil.copy(small_vocabulary, folder / "tokenizer.model")
    return folder


@pytest.fixture
def adapter(checkpoint, tmp_path) -> Path:
    METHOD.save(trained(load_model(checkpoint)), tmp_path / "adapter")
    return tmp_path / "adapter"


def merge(*flags: object) -> int:
    return run_program([str(ROOT / "common" / "merge.py"), *map(str, flags)])


def stored(folder: Path) -> dict[str, Tensor]:
    weights = {}
    for file in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
        weights |= load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return weights


def test_a_merged_checkpoint_answers_as_the_adapter_does(checkpoint, adapter, tmp_path, capsys):
    """It has the keys of the original format, and needs nothing besides."""
    merged = tmp_path / "merged"
    flags = ("--lora_checkpoint", adapter, "--output_dir", merged, "--dtype", "float32")
    assert merge(*flags) == 0
    assert f"merged {adapter} into {checkpoint}" in capsys.readouterr().out
    assert {*stored(merged), "lm_head.weight"} == {*stored(checkpoint), "lm_head.weight"}
    expected, plain = load_model(checkpoint, adapter=adapter), load_model(checkpoint)
    found = load_model(merged)
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-4, rtol=0)
    assert (logits_of(found) - logits_of(plain)).abs().max() > 1e-2
    text = "你好，今天天气怎么样？"
    assert load_tokenizer(merged).encode(text) == load_tokenizer(checkpoint).encode(text)
    assert merge(*flags) == 2  # a second time
    assert "is not empty" in capsys.readouterr().err


def test_a_merge_that_fails_leaves_nothing_and_what_a_kill_left_is_cleared(checkpoint, adapter, tmp_path, monkeypatch):
    flags, partial = ("--lora_checkpoint", adapter, "--output_dir", tmp_path / "merged"), tmp_path / "merged.partial"
    partial.mkdir()
    (partial / "model-00002-of-00002.safetensors").write_bytes(b"of a merge that was killed")
    with full_disk(20_000):
        assert merge(*flags) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert merge(*flags) == 3
    assert not partial.exists() and not (tmp_path / "merged").exists()
    monkeypatch.undo()
    assert merge(*flags) == 0
    assert not list((tmp_path / "merged").glob("*-of-*"))


def test_merged_weights_are_half_precision_as_the_original(checkpoint, adapter, tmp_path):
    assert merge("--lora_checkpoint", adapter, "--output_dir", tmp_path / "merged") == 0
    dtypes = {name: tensor.dtype for name, tensor in stored(checkpoint).items()}
    assert {name: tensor.dtype for name, tensor in stored(tmp_path / "merged").items() if name in dtypes} == (
        {name: dtype for name, dtype in dtypes.items() if name in stored(tmp_path / "merged")}
    )
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"


def test_nothing_is_merged_into_a_quantized_base(adapter, checkpoint, tmp_path, capsys):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_bit": 4}))
    assert merge("--lora_checkpoint", adapter, "--output_dir", tmp_path / "merged") == 2
    assert "holds quantized weights, into which nothing can be added" in capsys.readouterr().err
    assert not (tmp_path / "merged" / "config.json").exists()


def test_a_base_that_moved_is_named_and_can_be_given(adapter, checkpoint, tmp_path, capsys):
    assert find_trained(str(adapter)) == (str(checkpoint), {"adapter": str(adapter)})
    moved = checkpoint.rename(tmp_path / f"moved-{checkpoint.name}")
    flags = ("--lora_checkpoint", adapter, "--output_dir", tmp_path / "merged")
    assert merge(*flags) == 2
    error = capsys.readouterr().err
    assert f"{adapter} was trained on {checkpoint}, which does not exist any more: set MODEL (--model_name" in error
    assert find_trained(str(adapter), str(moved))[0] == str(moved)
    assert merge(*flags, "--model_name_or_path", moved) == 0


def test_an_adapter_of_a_demo_finds_it_anywhere(tmp_path):
    METHOD.save(trained(load_model("demo")), tmp_path)
    assert find_trained(str(tmp_path))[0] == "demo"


# The whole job

TRAINING = f"""--do_train --train_file {ROOT}/AdvertiseGen/train.json --model_name_or_path demo --use_cpu
--prompt_column content --response_column summary --max_source_length 64 --max_target_length 64 --lora_dropout 0.1
--per_device_train_batch_size 2 --max_train_samples 16 --learning_rate 1e-2 --save_steps 2 --report_to none"""


def finetune(flags: str, output_dir: Path) -> None:
    model_args, lora_args, *others = parse_arguments(LoraArguments, [*flags.split(), "--output_dir", str(output_dir)])
    run(Lora(lora_args), model_args, *others)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def strong_adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strong")
    METHOD.save(trained(load_model("demo"), lora_alpha=200), folder)
    return folder


def test_predictions_of_an_adapter_stand_beside_those_of_its_base(strong_adapter, tmp_path):
    flags = f"--do_predict --test_file {ROOT}/AdvertiseGen/dev.json --max_predict_samples 4 --max_new_tokens 8"
    flags = f"{TRAINING.replace('--do_train', '')} {flags} --per_device_eval_batch_size 4"
    finetune(f"{flags} --lora_checkpoint {strong_adapter} --lora_alpha 200 --evaluate_base", tmp_path)
    finetune(flags, tmp_path / "new")  # an adapter that was not trained changes nothing
    base = (tmp_path / "base_predictions.txt").read_text()
    assert base == (tmp_path / "new" / "generated_predictions.txt").read_text()
    assert base != (tmp_path / "generated_predictions.txt").read_text()


def test_an_adapter_is_trained_further(strong_adapter, tmp_path):
    finetune(f"{TRAINING} --max_steps 1 --learning_rate 1e-4 --lora_checkpoint {strong_adapter}", tmp_path)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (strong_adapter, tmp_path))
    assert set(after) == set(before)
    for name, tensor in before.items():
        assert 0 < (after[name] - tensor).abs().max() < 1e-3, name


@pytest.fixture(scope="module", params=["", "--loraplus_lr_ratio 16"])
def whole_run(request, tmp_path_factory) -> tuple[str, Path]:
    """(flags, folder) of a training of four steps with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("whole")
    finetune(f"{TRAINING} --logging_steps 1 --max_steps 4 {request.param}", folder)
    return request.param, folder


def test_a_continued_training_equals_an_uninterrupted_one(whole_run, tmp_path):
    flags, whole = whole_run
    shutil.copytree(whole / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(whole / "run_settings.json", tmp_path)
    finetune(f"{TRAINING} --logging_steps 1 --max_steps 4 {flags}", tmp_path)
    assert losses(tmp_path) == losses(whole)
    assert len(losses(whole)) == 4
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    before = load_file(whole / "checkpoint-2" / "adapter_model.safetensors")
    assert not any(torch.equal(before[name], tensor) for name, tensor in expected.items())


def test_other_lora_settings_are_not_continued(whole_run):
    flags, folder = whole_run
    with pytest.raises(UserError, match="lora_rank was 8, now 4"):
        finetune(f"{TRAINING} --max_steps 4 {flags} --lora_rank 4", folder)


def test_a_layer_that_does_not_exist_is_said_before_the_model_is_loaded(tmp_path):
    with pytest.raises(UserError, match="--lora_target: the model has no linear layer q_proj"):
        finetune(f"{TRAINING} --dry_run --lora_target q_proj", tmp_path)
