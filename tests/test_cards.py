"""What is decided beside which card, by the commands of the README for a real model: a row a decision.

Each runs the check that comes before several processes start, in this process. No weight is read, nothing is computed.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
from cards import CARDS, pretend
from shell import flags_of

from common.arguments import FullArguments, LoraArguments, PrefixArguments, TrainingArguments
from common.errors import UserError
from common.flags import parse_arguments
from common.launch import launcher
from common.launch.engines import start_engine
from common.launch.machines import Machines
from common.memory.fit import Case, forecast, needed, open_shape
from common.memory.footprint import Plan
from common.methods import Method
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.models.precision import half_dtype
from common.training import checks
from common.training.choices import choose

# Two blanks or more between columns; a column more is a field of Decision more.
DECISIONS = """\
cards                    training  processes  device  computes  weights  scaler
none                     ptuning   1          cpu     float32   float32  no
none                     lora      1          cpu     float32   float32  no
none                     full      1          cpu     float32   float32  no
none                     ZeRO-2    1          cpu     float32   float32  no
none                     ZeRO-3    1          cpu     float32   float32  no
no driver                ptuning   1          cpu     float32   float32  no
no driver                lora      1          cpu     float32   float32  no
no driver                full      1          cpu     float32   float32  no
no driver                ZeRO-2    1          cpu     float32   float32  no
no driver                ZeRO-3    1          cpu     float32   float32  no
T4                       ptuning   1          cuda    float16   float16  torch
T4                       lora      1          cuda    float16   float16  torch
T4                       full      1          cuda    float16   float32  torch
T4                       ZeRO-2    1          cuda    float16   float16  DeepSpeed
T4                       ZeRO-3    1          cuda    float16   float16  DeepSpeed
T4                       FSDP2     1          cuda    float16   float32  torch
8 x T4                   ptuning   8          cuda    float16   float16  torch
8 x T4                   lora      8          cuda    float16   float16  torch
8 x T4                   full      8          cuda    float16   float32  torch
8 x T4                   ZeRO-2    8          cuda    float16   float16  DeepSpeed
8 x T4                   ZeRO-3    8          cuda    float16   float16  DeepSpeed
8 x T4                   FSDP2     8          cuda    float16   float32  torch
3090                     ptuning   1          cuda    bfloat16  bfloat16  no
3090                     lora      1          cuda    bfloat16  bfloat16  no
3090                     full      1          cuda    bfloat16  float32  no
3090                     ZeRO-2    1          cuda    bfloat16  bfloat16  no
3090                     ZeRO-3    1          cuda    bfloat16  bfloat16  no
3090                     FSDP2     1          cuda    bfloat16  float32  no
8 x 4090                 ptuning   8          cuda    bfloat16  bfloat16  no
8 x 4090                 lora      8          cuda    bfloat16  bfloat16  no
8 x 4090                 full      8          cuda    bfloat16  float32  no
8 x 4090                 ZeRO-2    8          cuda    bfloat16  bfloat16  no
8 x 4090                 ZeRO-3    8          cuda    bfloat16  bfloat16  no
8 x 4090                 FSDP2     8          cuda    bfloat16  float32  no
5090                     ptuning   1          cuda    bfloat16  bfloat16  no
5090                     lora      1          cuda    bfloat16  bfloat16  no
5090                     full      1          cuda    bfloat16  float32  no
5090                     ZeRO-2    1          cuda    bfloat16  bfloat16  no
5090                     ZeRO-3    1          cuda    bfloat16  bfloat16  no
5090                     FSDP2     1          cuda    bfloat16  float32  no
V100 with CUDA 12.6      ptuning   1          cuda    float16   float16  torch
V100 with CUDA 12.6      lora      1          cuda    float16   float16  torch
V100 with CUDA 12.6      full      1          cuda    float16   float32  torch
V100 with CUDA 12.6      ZeRO-2    1          cuda    float16   float16  DeepSpeed
V100 with CUDA 12.6      ZeRO-3    1          cuda    float16   float16  DeepSpeed
V100 with CUDA 12.6      FSDP2     1          cuda    float16   float32  torch
8 x V100 with CUDA 12.6  ptuning   8          cuda    float16   float16  torch
8 x V100 with CUDA 12.6  lora      8          cuda    float16   float16  torch
8 x V100 with CUDA 12.6  full      8          cuda    float16   float32  torch
8 x V100 with CUDA 12.6  ZeRO-2    8          cuda    float16   float16  DeepSpeed
8 x V100 with CUDA 12.6  ZeRO-3    8          cuda    float16   float16  DeepSpeed
8 x V100 with CUDA 12.6  FSDP2     8          cuda    float16   float32  torch
A100                     ptuning   1          cuda    bfloat16  bfloat16  no
A100                     lora      1          cuda    bfloat16  bfloat16  no
A100                     full      1          cuda    bfloat16  float32  no
A100                     ZeRO-2    1          cuda    bfloat16  bfloat16  no
A100                     ZeRO-3    1          cuda    bfloat16  bfloat16  no
A100                     FSDP2     1          cuda    bfloat16  float32  no
8 x A100                 ptuning   8          cuda    bfloat16  bfloat16  no
8 x A100                 lora      8          cuda    bfloat16  bfloat16  no
8 x A100                 full      8          cuda    bfloat16  float32  no
8 x A100                 ZeRO-2    8          cuda    bfloat16  bfloat16  no
8 x A100                 ZeRO-3    8          cuda    bfloat16  bfloat16  no
8 x A100                 FSDP2     8          cuda    bfloat16  float32  no
H100                     ptuning   1          cuda    bfloat16  bfloat16  no
H100                     lora      1          cuda    bfloat16  bfloat16  no
H100                     full      1          cuda    bfloat16  float32  no
H100                     ZeRO-2    1          cuda    bfloat16  bfloat16  no
H100                     ZeRO-3    1          cuda    bfloat16  bfloat16  no
H100                     FSDP2     1          cuda    bfloat16  float32  no
8 x H100                 ptuning   8          cuda    bfloat16  bfloat16  no
8 x H100                 lora      8          cuda    bfloat16  bfloat16  no
8 x H100                 full      8          cuda    bfloat16  float32  no
8 x H100                 ZeRO-2    8          cuda    bfloat16  bfloat16  no
8 x H100                 ZeRO-3    8          cuda    bfloat16  bfloat16  no
8 x H100                 FSDP2     8          cuda    bfloat16  float32  no
"""
# With the defaults of the scripts; rows x batches of a step, answers at once, and whether that fits on the card.
CHOICES = """\
cards     training  step    checkpointing  answers  fits
T4        ptuning   16 x 1  no             64       yes
T4        lora      2 x 2   no             64       yes
3090      ptuning   16 x 1  no             64       yes
3090      lora      4 x 1   no             64       yes
8 x A100  lora      4 x 1   no             64       yes
H100      full      4 x 1   yes            8        no
8 x A100  ZeRO-2    4 x 1   yes            8        yes
8 x 4090  ZeRO-2    4 x 1   yes            8        no
8 x 4090  ZeRO-3    4 x 1   yes            8        yes
8 x A100  FSDP2     4 x 1   yes            8        yes
"""
METHODS = {"ptuning": (PTuning, PrefixArguments), "lora": (Lora, LoraArguments), "full": (Full, FullArguments)}
TRAININGS: dict[str, tuple[str, dict[str, str]]] = {  # name -> script, variables
    "ptuning": ("ptuning/train.sh", {}),
    "lora": ("lora/train.sh", {}),
    "full": ("full/train.sh", {}),
    "ZeRO-2": ("full/ds_train_finetune.sh", {}),
    "ZeRO-3": ("full/ds_train_finetune.sh", {"DEEPSPEED": "full/ds_zero_3.json"}),
    "FSDP2": ("full/fsdp_train_finetune.sh", {}),
}


class Decision(NamedTuple):
    """The columns of DECISIONS, as they are written there."""

    processes: str
    device: str
    computes: str  # dtype of the passes; a 4-bit base is unpacked to it
    weights: str  # dtype of the base, if it is not quantized
    scaler: str  # of the loss in float16: that of torch, or DeepSpeed's own


@cache
def flags(training: str) -> list[str]:
    script, variables = TRAININGS[training]
    return flags_of(script, "--dry_run", MODEL="chatglm3-6b", **variables)


def parse(training: str, folder: Path, *more: str) -> tuple[Method, TrainingArguments, Callable]:
    """Everything that is decided before the memory is predicted. Raises UserError as the program does."""
    make, arguments = METHODS.get(training, METHODS["full"])
    own = [*flags(training), "--output_dir", str(folder), *more]
    model_args, method_args, data_args, args = parse_arguments(arguments, own)
    method = make(method_args)
    start_engine(args)
    choose(data_args, args)
    folder = checks.check(method, model_args, data_args, args)
    checks.complete(method, model_args, args, folder)
    return method, args, partial(forecast, folder, method, model_args, data_args, args)


def decide(training: str, folder: Path, *more: str) -> Decision:
    """As the launcher and the process that it checks with. Raises UserError."""
    processes = launcher.count_processes()
    launcher.set_environment(processes, Machines())
    os.environ |= launcher.first_gpu()
    method, args, _ = parse(training, folder, *more)
    weights = args.base_dtype(method.trains_base)
    scaler = {"DeepSpeed": "DeepSpeed"}.get(args.engine.name, "torch") if args.fp16 else "no"
    found = processes, args.device.type, half_dtype(args) or weights, weights, scaler
    return Decision(*(str(value).removeprefix("torch.") for value in found))


@pytest.fixture
def machine(monkeypatch):
    """An environment of its own, and a model without weights."""
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if "VISIBLE" not in name})
    monkeypatch.delitem(os.environ, "NUM_PROCESSES", raising=False)
    monkeypatch.setattr(checks, "open_model", open_shape)


def rows(table: str = DECISIONS) -> list[list[str]]:
    return [re.split("  +", line) for line in table.splitlines()]


def test_the_columns_are_those_of_a_decision():
    assert rows()[0] == ["cards", "training", *Decision._fields]


@pytest.mark.parametrize(("cards", "training", "decision"), [(*row[:2], Decision(*row[2:])) for row in rows()[1:]])
def test_what_is_decided(machine, cards, training, decision, tmp_path):
    with pretend(cards):
        assert decide(training, tmp_path / "output") == decision


PLANS: dict[tuple, Plan] = {}
PLAN = Case.plan


def plan_of(case: Case, layers: int) -> Plan:
    """The plan of a model with fewer layers, made once for each setup."""
    key = case.method.name, str(case.setup), layers
    if key not in PLANS:
        config = type(case.folder.config).from_dict(case.folder.config.to_dict() | {"num_layers": layers})
        PLANS[key] = PLAN(case._replace(folder=replace(case.folder, config=config), known=[]))
    return PLANS[key]


def extrapolated(case: Case) -> Plan:
    """The plan of all layers from those of 4 and 5, in a fraction of the time: each layer takes the same."""
    few, more = (plan_of(case, layers).parts for layers in (4, 5))
    return Plan(Counter({kind: few[kind] + (more[kind] - few[kind]) * 24 for kind in few | more}))


@pytest.mark.parametrize(("cards", "training", "chosen"), [(*row[:2], row[2:]) for row in rows(CHOICES)[1:]])
def test_what_is_chosen(machine, cards, training, chosen, tmp_path, monkeypatch):
    with pretend(cards):
        launcher.set_environment(launcher.count_processes(), Machines())
        os.environ |= launcher.first_gpu()
        _, args, predict = parse(training, tmp_path / "output")
        monkeypatch.setattr(Case, "plan", extrapolated)
        case, plan, available = predict()
    step = f"{args.per_device_train_batch_size} x {args.gradient_accumulation_steps}"
    answers = ["no", "yes"][bool(args.activation_checkpointing)], ["no", "yes"][needed(plan, case.setup) <= available]
    assert [step, answers[0], str(args.answer_batch_size), answers[1]] == chosen


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize(
    ("cards", "says"),
    [
        ("old driver", r"driver.* \(CUDA 12.4\) is too old for .*2.13.0\+cu130.*580 or newer, or .*TORCH_INDEX=cu126 "),
        ("8 x V100", r"Tesla V100-SXM2-32GB is sm_70.* is for sm_75, .*: remove .venv and set TORCH_INDEX=cu126 "),
        ("P100", r"Tesla P100-PCIE-16GB is sm_60.* is for sm_75, .*: remove .venv and set TORCH_INDEX=cu126 "),
    ],
)
def test_cards_that_can_not_be_used_are_refused(machine, cards, says, training, tmp_path):
    with pretend(cards), pytest.raises(UserError, match=says) as error:
        decide(training, tmp_path / "output")
    assert "NUM_GPUS=0" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("cards", ["old driver", "8 x V100", "8 x H100"])
def test_num_gpus_0_goes_on_on_the_cpu(machine, cards, tmp_path, capsys):
    os.environ["NUM_GPUS"] = "0"
    with pretend(cards):
        assert decide("lora", tmp_path / "output") == Decision("1", "cpu", "float32", "float32", "no")
    assert "runs on the CPU" not in capsys.readouterr().err


@pytest.mark.parametrize("cards", ["none", "no driver"])
def test_fsdp_needs_a_card(machine, cards, tmp_path):
    with pretend(cards), pytest.raises(UserError, match="--fsdp needs GPUs, and none is visible here"):
        decide("FSDP2", tmp_path / "output")


@pytest.mark.parametrize("asked", [False, True])
def test_a_real_model_on_a_cpu_is_said_unless_it_was_asked_for(machine, asked, tmp_path, capsys):
    with pretend("no driver"):
        decide("lora", tmp_path / "output", *["--use_cpu"][:asked])
    said = [line for line in capsys.readouterr().err.splitlines() if "CPU" in line]
    assert len(said) == (not asked)
    assert asked or said[0].startswith("note: PyTorch 2.13.0+cu130 finds no GPU: chatglm3-6b runs on the CPU")


def test_a_plan_is_made_beside_any_card(machine, tmp_path):
    os.environ |= launcher.first_gpu()
    for cards in CARDS:
        with pretend(cards):
            parse("lora", tmp_path / "output", "--plan")
