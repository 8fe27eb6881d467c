"""The engine that spreads a training over processes, as --deepspeed or --fsdp describe it; it is started elsewhere."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import Seq2SeqTrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from common.deepspeed_file import GATHERS, check_settings, current_settings
from common.errors import UserError


@dataclass(frozen=True)
class Engine:
    """The engine that spreads a training over processes; ``config`` holds the settings of DeepSpeed."""

    name: str = "DDP"  # or DeepSpeed, or FSDP2
    sharded: bool = False  # every process holds only its part of the weights: ZeRO-3, FSDP2
    offload: tuple[bool, bool] = (False, False)  # of the optimizer's states, and of the weights, to the host
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def loss_flags(self) -> dict[str, bool]:
        """The flags that a model's loss is computed with."""
        return {"loss_only": True, "loss_in_parts": not self.sharded, "use_cache": False}


def read_config(flag: str, given: str | dict[str, Any] | None) -> dict[str, Any]:
    """The settings that a flag gives as a JSON file or as JSON itself. Raises UserError if it is missing or broken."""
    if not isinstance(given, str):
        return dict(given or {})
    if not given.startswith("{") and not Path(given).is_file():
        raise UserError(f"--{flag}: no file {given}.")
    try:
        config = json.loads(given if given.startswith("{") else Path(given).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--{flag}: {given:.80} is broken JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"--{flag}: {given:.80} must hold an object, found {type(config).__name__}.")
    return config


def engine_of(args: Seq2SeqTrainingArguments, processes: int) -> Engine:
    """The engine that --deepspeed or --fsdp asks for. Raises UserError as ``deepspeed_config`` does."""
    if args.fsdp:
        offload = bool(args.fsdp_config.get("cpu_offload"))
        return Engine("FSDP2", sharded=True, offload=(offload, offload))
    if not args.deepspeed:
        return Engine()
    config = deepspeed_config(args, processes)
    zero = config["zero_optimization"]
    devices = [(zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")]
    return Engine("DeepSpeed", zero["stage"] == 3, (devices[0] == "cpu", devices[1] == "cpu"), config)


def deepspeed_config(args: Seq2SeqTrainingArguments, processes: int) -> dict[str, Any]:
    """The settings of DeepSpeed, completed where its file sets nothing.

    Raises UserError if the file contradicts flags, naming each entry beside its flag.
    """
    file = args.deepspeed
    config = current_settings(read_config("deepspeed", file), file)
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        config.setdefault(name, "auto")
    for name in ("fp16", "bf16"):  # ZeRO-3 would take float32 without this
        config[name] = {"enabled": "auto"} | config.get(name, {})
    # The Trainer's AdamW is in order; and checkpoints need the gathered weights, not the shards.
    config["zero_allow_untested_optimizer"] = True
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"][GATHERS] = True
    compared = HfTrainerDeepSpeedConfig(config)
    compared.trainer_config_process(SimpleNamespace(**vars(args), world_size=processes))
    if args.max_steps > 0:  # else the number of steps is known only with the data
        compared.fill_match("scheduler.params.total_num_steps", args.max_steps, "max_steps")
        compared.fill_match(
            "scheduler.params.warmup_num_steps", max(1, args.get_warmup_steps(args.max_steps)), "warmup_steps"
        )
    found = "; ".join(line.removeprefix("- ds ") for line in compared.mismatches)
    if found:
        rows = f"per_device_train_batch_size x gradient_accumulation_steps x {processes} processes"
        found = found.replace("train_batch_size (calculated)", rows).replace("|", " or --")
        raise UserError(f'{file} says {found.replace(" vs hf ", ", but --")}: change one, or write "auto" there.')
    check_settings(compared.config, file)
    return config


def fsdp_config(args: Seq2SeqTrainingArguments) -> dict[str, Any]:
    """The settings of FSDP2. Raises UserError for FSDP1, and for checkpoints that would hold no model."""
    given = read_config("fsdp_config", args.fsdp_config)
    config = {name.removeprefix("fsdp_"): value for name, value in given.items()}
    if str(config.setdefault("version", 2)) != "2":
        raise UserError("--fsdp_config: version 1 is gone from today's libraries; FSDP2 is version 2.")
    if config.setdefault("state_dict_type", "FULL_STATE_DICT") != "FULL_STATE_DICT":
        raise UserError("--fsdp_config: state_dict_type must be FULL_STATE_DICT, or checkpoints would hold no model.")
    config["cpu_ram_efficient_loading"] = True  # as ``reads_weights`` says
    return config
