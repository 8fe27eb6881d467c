"""The fine-tuning methods: what each trains, saves and reads back. Everything else is shared."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from common.arguments import FullArguments, LoraArguments, PrefixArguments, TrainingArguments
from common.errors import UserError
from common.files import read_json, write_json
from common.loading import check_takes_prefix, load_model
from common.methods.lora import (
    attach_lora,
    check_adapter,
    loraplus_optimizer,
    restore_lora,
    save_lora,
    without_lora,
)
from common.methods.prefix import check_prefix, read_prefix, restore_prefix, save_prefix, without_prefix
from common.models.registry import read_config
from common.models.weights import read_bin

Weights = dict[str, Tensor] | None


@dataclass(frozen=True)
class Method:
    name: str
    settings: dict[str, Any]  # what a continued training must share with its beginning
    trains_base: bool  # whether the model's own weights are trained, in float32 then
    check: Callable[[Path, bool], None]  # (model's folder, whether to train): raises UserError for what can't work
    load_flags: dict[str, Any]  # flags of load_model
    save: Callable[[PreTrainedModel, Path, Weights], None]  # writes what was trained, out of gathered weights if given
    restore: Callable[[PreTrainedModel, Path], None]  # reads it back into the same model, to resume
    base: Callable[[PreTrainedModel], AbstractContextManager[PreTrainedModel]]  # the model without it
    files: tuple[str, ...]  # names of what ``save`` writes, of which one is there
    attach: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model  # what load_model has not attached
    optimizer: Callable[[PreTrainedModel, TrainingArguments], torch.optim.Optimizer] | None = None


def p_tuning(args: PrefixArguments) -> Method:
    """P-Tuning v2: keys and values in front of every layer."""

    def check(folder: Path, do_train: bool) -> None:
        check_takes_prefix(folder)
        if args.ptuning_checkpoint:
            check_prefix(args.ptuning_checkpoint, args.pre_seq_len, args.prefix_projection or None)
        elif do_train and not args.pre_seq_len:
            raise UserError(
                "--do_train needs --pre_seq_len, the number of virtual tokens to train (full/main.py trains weights)."
            )
        elif args.pre_seq_len and not do_train:
            raise UserError("--pre_seq_len makes an untrained prefix: give --ptuning_checkpoint to evaluate one.")

    return Method(
        name="P-Tuning v2",
        settings=vars(args),
        trains_base=False,
        check=check,
        load_flags=vars(args),
        save=save_prefix,
        restore=restore_prefix,
        base=without_prefix,
        files=("pytorch_model.bin",),
    )


def lora(args: LoraArguments) -> Method:
    """LoRA: small matrices beside frozen ones."""

    def check(folder: Path, do_train: bool) -> None:
        check_without_prefix(folder)
        if args.lora_checkpoint:
            check_adapter(args.lora_checkpoint, args)

    return Method(
        name="LoRA",
        settings=vars(args),
        trains_base=False,
        check=check,
        load_flags={"adapter": args.lora_checkpoint},
        attach=lambda model: model if args.lora_checkpoint else attach_lora(model, args),
        save=save_lora,
        restore=restore_lora,
        base=without_lora,
        optimizer=partial(loraplus_optimizer, ratio=args.loraplus_lr_ratio) if args.loraplus_lr_ratio else None,
        files=("adapter_model.safetensors",),
    )


def full(args: FullArguments) -> Method:
    """Full-parameter training: every weight, saved under its original name."""
    return Method(
        name="full-parameter training",
        settings={},
        trains_base=True,
        check=lambda folder, do_train: check_without_prefix(folder),
        load_flags={},
        save=partial(save_full, as_bin=args.save_format == "bin"),
        restore=restore_full,
        base=reload_base,
        files=(
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
        ),
    )


def check_without_prefix(folder: Path) -> None:
    """Raises UserError for an old checkpoint of base and prefix in one: training one without the other spoils both."""
    if read_config(folder).get("pre_seq_len") and read_prefix(folder):
        raise UserError(f"{folder} holds a prefix beside the model: only P-Tuning v2 can go on from there.")


def save_full(model: PreTrainedModel, folder: Path, weights: Weights = None, as_bin: bool = False) -> None:
    """A folder that loads by itself, but for the tokenizer, which is saved beside it; it names its base."""
    if as_bin and model.config.model_type == "chatglm":
        weights = model.original_state_dict(model.dtype, weights)
    model.config.base_model_name_or_path = model.name_or_path
    model.save_pretrained(folder, state_dict=weights)
    if as_bin:
        convert_to_bin(folder)


def convert_to_bin(folder: Path) -> None:
    """Safetensors files -> the .bin files that the original code reads, one after the other."""
    for file in sorted(folder.glob("model*.safetensors")):
        torch.save(load_file(file), folder / bin_name(file.name))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if content := read_json(index):
        content["weight_map"] = {name: bin_name(file) for name, file in content["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", content)
        index.unlink()


def bin_name(name: str) -> str:
    return f"pytorch_{name.removesuffix('.safetensors')}.bin"


def restore_full(model: PreTrainedModel, folder: Path) -> None:
    """Copies saved weights into the model, file by file, without a second model in memory."""
    for file in [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]:
        weights = load_file(file) if file.suffix == ".safetensors" else read_bin(file)
        model.load_state_dict(weights, strict=False)


@contextmanager
def reload_base(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model that a trained one began as, which stands in its config."""
    base = vars(model.config).get("base_model_name_or_path")
    if base is None:
        raise UserError(f"--evaluate_base: {model.name_or_path} does not say from which model it was trained.")
    yield load_model(base, model.dtype, device=model.device)
