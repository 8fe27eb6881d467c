"""Full-parameter training: every weight is trained and saved under its original name."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from common.arguments import FullArguments
from common.errors import UserError
from common.files import read_json, write_json
from common.methods import Method
from common.methods.prefix import holds_prefix
from common.models.registry import ModelFolder, open_model
from common.models.weights import load_base, read_weights
from common.trained import base_of


class Full(Method):
    name = "full-parameter training"
    trains_base = True
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

    def __init__(self, args: FullArguments):
        self.args = args
        self.settings = {}

    def check(self, folder: ModelFolder, do_train: bool) -> None:
        check_without_prefix(folder)

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a folder that names its base; with its tokenizer beside it, it loads by itself."""
        as_bin = self.args.save_format == "bin"
        if as_bin and model.config.model_type == "chatglm":
            weights = model.original_state_dict(model.dtype, weights)
        model.config.base_model_name_or_path = model.name_or_path
        model.save_pretrained(folder, state_dict=weights)
        if as_bin:
            convert_to_bin(folder)

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Copies file by file, without a second model in memory."""
        for file in [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]:
            model.load_state_dict(read_weights(file), strict=False)

    @contextmanager
    def base(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The base that the model's config names, loaded beside the model."""
        named = vars(model.config).get("base_model_name_or_path")
        base = open_model(base_of(Path(model.name_or_path), named=named))
        yield load_base(base, model.dtype, device=model.device)


def check_without_prefix(folder: ModelFolder) -> None:
    """Raises UserError for an old checkpoint of base and prefix in one: trained apart, both would be spoilt."""
    if holds_prefix(folder):
        raise UserError(f"{folder.path} holds a prefix beside the model: only P-Tuning v2 can go on from there.")


def convert_to_bin(folder: Path) -> None:
    """Replaces safetensors files one by one by the .bin files that the original code reads."""
    renamed: dict[str, str] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        renamed[file.name] = f"pytorch_{file.stem}.bin"
        torch.save(load_file(file), folder / renamed[file.name])
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if content := read_json(index):
        content["weight_map"] = {name: renamed[file] for name, file in content["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", content)
        index.unlink()
