"""The three methods of fine-tuning, one class each, with the same order of definitions; all else is shared."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import UserError
from common.models.registry import ModelFolder


def check_flags(trained: str, stored: Mapping[str, Any], args: Any) -> None:
    """Raises UserError if a given flag differs from the value in ``stored``, with which ``trained`` was trained."""
    for flag, value in stored.items():
        given = vars(args)[flag]
        if given not in (vars(type(args)())[flag], value):
            raise UserError(f"{trained} was trained with --{flag} {value}, not {given}: leave it out.")


class Method(Protocol):
    """The parts in which methods differ; only ``optimizer`` has a default."""

    name: str
    trains_base: bool  # whether the model's own weights are trained
    files: tuple[str, ...]  # names that save() may write; one of them exists afterwards
    args: Any  # its flags, an object of its dataclass

    def __init__(self, args: Any):
        self.args = args

    def check(self, folder: ModelFolder, do_train: bool) -> None:
        """Raises UserError for flags that can't work with this model, before it is loaded."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with its trained or new parameters. Raises UserError if trained ones do not fit."""

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes the trained parameters; under ZeRO and FSDP ``weights`` are the gathered ones."""

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Reads saved parameters back into the same model."""

    def base(self, model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
        """A context that gives the model without the trained parameters; full training keeps no base in memory."""
        raise NotImplementedError

    def more(self, model: PreTrainedModel, folder: Path) -> Callable[[], AbstractContextManager[PreTrainedModel]]:
        """Reads other trained parameters beside the attached ones. Returns a context that gives the model with them."""
        raise NotImplementedError

    def optimizer(self, model: PreTrainedModel, args: Any) -> torch.optim.Optimizer | None:
        """The method's own optimizer; None: the one that the training arguments name."""
        return None
