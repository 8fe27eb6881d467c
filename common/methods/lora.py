"""LoRA through PEFT: small trainable matrices beside frozen weights, saved as a standard adapter folder.

LoRA: Low-Rank Adaptation of Large Language Models, https://arxiv.org/abs/2106.09685
"""

import json
import re
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft import __version__ as PEFT_VERSION
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.arguments import LoraArguments, TrainingArguments
from common.errors import UserError
from common.files import write_json
from common.methods import Method, check_flags
from common.methods.adapter import BEGINNINGS, adapter_config
from common.methods.full import check_without_prefix
from common.models.registry import ModelFolder, empty_model

# PEFT uses the name that this property had in transformers 4.
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")

# What PEFT 0.10 knows, the oldest that the official ChatGLM3 demo takes: it refuses other keys.
OLD_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "bias"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "fan_in_fan_out", "init_lora_weights"),
    *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("loftq_config", "megatron_config", "megatron_core", "layer_replication"),
}
ADAPTER_DEFAULTS = {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False}  # of PEFT, for keys that are missing


class Lora(Method):
    args: LoraArguments
    name = "LoRA"
    trains_base = False
    files = ("adapter_model.safetensors",)

    def check(self, folder: ModelFolder, do_train: bool) -> None:
        check_without_prefix(folder)
        if checkpoint := self.args.lora_checkpoint:
            config, model = adapter_config(checkpoint), empty_model(folder.spec, folder.config)
            layers = linear_names(model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about weights, which are lost on the meta device
                load_adapter(model, checkpoint)
            stored = {"lora_rank": config["r"], "lora_alpha": config["lora_alpha"]}
            stored |= {name: config.get(name, default) for name, default in ADAPTER_DEFAULTS.items()}
            stored["lora_target"] = target_text(config["target_modules"], layers)
            given = self.args.lora_target and target_text(self.args.lora_target.split(","), layers)
            check_flags(f"the adapter in {checkpoint}", stored, replace(self.args, lora_target=given))

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Freezes the model and adds a trained or a new adapter, in float32."""
        if self.args.lora_checkpoint:
            return load_adapter(model, self.args.lora_checkpoint)
        return attach_lora(model, self.args)

    def save(self, model: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes adapter_config.json, without keys that say nothing new to PEFT, and adapter_model.safetensors.

        Without ``save_embedding_layers=False`` PEFT asks the hub whether the vocabulary was extended; it never is.
        """
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)
        (folder / "README.md").unlink()  # a card without a word: report/card.py writes one
        file, defaults = folder / "adapter_config.json", LoraConfig().to_dict() | {"peft_version": PEFT_VERSION}
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name in OLD_KEYS or value != defaults.get(name)}
        write_json(file, kept)

    def restore(self, model: PeftModel, folder: Path) -> None:
        set_peft_model_state_dict(model, load_peft_weights(str(folder), device=str(model.device)))

    @contextmanager
    def base(self, model: PeftModel) -> Iterator[PeftModel]:
        with model.disable_adapter():
            yield model

    def more(self, model: PeftModel, folder: Path) -> Callable[[], AbstractContextManager[PeftModel]]:
        begins = str(adapter_config(folder).get("init_lora_weights"))
        if BEGINNINGS.fullmatch(begins) and begins != "gaussian":
            raise UserError(f"{folder}: an adapter that began by {begins} changes the base model: serve it alone.")
        name = f"adapter {len(model.peft_config)}"
        load_adapter(model, folder, name)
        return partial(with_adapter, model, name)

    def optimizer(self, model: PeftModel, args: TrainingArguments) -> torch.optim.Optimizer | None:
        """LoRA+, https://arxiv.org/abs/2402.12354: the B matrices learn ``loraplus_lr_ratio`` times faster than A."""
        if self.args.loraplus_lr_ratio is None:
            return None
        return create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=args.learning_rate,
            loraplus_lr_ratio=self.args.loraplus_lr_ratio,
            loraplus_weight_decay=args.weight_decay,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )


