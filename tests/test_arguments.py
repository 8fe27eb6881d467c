"""The command line: official flags, old spellings, and bad values that are named in one sentence."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import ROOT
from transformers import HfArgumentParser

from common.arguments import (
    DataArguments,
    FullArguments,
    LoraArguments,
    ModelArguments,
    PrefixArguments,
    PreprocessArguments,
    TrainingArguments,
)
from common.bounds import BOUNDS
from common.data.look import check_files
from common.declared import parser_of
from common.errors import UserError
from common.flags import parse_arguments, read_flags
from common.training.checks import check_trackers

OFFICIAL_TRAIN = """--do_train --train_file train.json --validation_file dev.json --prompt_column content
--response_column summary --overwrite_cache --model_name_or_path chatglm-6b --output_dir output --overwrite_output_dir
--max_source_length 64 --max_target_length 64 --per_device_train_batch_size 1 --per_device_eval_batch_size 1
--gradient_accumulation_steps 16 --predict_with_generate --max_steps 3000 --logging_steps 10 --save_steps 1000
--learning_rate 2e-2 --pre_seq_len 128 --quantization_bit 4"""


def test_the_official_flags_mean_what_they_meant():
    model_args, prefix_args, data_args, args = parse_arguments(PrefixArguments, OFFICIAL_TRAIN.split())
    assert (args.per_device_eval_batch_size, args.auto_answers) == (1, True)  # as many together as fit
    assert (model_args.model_name_or_path, model_args.quantization_bit) == ("chatglm-6b", 4)
    assert (prefix_args.pre_seq_len, prefix_args.prefix_projection, prefix_args.ptuning_checkpoint) == (
        128,
        False,
        None,
    )
    assert (data_args.max_source_length, data_args.max_target_length, data_args.val_max_target_length) == (64, 64, 64)
    assert (data_args.overwrite_cache, data_args.ignore_pad_token_for_loss) == (True, True)
    assert (args.overwrite_output_dir, args.max_steps, args.learning_rate) == (True, 3000, 0.02)
    assert (args.gradient_accumulation_steps, args.predict_with_generate) == (16, True)
    assert args.report_to == ["tensorboard"]


@pytest.mark.parametrize(
    ("old", "name", "value"),
    [
        (["--evaluation_strategy", "epoch"], "eval_strategy", "epoch"),
        (["--evaluation_strategy=epoch"], "eval_strategy", "epoch"),
        (["--warmup_ratio", "0.1"], "warmup_steps", 0.1),
        (["--no_cuda"], "use_cpu", True),
        (["--group_by_length"], "train_sampling_strategy", "group_by_length"),
        (["--group_by_length", "false"], "train_sampling_strategy", "random"),
        (["--logging_dir", "logs"], "output_dir", "out"),
        (["--use_fast_tokenizer"], "output_dir", "out"),
    ],
)
def test_old_spellings_work_with_one_line_of_advice(old, name, value, capsys):
    args = parse_arguments(PrefixArguments, [*old, "--output_dir", "out"])[3]
    assert vars(args)[name] == value
    advice = capsys.readouterr().err.splitlines()
    assert len(advice) == (0 if old[-1] == "false" else 1)
    assert all(old[0].split("=")[0] in line for line in advice)


@pytest.mark.parametrize(
    ("flags", "trackers"),
    [
        ("none", []),
        ("wandb", ["wandb"]),
        ("wandb tensorboard", ["wandb", "tensorboard"]),
        ("wandb,tensorboard", ["wandb", "tensorboard"]),
    ],
)
def test_trackers_are_one_or_several(flags, trackers):
    assert parse_arguments(LoraArguments, ["--report_to", *flags.split()])[3].report_to == trackers


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], torch.bfloat16), (["--precision", "fp32"], torch.float32), (["--precision", "fp16"], torch.float16)],
)
def test_precision_is_that_of_a_frozen_base_too(flags, dtype, monkeypatch):
    """On a device that computes in bfloat16 fast."""
    monkeypatch.setattr("common.arguments.compute_dtype", lambda device: torch.bfloat16)
    args = parse_arguments(LoraArguments, ["--do_train", "--train_file", "train.json", *flags])[3]
    assert args.base_dtype(trains_base=False) == dtype


def test_parsing_starts_nothing(monkeypatch):
    """Nor does it wait for a second process that is not there."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    args = parse_arguments(FullArguments, ["--do_train", "--deepspeed", '{"zero_optimization": {"stage": 3}}'])[-1]
    assert os.environ == before and not torch.distributed.is_initialized()
    assert (args.engine.name, args.engine.sharded, args.processes) == ("DeepSpeed", True, 2)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lora_rang", "--lora_rank"),
        ("--lora_r", "--lora_rank"),
        ("--lora_alfa", "--lora_alpha"),
        ("--max_step", "--max_steps"),
        ("--train_files=a", "--train_file"),
        ("--num_train_epoch", "--num_train_epochs"),
        ("--qantization_bit", "--quantization_bit"),
        ("--max_source_len", "--max_source_length"),
        ("--tempreature", "--temperature"),
        ("--output", "--output_dir"),
        ("--do_trian", "--do_train"),
        ("--gradient_accumulation", "--gradient_accumulation_steps"),
        ("--template", ""),
        ("--dataset", ""),
        ("--stage", ""),
        ("--finetuning_type", ""),
        ("--cutoff_len", ""),
        ("--val_size", ""),
        ("--lora_target_modules", ""),
        ("--epochs", ""),
    ],
)
def test_a_flag_is_suggested_only_if_it_is_near(flag, meant):
    with pytest.raises(UserError) as error:
        parse_arguments(LoraArguments, [flag])
    said = str(error.value)
    assert said.startswith(f"unknown flag {flag.partition('=')[0]}")
    assert said.partition("did you mean ")[2].rstrip("?") == meant


