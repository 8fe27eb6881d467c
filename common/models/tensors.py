"""The tensors of weight files: read, and checked for what other libraries have quantized."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from common.errors import UserError, note
from common.files import check_complete, read_json

# What GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 store beside or instead of a weight.
PACKED = ("qweight", "qzeros", "g_idx", "absmax", "quant_state", "SCB", "weight_packed", "weight_scale_inv")
PACKED_NAME = re.compile(rf"\.({'|'.join(PACKED)})\b")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .bin file, mapped. Raises UserError for a file that can't be read.

    A plain pickle (torch before 1.6) can't be mapped and is read.
    """
    check_complete(file)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, KeyError, RuntimeError) as error:  # of a dtype that torch does not have
            raise UserError(f"{file} can't be read ({type(error).__name__}): copy or download it again.") from error
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a file that is no pickle fails in any way
        raise UserError(f"{file} can't be read ({type(error).__name__}): copy or download it again.") from error
    if not isinstance(stored, dict):
        raise UserError(f"{file} holds a {type(stored).__name__}, not weights by their names: save a state_dict().")
    tensors = {name: tensor for name, tensor in stored.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{file}: {name} claims more numbers than the file holds: copy or download it again.")
    return tensors


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """The shape of each tensor of a weight file. Raises UserError like ``read_weights``."""
    check_complete(file)
    if file.suffix != ".safetensors":
        return {name: list(tensor.shape) for name, tensor in read_weights(file).items()}
    with safe_open(file, "pt") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118


def check_not_quantized(path: Path, content: dict[str, Any], weights: tuple[Path, ...]) -> None:
    """Raises UserError for weights that another library has quantized; notes a setting that was left over.

    Merging and saving often leaves ``quantization_config`` in the config.json of 16-bit weights. ``weights``: empty
    for weights that are still on the hub: then only the setting tells.
    """
    settings = content.get("quantization_config") or read_json(path / "quantize_config.json") or {}
    if not settings or not isinstance(settings, dict):
        return
    kind = settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "gptq")
    stored = next((name for file in weights for name in tensor_shapes(file) if PACKED_NAME.search(name)), "")
    if stored or not weights and kind != "bitsandbytes":
        raise UserError(
            f"{path} holds weights quantized by {kind}{stored and f' ({stored})'}, which can't be read: take the model "
            "with 16-bit weights; QUANTIZATION_BIT=4 (--quantization_bit 4) quantizes it while it is loaded."
        )
    if weights:
        note(f"note: the quantization_config of {path} is ignored: its weights are not quantized.")