@contextmanager
def with_adapter(model: PeftModel, name: str) -> Iterator[PeftModel]:
    """A context in which the model has another of its adapters."""
    own = model.active_adapter
    model.set_adapter(name)
    try:
        yield model
    finally:
        model.set_adapter(own)


def target_text(targets: str | Collection[str], layers: set[str]) -> str:
    """The layers that an adapter changes, in the form of --lora_target: last parts of their names, or a pattern.

    ``layers``: the names of the model's linear layers.
    """
    if isinstance(targets, str) and targets != "all-linear":
        return targets
    every = layers - {"lm_head", "output_layer"}
    names = every if "all-linear" in targets else {name.strip().rpartition(".")[2] for name in targets}
    return ",".join(sorted(names))


def check_targets(folder: str | Path, targets: str | Collection[str], model: PreTrainedModel) -> None:
    """Raises UserError for an adapter that changes other layers than the model has."""
    if isinstance(targets, str):
        if targets != "all-linear" and not fits(targets, model):
            listed = json.dumps([name.strip() for name in targets.split(",")])
            raise UserError(
                f"{Path(folder) / 'adapter_config.json'}: target_modules is the text {targets!r}, which PEFT reads as "
                f"a pattern of whole names, and no layer's name fits: write a list, as {listed}."
            )
        return
    known = linear_names(model)
    if foreign := {name.rpartition(".")[2] for name in targets} - known:
        raise UserError(
            f"the adapter in {folder} belongs to another model: it changes {', '.join(sorted(foreign))}, "
            f"and this one has {', '.join(sorted(known))}."
        )


def fits(pattern: str, model: nn.Module) -> bool:
    """Whether the whole name of a module fits a pattern; False for a broken pattern."""
    try:
        return any(re.fullmatch(pattern, name) for name, _ in model.named_modules())
    except re.error:
        return False


def linear_names(model: nn.Module) -> set[str]:
    """Names of the linear layers, last part only."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def attach_lora(model: PreTrainedModel, args: LoraArguments) -> PeftModel:
    """The frozen model with a new adapter, float32 and trainable. Raises UserError for a layer that does not exist."""
    default = "query_key_value" if model.config.model_type == "chatglm" else "q_proj,k_proj,v_proj"
    targets = [name.strip() for name in (args.lora_target or default).split(",")]
    known = linear_names(model)
    for name in targets if targets != ["all-linear"] else ():
        if name.rpartition(".")[2] not in known:
            there = ", ".join(sorted(known))
            raise UserError(f"--lora_target: the model has no linear layer {name}; there are {there}, or all-linear.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=targets if targets != ["all-linear"] else "all-linear",
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
    )
    return get_peft_model(model, config)


def load_adapter(model: PreTrainedModel, folder: str | Path, name: str = "default") -> PeftModel:
    """The model with a saved adapter of PEFT; ``name``: of another one beside it.

    Raises UserError for the adapter of another model.
    """
    targets, beside = adapter_config(folder)["target_modules"], isinstance(model, PeftModel)
    if not beside:
        check_targets(folder, targets, model)
    try:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False  # it may be trained further
        config.auto_mapping = None  # which names a module to import
        if model.device.type == "meta":  # other ways to begin would compute with the model's weights
            config.init_lora_weights = True
        config.base_model_name_or_path = model.name_or_path  # where the base is now
        adapted: Any = model if beside else get_peft_model(model, config)
        if beside:
            adapted.add_adapter(name, config)
    except (TypeError, ValueError, NotImplementedError) as error:
        detail = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{Path(folder) / 'adapter_config.json'}: PEFT can't use it: {detail}.") from error
    try:
        result: Any = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"), name)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        detail = next(line.strip() for line in str(error).splitlines() if "size mismatch" in line)
        raise UserError(f"the adapter in {folder} belongs to a model of another size: {detail}") from error
    misfits = [*result.unexpected_keys, *(key for key in result.missing_keys if "lora_" in key and f".{name}." in key)]
    if misfits:
        raise UserError(f"the adapter in {folder} belongs to another model: {misfits[0]} does not fit.")
    return adapted.eval()