def test_the_flags_of_lora_have_the_official_defaults():
    args = parse_arguments(LoraArguments, "--lora_rank 16 --lora_target dense,dense_h_to_4h --use_rslora".split())[1]
    assert (args.lora_rank, args.lora_target, args.use_rslora) == (16, "dense,dense_h_to_4h", True)
    assert (args.lora_alpha, args.lora_dropout) == (32, 0.1)
    assert (args.use_dora, args.loraplus_lr_ratio, args.lora_checkpoint) == (False, None, None)


def test_every_flag_that_is_a_number_has_its_bounds():
    kinds = (ModelArguments, PrefixArguments, LoraArguments, FullArguments, DataArguments, TrainingArguments)
    numbers = {
        name
        for kind in kinds
        for name, hint in get_type_hints(kind).items()
        if {int, float} & {hint, *get_args(hint)} and kind.__dataclass_fields__[name].init
    }
    unread = {"local_rank", "generation_max_length", "generation_num_beams"}
    assert numbers - BOUNDS.keys() == unread | {"quantization_bit"}  # which has two values


@pytest.mark.parametrize("kind", [PrefixArguments, LoraArguments, FullArguments, PreprocessArguments])
def test_the_flags_that_the_sources_declare_are_those_of_the_dataclasses(kind):
    """transformers makes its parser of the dataclasses, and imports torch for that."""
    kinds = kind, ModelArguments, DataArguments, *([TrainingArguments] if kind != PreprocessArguments else [])
    theirs = HfArgumentParser(kinds, usage="", allow_abbrev=False)
    ours = parser_of([each.__name__ for each in kinds], "")
    attributes = ("option_strings", "dest", "nargs", "const", "choices", "default", "required", "help")

    def described(parser):
        found = {action.option_strings[0]: vars(action) for action in parser._actions}
        found = {name: {key: about[key] for key in attributes} for name, about in found.items()}
        for name, about in found.items():
            about["choices"] = list(about["choices"] or [])
            if name.startswith("--no_"):
                del about["default"]  # that of the switch counts, which comes first
        return found

    expected, found = described(theirs), described(ours)
    if kind != PreprocessArguments:
        del expected["--parallelism_config"]  # an object, which words can't say
        for name in ("--log_level", "--log_level_replica"):
            expected[name]["choices"] = []  # transformers computes them; ``check_values`` knows them
        expected["--optim"]["default"] = "==SUPPRESS=="  # computed too: the dataclass fills it in
        expected["--debug"]["default"] = ""  # which has no effect
    assert found == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rang", "3"], "unknown flag --lora_rang: did you mean --lora_rank?"),
        (["--do_train", "--train_file", "nowhere.json"], "no data file nowhere.json"),
        (["--do_train", "--train_file", "rows.json", "--prompt_column", "q"], "no column 'q'; there are 'a', 'b'"),
        (["--parallelism_config", "x"], "unknown flag --parallelism_config (--help lists all)."),
        (["--help"], ""),
    ],
)
def test_what_is_wrong_is_said_before_torch_is_imported(tmp_path, flags, said):
    (tmp_path / "rows.json").write_text('{"a": "1", "b": "2"}')
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "lora/main.py", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert said in ended.stderr
    assert not re.search(r"\| +(torch|transformers|datasets)$", ended.stderr, re.MULTILINE)
    assert ended.returncode == (2 if said else 0)


@pytest.mark.parametrize(
    ("first", "flags"),
    [
        ('{"a": "1"}', "--do_predict --test_file rows.json --prompt_column a --response_column b"),  # questions alone
        ('{"a": [], "b": "1"}', "--do_train --train_file rows.json --conversation_column a --prompt_column c"),
        ('{"text": "1"}', "--do_train --train_file rows.json --text_column text --prompt_column c"),
        ("broken", "--do_train --train_file rows.json --prompt_column a"),  # which is told with all bad rows
        ('{"a": "1"}', "--do_train --train_file rows.json --prompt_column b --skip_bad_rows"),
    ],
)
def test_the_first_look_asks_for_columns_that_are_read(tmp_path, monkeypatch, first, flags):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text(first)
    check_files(read_flags("LoraArguments", flags.split()))


@pytest.mark.parametrize(("number", "taken"), [("0.7.20", True), ("0.10.3", False), ("1.0.0", False)])
def test_a_tracker_that_the_trainer_can_not_use_is_refused(number, taken, tmp_path, monkeypatch):
    (tmp_path / "swanlab").mkdir()
    (tmp_path / "swanlab" / "__init__.py").touch()
    (tmp_path / f"swanlab-{number}.dist-info").mkdir()
    (tmp_path / f"swanlab-{number}.dist-info" / "METADATA").write_text(f"Name: swanlab\nVersion: {number}\n")
    monkeypatch.syspath_prepend(tmp_path)
    args = parse_arguments(LoraArguments, ["--report_to", "swanlab"])[3]
    with nullcontext() if taken else pytest.raises(UserError, match=f"can't use swanlab {number}: .* install"):
        check_trackers(args)
