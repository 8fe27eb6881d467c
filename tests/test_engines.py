"""Two processes under every engine train what one process trains, save it whole, and go on from their checkpoints."""

import json
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from deepspeed.ops.op_builder.builder import OpBuilder, installed_cuda_version
from deepspeed.ops.op_builder.fused_adam import FusedAdamBuilder
from engine_runs import STEPS, command_of, interrupt, reload_difference, train, train_here
from safetensors.torch import load_file
from shell import run_here

from common import finetune
from common.arguments import FullArguments, TrainingArguments
from common.errors import UserError
from common.flags import parse_arguments
from common.launch.engines import guard_compilation, start_engine
from common.loading import load_model
from common.methods.full import Full
from common.models.registry import SPECS, ModelFolder, open_model
from common.models.weights import load_base

# The deepspeed.json of the official ChatGLM-6B repository: its settings, without those that we would say ourselves.
OFFICIAL = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2},
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": 5e8,
        "contiguous_gradients": True,
    },
}


# Answers of five rows in batches of two: one process of two has nothing left to do in the last round.
ANSWER = ["--do_predict", "--evaluate_base", "--test_file", str(ROOT / "AdvertiseGen" / "dev.json")]
ANSWER += ["--max_predict_samples", "5", "--per_device_eval_batch_size", "2", "--max_new_tokens", "8"]
FURTHER = {"full": [], "lora": ANSWER, "ptuning": []}


@pytest.fixture(scope="session")
def one_process(tmp_path_factory):
    """method -> (the losses, the folder) of a training in one process, without any engine."""
    done: dict[str, tuple[list[float], Path]] = {}

    def expected(method: str) -> tuple[list[float], Path]:
        if method not in done:
            folder = tmp_path_factory.mktemp(method) / "out"
            done[method] = train_here(method, folder, *FURTHER[method]), folder
        return done[method]

    return expected


