"""The weights of a model folder -> the model. Maps them instead of reading them; executes nothing in the folder."""

import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from common.errors import UserError, note
from common.models.products import use_onednn
from common.models.quantization import PackedWeight, allow_reordering, quantization_config
from common.models.registry import ModelFolder, check_amount, empty_model, read_generation
from common.models.tensors import read_weights

LARGE = 2e9  # bytes of weights that are read long enough for a bar


def packed_weights(folder: ModelFolder) -> dict[str, Tensor | PackedWeight]:
    """The weights of a packed checkpoint. Raises UserError if bits, a scale or a shape contradict config.json.

    Only this check finds a wrong shape: quantizing the weights once more would hide it.
    """
    bits, stored = folder.bits, dict[str, Tensor]()
    if bits not in (4, 8):
        raise UserError(f"{folder.path / 'config.json'}: quantization_bit is {bits}; only 4 and 8 exist.")
    for file in folder.weights:
        stored |= read_weights(file)
    weights: dict[str, Any] = {name: x for name, x in stored.items() if not name.endswith(".weight_scale")}
    parameters = dict(empty_model(folder.spec, folder.config).named_parameters())
    for name in [name for name, x in weights.items() if x.dtype == torch.int8]:
        tensor, scale = stored[name], stored.get(f"{name}_scale")
        if scale is None or scale.shape != tensor.shape[:1]:
            found = "is missing" if scale is None else f"has {scale.numel():,} values for {len(tensor):,} rows"
            raise UserError(
                f"{folder.path} can't be unpacked: {name}_scale {found}; copy or download the checkpoint again."
            )
        weights[name] = weight = PackedWeight(tensor, scale, bits)
        if name in parameters and weight.shape != parameters[name].shape:
            raise UserError(
                f"{folder.path}: {name} unpacks to {list(weight.shape)} with the {bits} bit that config.json "
                f"names, and the model needs {list(parameters[name].shape)}."
            )
    return weights


def plain_weights(folder: ModelFolder, tied: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights of all files, mapped, without those that are ``tied`` to another and would be converted in vain.

    Vectors are copied: those that need no conversion would keep all their file mapped.
    """
    stored = {name: tensor for file in folder.weights for name, tensor in read_weights(file).items()}
    return {name: x if x.ndim > 1 else x.clone() for name, x in stored.items() if tied.get(name) not in stored}


def load_base(
    folder: ModelFolder,
    dtype: torch.dtype = torch.float32,
    quantization_bit: int | None = None,
    device: torch.device | str | None = None,
    read: bool = True,
    trained: bool = False,
) -> PreTrainedModel:
    """The model of a folder in evaluation mode. Raises UserError if weights and config.json contradict each other.

    Processes of one machine share mapped weights that stay on the CPU in the dtype of the file. All others are
    unpacked, converted, moved to ``device`` and quantized one by one, so that the host never holds the whole model.
    ``quantization_bit``: None keeps the bits of a packed checkpoint. ``device``: None under ZeRO-3, which places them.
    ``read``: False gives weights without content, as FSDP2 wants them in all processes but the first. ``trained``:
    whether gradients will pass through the model.
    """
    use_onednn()
    generation = read_generation(folder.path, folder.config)
    if read:
        model = read_base(folder, dtype, quantization_bit, device, generation)
    else:
        model = unread_base(folder, dtype, generation)
    if (quantization_bit or folder.bits) == 4:
        allow_reordering(model, trained)
    model.generation_config.bos_token_id = folder.config.bos_token_id
    model.name_or_path = model.config.name_or_path = folder.name
    return model


def read_base(
    folder: ModelFolder,
    dtype: torch.dtype,
    quantization_bit: int | None,
    device: torch.device | str | None,
    generation: GenerationConfig,
) -> PreTrainedModel:
    """The model with its weights, as ``load_base`` says."""
    check_amount(folder)
    large = sum(file.stat().st_size for file in folder.weights) > LARGE
    (enable_progress_bar if large and sys.stderr.isatty() else disable_progress_bar)()
    empty = empty_model(folder.spec, folder.config)
    stored = packed_weights(folder) if folder.bits else plain_weights(folder, empty.all_tied_weights_keys)
    try:
        model, info = type(empty).from_pretrained(
            None,
            state_dict=stored,
            config=folder.config,
            dtype=dtype,
            device_map=None if device is None else {"": torch.device(device)},
            quantization_config=quantization_config(quantization_bit or folder.bits, dtype),
            generation_config=generation,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"the weights in {folder.path} have other shapes than its config.json says.") from error
    if info["missing_keys"]:
        first, count = min(info["missing_keys"]), len(info["missing_keys"])
        raise UserError(f"{folder.path} is no complete model: {count} weights are missing, {first} among them.")
    if unknown := sorted(info["unexpected_keys"]):
        names = f"{', '.join(unknown[:3])}{', …' * (len(unknown) > 3)}"
        note(f"note: {len(unknown)} weights in {folder.path} are not read, because the model has none of them: {names}")
    return model


def unread_base(folder: ModelFolder, dtype: torch.dtype, generation: GenerationConfig) -> PreTrainedModel:
    """The model with its buffers and with weights in memory that was never written to, and so takes none.

    They have addresses, unlike those on the meta device: Accelerate finds the weights of an optimizer by them.
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(deepcopy(folder.config), dtype=dtype)
    model.tie_weights()
    model.generation_config = generation
    return model.eval()
