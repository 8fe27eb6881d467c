"""The weights of a model folder -> the model, mapped and not read; nothing in the folder is executed."""

import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from common.errors import UserError
from common.models.quantization import PackedWeight, quantization_config, unpackable
from common.models.registry import ModelFolder, empty_model


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file, mapped. Raises UserError for a file that can't be read.

    A plain pickle (torch before 1.6) can't be mapped and is read.
    """
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a file that is no pickle fails in any way
        raise UserError(f"{file} can't be read ({type(error).__name__}): copy or download it again.") from error
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def packed_weights(folder: ModelFolder) -> dict[str, Tensor | PackedWeight]:
    """The weights of a packed checkpoint. Raises UserError if a scale is missing or a shape contradicts config.json.

    A wrong shape must be found here: quantized once more, it would pass unseen.
    """
    stored: dict[str, Tensor] = {}
    for file in folder.weights:
        stored |= read_weights(file)
    weights = unpackable(stored, folder.bits, folder.path)
    parameters = dict(empty_model(folder.spec, folder.config).named_parameters())
    for name, weight in weights.items():
        if isinstance(weight, PackedWeight) and name in parameters and weight.shape != parameters[name].shape:
            raise UserError(
                f"{folder.path}: {name} unpacks to {list(weight.shape)} with the {weight.bits} bit that config.json "
                f"says, and the model needs {list(parameters[name].shape)}."
            )
    return weights


def generation_config(folder: ModelFolder) -> GenerationConfig:
    """The defaults of generation: generation_config.json, or the fields of config.json."""
    if (folder.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder.path)
    return GenerationConfig.from_model_config(folder.config)


def load_base(
    folder: ModelFolder,
    dtype: torch.dtype = torch.float32,
    quantization_bit: int | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """The model of a folder in evaluation mode. Raises UserError if weights and config.json contradict each other.

    Processes of one machine share mapped weights that stay on the CPU in the dtype of the file. All others are
    unpacked, converted, moved to ``device`` and quantized one by one, so that the host never holds the whole model.
    ``quantization_bit``: None keeps the bits of a packed checkpoint. ``device``: None under ZeRO-3, which places them.
    """
    packed = packed_weights(folder) if folder.bits else None
    try:
        model, report = folder.spec.model.from_pretrained(
            None if packed else folder.path,
            state_dict=packed,
            config=folder.config,
            dtype=dtype,
            device_map=None if device is None else {"": torch.device(device)},
            quantization_config=quantization_config(quantization_bit or folder.bits, dtype),
            generation_config=generation_config(folder),
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"the weights in {folder.path} have other shapes than its config.json says.") from error
    if report["missing_keys"]:
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise UserError(f"{folder.path} is no whole model: {count} weights are missing, {first} among them.")
    model.generation_config.bos_token_id = folder.config.bos_token_id
    model.name_or_path = model.config.name_or_path = folder.name
    return model