def assert_same_weights(folder: Path, expected: Path) -> None:
    """Adam moves every weight by about the learning rate, whatever its gradient: noise there shows in few of them."""
    name = next(file.name for file in expected.iterdir() if file.name.endswith("model.safetensors"))
    ours, theirs = load_file(folder / name), load_file(expected / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert tensor.shape == ours[key].shape
        assert (ours[key] - tensor).abs().mean() < 1e-4, key


def sampled(folder: Path) -> list[tuple[int, list[str]]]:
    """The answers while the model was trained, by their steps; there are some where there are questions."""
    found = json.loads((folder / "run.json").read_text())["samples"]["answers"]
    return [(answers["step"], answers["answers"]) for answers in found]


@pytest.mark.parametrize(("engine", "method"), [("ZeRO-3", "full"), ("FSDP2", "full"), ("FSDP2", "lora")])
def test_two_processes_equal_one(engine, method, one_process, tmp_path):
    """Also after an interruption: the second half is trained again from the checkpoint in the middle.

    bench/engines.py compares every engine with every method; DDP is what test_machines.py compares.
    """
    expected, folder = one_process(method)
    output = tmp_path / "out"
    assert train(method, engine, output, *FURTHER[method]) == pytest.approx(expected, abs=1e-4)
    assert_same_weights(output, folder)
    for answers in folder.glob("*predictions.txt"):
        assert (output / answers.name).read_text() == answers.read_text()
    assert sampled(output) == sampled(folder)
    assert reload_difference(method, output) < 1e-5
    interrupt(output)
    assert train(method, engine, output) == pytest.approx(expected, abs=1e-4)
    assert_same_weights(output, folder)


def test_the_official_deepspeed_file_runs_unchanged(one_process, tmp_path):
    """ZeRO stage 2, with a whole checkpoint in the format that the original code reads; later in another number."""
    expected, _ = one_process("full")
    (tmp_path / "deepspeed.json").write_text(json.dumps(OFFICIAL))
    flags = ["--deepspeed", str(tmp_path / "deepspeed.json"), "--save_format", "bin", "--save_total_limit", "1"]
    output = tmp_path / "out"
    assert train("full", "DDP", output, *flags) == pytest.approx(expected, abs=1e-4)
    saved = torch.load(output / "pytorch_model.bin", weights_only=True)
    assert "transformer.layers.0.attention.rotary_emb.inv_freq" in saved  # which the original code asks for
    assert not list(output.rglob("model*.safetensors"))
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    live = load_model(output)
    assert all(
        torch.equal(weight, saved[name]) for name, weight in live.state_dict().items() if name != "lm_head.weight"
    )

    command = command_of("full", "DDP", output, *flags, "--max_steps", "6", "--dry_run", processes=1)
    model_args, full_args, *others = parse_arguments(FullArguments, command[1:])
    with pytest.raises(UserError, match="was written by 2 processes.* over 1"):
        finetune.run(Full(full_args), model_args, *others)


def test_a_prefix_under_zero_1(one_process, tmp_path):
    expected, folder = one_process("ptuning")
    output = tmp_path / "out"
    assert train("ptuning", "ZeRO-1", output) == pytest.approx(expected, abs=1e-4)
    ours, theirs = (torch.load(path / "pytorch_model.bin", weights_only=True) for path in (output, folder))
    key = "transformer.prefix_encoder.embedding.weight"
    assert list(ours) == list(theirs) == [key]
    assert (ours[key] - theirs[key]).abs().mean() < 1e-4


def test_the_file_of_deepspeed_may_name_the_optimizer(one_process, tmp_path):
    """As those of its documentation and of transformers do."""
    expected, _ = one_process("full")
    params = OFFICIAL_ZERO_3["optimizer"]["params"] | {"torch_adam": True}  # DeepSpeed's own takes minutes to compile
    config = {"optimizer": {"type": "AdamW", "params": params}, "zero_optimization": {"stage": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    found = train("full", "DDP", tmp_path / "out", "--deepspeed", str(tmp_path / "ds.json"))
    assert found == pytest.approx(expected, abs=1e-3)


def parse(*flags: str, **variables: str) -> TrainingArguments:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        return parse_arguments(FullArguments, ["--do_train", "--dry_run", *flags])[-1]


# The ds_zero_3.json of the official ChatGLM3 repository.
OFFICIAL_ZERO_3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 5e8,
        "reduce_scatter": True,
        "contiguous_gradients": True,
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def test_the_official_zero_3_file_is_predicted_unchanged(tmp_path, capsys):
    """The bucket of its "auto" is what transformers puts there: the square of the hidden size."""
    (tmp_path / "ds_zero_3.json").write_text(json.dumps(OFFICIAL_ZERO_3))
    variables = {"DEEPSPEED": str(tmp_path / "ds_zero_3.json"), "OUTPUT_DIR": str(tmp_path / "out")}
    variables |= {"EXPECTED_PROCESSES": "8"}  # as the launcher says
    assert run_here("full/ds_train_finetune.sh", "--plan", DEVICE_MEMORY="80", MODEL="chatglm3-6b", **variables) == 0
    assert "8 processes under DeepSpeed" in capsys.readouterr().out


CPU, PINNED = {"device": "cpu"}, {"device": "cpu", "pin_memory": True}
GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("zero", "read", "offload"),
    [
        (True, {"stage": 1}, (False, False)),
        ({"stage": "2", "reduce_bucket_size": "5e8"}, {"stage": 2, "reduce_bucket_size": 5e8}, (False, False)),
        ({"stage": 2, "cpu_offload": True}, {"stage": 2, "offload_optimizer": CPU}, (True, False)),
        ({"stage": 2, "cpu_offload": False}, {"stage": 2}, (False, False)),
        (
            {"stage": 3, "cpu_offload": True, "cpu_offload_param": True, "cpu_offload_use_pin_memory": True},
            {"stage": 3, "offload_optimizer": PINNED, "offload_param": PINNED} | GATHERS,
            (True, True),
        ),
        (
            {"stage": 3, "cpu_offload_params": True},
            {"stage": 3, "offload_param": CPU} | GATHERS,
            (False, True),
        ),
        (
            {"stage": 2, "cpu_offload": False, "offload_optimizer": CPU},
            {"stage": 2, "offload_optimizer": CPU},
            (True, False),
        ),
        ({"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}, {"stage": 3} | GATHERS, (False, False)),
        ({"stage": 3, "gather_16bit_weights_on_model_save": False}, {"stage": 3} | GATHERS, (False, False)),
        (
            {"stage": 3, "prefetch_bucket_size": "auto", "stage3_max_live_parameters": "auto"},
            {"stage": 3, "stage3_prefetch_bucket_size": "auto"} | GATHERS,
            (False, False),
        ),
    ],
)
def test_a_deepspeed_file_is_read_under_todays_names(zero, read, offload, tmp_path):
    """So that training and prediction see the same settings."""
    file = tmp_path / "ds.json"
    file.write_text("\ufeff" + json.dumps({"train_batch_size": "auto", "zero_optimization": zero}))
    engine = parse("--deepspeed", str(file)).engine
    assert engine.config["zero_optimization"] == read
    assert (engine.offload, engine.sharded) == (offload, read["stage"] == 3)


def test_precision_is_one_word():
    assert [
        (parse("--precision", word).bf16, parse("--precision", word).fp16) for word in ("bf16", "fp32", "auto")
    ] == [
        (True, False),
        (False, False),
        (False, False),  # nothing but float32 is fast on a CPU
    ]


def test_offloading_without_the_memory_for_it_is_refused(tmp_path, monkeypatch):
    free = namedtuple("Memory", "available")(2**20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    flags = ["--model_name_or_path", "demo", "--train_file", str(ROOT / "AdvertiseGen" / "train.json")]
    flags += ["--do_train", "--dry_run", "--deepspeed", str(ROOT / "full" / "ds_zero_3_offload.json")]
    model_args, full_args, *others = parse_arguments(FullArguments, [*flags, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"offloading needs [\d,.]+ GB of this machine's memory and 0.0 GB are free"):
        finetune.run(Full(full_args), model_args, *others)


def test_weights_without_content_take_no_memory():
    """Those of all processes but the first under FSDP2: 3 GB here."""
    spec = SPECS["chatglm"]
    folder = ModelFolder("large", Path("large"), spec, spec.config(num_layers=1), bits=None, weights=())
    before = psutil.Process().memory_info().rss
    model = load_base(folder, read=False)
    assert psutil.Process().memory_info().rss - before < 0.02 * 4 * model.num_parameters()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_what_is_not_read_is_made_as_what_is(demo_folder):
    folder = open_model(demo_folder)
    full, empty = (load_base(folder, torch.bfloat16, read=read) for read in (True, False))
    assert [(name, weight.shape, weight.dtype) for name, weight in full.named_parameters()] == [
        (name, weight.shape, weight.dtype) for name, weight in empty.named_parameters()
    ]
    assert full.config.to_dict() == empty.config.to_dict() and full.generation_config == empty.generation_config


def test_an_extension_that_needs_nvcc_is_refused_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "jit_load", lambda *_, **__: installed_cuda_version())
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", None)
    guard_compilation(on_cpu=False)
    with pytest.raises(UserError, match="fused_adam is compiled by nvcc, which is not here .*CUDA_HOME"):
        FusedAdamBuilder().jit_load()


def test_fsdp_without_gpus_is_refused():
    with pytest.raises(UserError, match="--fsdp needs GPUs"), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        start_engine(parse_arguments(FullArguments, ["--do_train", "--fsdp", "true"])[-1])
