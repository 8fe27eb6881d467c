"""Full-parameter training: every weight is trained and saved under its original name."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from common.arguments import FullArguments
from common.errors import UserError
from common.methods import Method
from common.methods.prefix import holds_prefix
from common.models.registry import ModelFolder
from common.models.tensors import read_weights


class Full(Method):
    args: FullArguments
    name = "full-parameter training"
    trains_base = True
    files = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

    def check(self, folder: ModelFolder, do_train: bool) -> None:
        check_without_prefix(folder)

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a folder that names its base; with its tokenizer beside it, it loads by itself."""
        model.config.base_model_name_or_path = model.name_or_path
        if weights:  # a head that is the embedding was gathered a second time
            weights = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
        if self.args.save_format == "safetensors":
            model.save_pretrained(folder, state_dict=weights)
            return
        if model.config.model_type == "chatglm":
            weights = model.original_state_dict(model.dtype, weights)
        model.save_pretrained(folder, state_dict=weights, max_shard_size="1TB")  # one file
        stored = load_file(folder / "model.safetensors")
        stored |= {name: stored[source] for name, source in model.all_tied_weights_keys.items()}
        torch.save(stored, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        """Copies file by file, without a second model in memory."""
        for file in [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]:
            model.load_state_dict(read_weights(file), strict=False)


def check_without_prefix(folder: ModelFolder) -> None:
    """Raises UserError for an old checkpoint of base and prefix in one: trained apart, both would be spoilt."""
    if holds_prefix(folder):
        raise UserError(f"{folder.path} holds a prefix beside the model: only P-Tuning v2 can go on from there.")
