"""Predicted memory: as much as is measured, refused with what would fit, the largest batch that fits."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import GlmConfig, GlmForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

import memory as bench
from hub_server import running_hub
from huggingface_hub import constants
from shell import bash, flags_of, run_here

from common.arguments import FullArguments, LoraArguments
from common.engine import Engine
from common.errors import UserError, exit_on_user_error
from common.finetune import run
from common.flags import parse_arguments
from common.memory import fit, footprint
from common.memory.fit import Case
from common.methods.full import Full
from common.methods.lora import Lora
from common.models.registry import DEMOS, SPECS, ModelFolder

MEASURED = [  # of 3 layers, with a vocabulary of 8192
    bench.Setting("chatglm", "ptuning", 4, 1, 32, 64, checkpointing=True, accumulation=2),
    bench.Setting("chatglm", "full", None, 2, 32, 32),
    bench.Setting("chatglm2", "lora", 8, 2, 64, 64),
    bench.Setting("chatglm3", "lora", None, 4, 64, 192, checkpointing=True),
]


@pytest.mark.parametrize("setting", MEASURED, ids=str)
def test_as_much_is_predicted_as_is_measured(setting, tmp_path):
    model = bench.make_model(setting.kind, tmp_path / "model", shape=(128, 3, 4, 352, 8192))
    predicted, measured = bench.measure(setting, model)
    assert predicted == pytest.approx(measured, rel=bench.ALLOWED)


@pytest.fixture(scope="module")
def case() -> Case:
    """LoRA of ChatGLM3-6B with the lengths of lora/train.sh in 16 bit: 4 rows of 256 + 512 tokens, checkpointed."""
    chosen = {"BATCH_SIZE": "4", "EVAL_BATCH_SIZE": "8", "GRADIENT_CHECKPOINTING": "true"}
    flags = flags_of("lora/train.sh", MODEL="chatglm3-6b", QUANTIZATION_BIT="", **chosen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE_MEMORY", "80")
        return bench.planned("lora", flags).case


def test_a_card_that_is_not_here_computes_in_the_precision_of_the_flag(monkeypatch):
    monkeypatch.setenv("DEVICE_MEMORY", "80")
    setup = bench.planned("lora", flags_of("lora/train.sh", "--precision", "fp32", QUANTIZATION_BIT="")).case.setup
    assert (setup.dtype, setup.autocast) == (torch.float32, None)


def test_the_6b_models_keep_their_limits(case):
    plan = case.plan()
    assert plan.parts["weights"] == 12_487_168_000  # bytes in 16 bit, but for the 64 of inv_freq
    assert plan.total < 14.0e9
    small = case.changed(bits=4, batch_size=1, source_length=64, target_length=65, generation_batch_size=0)
    assert small.plan().total < 5.2e9


@pytest.mark.parametrize(
    ("setup", "measured"), [({"checkpointing": False}, 23.92e9), ({"bits": 8}, 8.54e9), ({"bits": 4}, 5.58e9)]
)
def test_what_a_gpu_took_is_predicted(setup, measured, case, monkeypatch):
    """Measured on an H200, with a mask, which keeps flash attention away; tests/bench/RESULTS.md has more."""
    batch = footprint.labelled_batch
    monkeypatch.setattr(
        footprint, "labelled_batch", lambda *args: (ids := batch(*args)) | {"attention_mask": ids["input_ids"]}
    )
    assert case._replace(known=[]).changed(**setup).plan().total == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"checkpointing": False}, {"checkpointing": True}),
        ({"batch_size": 4}, {"batch_size": 2, "accumulates": True}),
        ({"bits": 8}, {"bits": 4}),
        ({"bits": None}, {"bits": 8}),
        ({"generation_batch_size": 8, "answer_length": 16384}, {"generation_batch_size": 8}),
        ({"target_length": 513}, {"target_length": 65}),
        ({"processes": 2, "engine": Engine()}, {"processes": 2, "engine": Engine("FSDP2", sharded=True)}),
    ],
)
def test_what_saves_memory_saves_it_in_the_prediction(case, more, less):
    config = case.folder.spec.config(num_layers=8, padded_vocab_size=8192)
    shallow = case._replace(folder=replace(case.folder, config=config), known=[])
    assert shallow.changed(**more).plan().total > shallow.changed(**less).plan().total


def test_the_longest_row_is_the_last_that_fits(case):
    config = case.folder.spec.config(num_layers=2, padded_vocab_size=8192)
    shallow = case._replace(folder=replace(case.folder, config=config), known=[])
    shallow = shallow.changed(batch_size=1, evaluation_batch_size=0, generation_batch_size=0)
    tokens = bench.longest_row(shallow, room=5e9)
    fits, too_long = (
        fit.needed(row.plan(), row.setup)
        for length in (tokens, tokens + bench.STEP)
        for row in [shallow.changed(source_length=length - length // 4, target_length=length // 4)]
    )
    assert fits <= 5e9 < too_long


def test_models_of_transformers_are_predicted_too(case):
    config = GlmConfig(num_hidden_layers=2, vocab_size=1024, pad_token_id=0, hidden_size=128, intermediate_size=256)
    folder = ModelFolder("glm", Path("glm"), SPECS["glm"], config, bits=None, weights=())
    plan = case._replace(folder=folder, known=[]).plan()
    with torch.device("meta"):
        parameters = GlmForCausalLM(config).num_parameters()
    assert 2 * parameters <= plan.parts["weights"] <= 2 * parameters + 1000  # with its rotary frequencies
    assert plan.parts["activations"] > plan.parts["trained weights"] > 0


ZERO_2 = Engine("DeepSpeed", config={"zero_optimization": {"stage": 2}})
ZERO_3 = Engine("DeepSpeed", sharded=True, config={"zero_optimization": {"stage": 3}})
FSDP2 = Engine("FSDP2", sharded=True)


@pytest.mark.parametrize(
    ("engine", "dtype", "bytes_per_weight"),
    [(ZERO_2, torch.bfloat16, 2), (ZERO_3, torch.bfloat16, 2), (FSDP2, torch.float32, 8), (Engine(), torch.float32, 4)],
    ids=lambda value: f"{value.name}-{value.sharded}" if isinstance(value, Engine) else "",
)
def test_the_host_holds_whole_weights_once(engine, dtype, bytes_per_weight, case, monkeypatch, tmp_path):
    """To read or to save them, in the first process; FSDP2 gathers the two moments of a checkpoint there."""
    config = case.folder.spec.config(num_layers=2, padded_vocab_size=8192)
    shallow = case._replace(folder=replace(case.folder, config=config), method=Full(FullArguments()), known=[])
    plan = shallow.changed(engine=engine, processes=8, dtype=dtype).plan()
    with torch.device("meta"):
        parameters = shallow.folder.spec.model(config).num_parameters()
    assert plan.host == bytes_per_weight * parameters
    args = parse_arguments(FullArguments, ["--do_train", "--output_dir", str(tmp_path)])[-1]
    little = replace(plan, parts=Counter())
    monkeypatch.setattr(fit.psutil, "virtual_memory", lambda: SimpleNamespace(available=plan.host - 1))
    assert fit.shortage(shallow, little, 1, args).startswith("reading and saving the weights needs ")
    monkeypatch.setenv("MACHINE_RANK", "1")
    assert fit.shortage(shallow, little, 1, args) == ""


FLAGS = """--do_train --train_file {data} --prompt_column content --response_column summary --model_name_or_path demo3
--max_source_length 32 --max_target_length 32 --max_steps 2 --report_to none --output_dir {output}"""


def train(tmp_path, *flags: str, available: float) -> None:
    """A training of the demo where that many bytes are free."""
    data = bench.write_rows(tmp_path / "rows.json", 8)
    argv = [*FLAGS.format(data=data, output=tmp_path / "out").split(), *flags]
    model_args, lora_args, *others = parse_arguments(LoraArguments, argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "free_memory", lambda args: int(available))
        run(Lora(lora_args), model_args, *others)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path):
    with pytest.raises(UserError) as error:
        train(tmp_path, "--per_device_train_batch_size", "64", "--dry_run", available=100e6)
    assert str(error.value).startswith("this needs about 0.3 GB of memory (activations ")
    assert "and 0.1 GB are free on cpu: " in str(error.value)
    assert ": --per_device_train_batch_size 16 --gradient_accumulation_steps 4 makes it fit; " in str(error.value)


def test_a_switch_makes_a_warning_of_the_refusal(tmp_path, capsys):
    train(tmp_path, "--per_device_train_batch_size", "64", "--check_memory", "false", "--dry_run", available=120e6)
    assert "warning: this needs about 0.3 GB" in capsys.readouterr().err


def test_memory_that_runs_out_all_the_same_is_one_sentence(capsys):
    reason = "CUDA out of memory. Tried to allocate 2.50 GiB"
    with pytest.raises(SystemExit, match="2"), exit_on_user_error():
        raise torch.OutOfMemoryError(f"{reason}. GPU 0 has a total capacity of 7.79 GiB of which 1.06 GiB is free.")
    assert capsys.readouterr().err.startswith(f"error: {reason}: smaller batches")


def test_a_batch_size_is_chosen_and_kept_when_the_training_goes_on(tmp_path, capsys):
    auto = ["--per_device_train_batch_size", "auto", "--save_steps", "1"]
    train(tmp_path, *auto, available=270e6)
    assert "batch size 16: the largest power of two, at most 256, for 0.3 GB" in capsys.readouterr().err
    settings = json.loads((tmp_path / "out" / "run_settings.json").read_text())
    assert settings["rows_per_step"] == 16
    train(tmp_path, *auto, "--max_steps", "3", available=psutil.virtual_memory().total)
    assert "batch size 16: as in the training that" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 3


# GB of a card -> what P-Tuning v2 of a small ChatGLM2, 16 rows of 64 + 65 tokens a step, then does.
CHOICES = [
    ("4", 16, 1, False),  # everything fits
    ("0.8", 8, 2, False),  # half of the batch without checkpointing is faster than the whole with it
    ("0.67", 16, 1, True),
]


@pytest.mark.parametrize(("gigabytes", "rows", "accumulation", "checkpointing"), CHOICES)
def test_what_is_fast_and_fits_is_chosen(gigabytes, rows, accumulation, checkpointing, tmp_path, monkeypatch):
    model = bench.make_model("chatglm2", tmp_path / "model", shape=(512, 8, 8, 1408, 8192))
    monkeypatch.setenv("DEVICE_MEMORY", gigabytes)
    variables = {"MODEL": str(model), "OUTPUT_DIR": str(tmp_path / "out"), "QUANTIZATION_BIT": ""}
    case, plan, available = bench.planned("ptuning", flags_of("ptuning/train.sh", **variables))
    chosen = case.setup
    assert (chosen.batch_size, chosen.accumulates, chosen.checkpointing) == (rows, accumulation > 1, checkpointing)
    assert fit.needed(plan, chosen) <= available


def test_a_batch_size_is_a_number_or_auto():
    with pytest.raises(UserError, match="--per_device_train_batch_size big: give a number of rows, or auto"):
        parse_arguments(LoraArguments, ["--per_device_train_batch_size", "big"])
    with pytest.raises(UserError, match="auto: under DeepSpeed give a number"):
        parse_arguments(LoraArguments, ["--per_device_train_batch_size", "auto", "--deepspeed", "{}"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one small model, the only one that this process knows."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HUB", "modelscope")
    monkeypatch.setenv("CHATGLM_CACHE", str(tmp_path / "cache"))
    with running_hub() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.address)
        server.repositories["ZhipuAI/chatglm3-6b"] = {file.name: file.read_bytes() for file in DEMOS["demo3"].iterdir()}
        yield server


def test_what_can_not_fit_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    with pytest.raises(UserError, match="this needs about .* and 0.0 GB are free"):
        train(tmp_path, "--model_name_or_path", "chatglm3-6b", available=1e6)
    assert "config.json" in hub.asked() and "pytorch_model.bin" not in hub.asked()
    train(tmp_path, "--model_name_or_path", "chatglm3-6b", "--dry_run", available=1e9)
    assert "pytorch_model.bin" in hub.asked()


def test_a_plan_of_what_fits_downloads_nothing(hub, tmp_path, capsys):
    variables = {"MODEL": "chatglm3-6b", "DEVICE_MEMORY": "80", "OUTPUT_DIR": str(tmp_path / "out")}
    assert run_here("lora/train.sh", "--plan", **variables) == 0
    said = capsys.readouterr().out
    assert "ChatGLM3-6B, LoRA: predicted memory" in said and "a process on its device" in said
    assert "4 x (256 + 513) tokens, 4 bit, without gradient checkpointing" in said and "fits into 79.5 GB; " in said
    assert "fragmentation, beside that" in said and ", answers 64 rows at once" in said
    assert hub.asked() == [] and not (tmp_path / "out").exists()


def test_a_plan_of_what_does_not_fit_ends_with_exit_code_2(tmp_path, capsys):
    variables = {"MODEL": "demo3", "DEVICE_MEMORY": "0.6", "OUTPUT_DIR": str(tmp_path / "out")}
    assert run_here("lora/train.sh", "--plan", check=False, BATCH_SIZE="64", **variables) == 2
    said = capsys.readouterr()
    assert "ChatGLM3-6B, LoRA: predicted memory" in said.out and "fits into" not in said.out
    assert said.err.splitlines()[-1].startswith("error: this needs about ")
    assert " and 0.1 GB are free on a card of DEVICE_MEMORY: " in said.err
    assert not (tmp_path / "out").exists()


def test_a_plan_for_cards_that_are_not_here(tmp_path):
    variables = {"DEVICE_MEMORY": "80", "NUM_GPUS": "8", "OUTPUT_DIR": str(tmp_path / "out")}
    said = bash("full/ds_train_finetune.sh", "--plan", **variables).stdout
    assert "8 processes under DeepSpeed" in said and "fits into 79.5 GB" in said
    assert not (tmp_path / "out").exists()
