"""A name -> its checkpoint folder, checked -> tokenizer and model. Nothing in a checkpoint folder is ever executed."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import is_torch_bf16_gpu_available

from common.errors import UserError
from common.files import check_complete, read_json
from common.locking import guard
from common.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.prefix import attach_prefix, load_prefix, read_prefix
from common.tokenizers.chatglm import ChatGLMTokenizer

DEMOS = {"demo": Path(__file__).parent / "demo" / "chatglm"}
HUB_FILES = ["*.json", "*.bin", "*.safetensors", "*.model"]  # weights, config and vocabulary: never Python files


def resolve_model(name: str, revision: str = "main", cache_dir: str | None = None) -> Path:
    """The folder of a demo, of a folder's own path, or of a hub id, which is downloaded by one job at a time."""
    if name in DEMOS:
        return DEMOS[name]
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"no model folder {name}: give demo, an existing folder, or a hub id like THUDM/chatglm-6b.")
    try:
        with guard("model", name):
            return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name} is no folder and can't be downloaded ({reason}): "
            "give a folder, or set HF_ENDPOINT to a mirror that you can reach."
        ) from error


def check_config(folder: Path) -> None:
    """Raises UserError where config.json is missing or broken, or describes a model that is not supported."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json.")
    config = read_json(file)
    if config is None:
        raise UserError(f"{file} is no JSON object.")
    kind = config.get("model_type")
    if kind != "chatglm" or "inner_hidden_size" not in config:
        raise UserError(f"{file} describes a model of type {kind!r} that is not ChatGLM-6B, the one supported here.")
    if config.get("vocab_size") == 150528:
        raise UserError(
            f"{folder} is a ChatGLM-6B with the old vocabulary of 150,528 words: use a checkpoint with 130,528."
        )
    if config.get("quantization_bit"):
        raise UserError(
            f"{folder} holds weights that are packed in {config['quantization_bit']} bit: use the 16-bit checkpoint "
            "with --quantization_bit, which needs as little memory."
        )


def check_model_folder(folder: Path) -> None:
    """Config, vocabulary and complete weights are there. Reads file ends only. Raises UserError naming what is not."""
    check_config(folder)
    vocabulary = folder / ChatGLMTokenizer.vocab_files_names["vocab_file"]
    if not vocabulary.is_file():
        raise UserError(f"{folder} has no vocabulary: {vocabulary.name} is missing.")
    files = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.index.json"):
        content = read_json(index)
        if content is None or "weight_map" not in content:
            raise UserError(f"{index} is broken: copy or download it again.")
        files = [folder / name for name in sorted(set(content["weight_map"].values()))]
    if not files:
        raise UserError(f"{folder} has no weights: neither *.safetensors nor *.bin is there.")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though the index of {folder} names it.")
        check_complete(file)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizer:
    """The tokenizer of a demo, a checkpoint folder or a hub id."""
    return ChatGLMTokenizer.from_pretrained(resolve_model(str(path)))


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU, where half precision is slow; else bfloat16, or float16 where the device would emulate it."""
    if device.type == "cpu":
        return torch.float32
    module = torch.get_device_module(device)
    emulated = device.type == "cuda" and not module.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_torch_bf16_gpu_available() and not emulated else torch.float16


def quantization_config(bits: int | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization, or LLM.int8(); the output layer, tied to the embedding, stays as it is."""
    if bits is None:
        return None
    if bits not in (4, 8):
        raise UserError(f"--quantization_bit {bits}: only 4 and 8 exist.")
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    quantization_bit: int | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    ptuning_checkpoint: str | Path | None = None,
    config_path: str | Path | None = None,
) -> PreTrainedModel:
    """The model, in evaluation mode, with its prefix if one is asked for.

    A prefix is read from ``ptuning_checkpoint``, or from ``path`` if that holds base and prefix; its length and kind
    stand there. Where there is none, ``pre_seq_len`` makes a new, trainable one. Given both, they must agree.
    Raises UserError where they don't, and for an unusable folder.
    """
    folder = resolve_model(str(path))
    check_model_folder(folder)
    config = ChatGLMConfig.from_pretrained(resolve_model(str(config_path or folder)))
    try:
        model, report = ChatGLMForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            quantization_config=quantization_config(quantization_bit, dtype),
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"the weights in {folder} have other shapes than its config.json says.") from error
    if report["missing_keys"]:
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise UserError(f"{folder} is no whole model: {count} weights are missing, {first} among them.")
    if ptuning_checkpoint is None and config.pre_seq_len and read_prefix(folder):
        ptuning_checkpoint = folder  # an old full checkpoint, base and prefix in one
    if ptuning_checkpoint:
        load_prefix(model, ptuning_checkpoint, pre_seq_len, prefix_projection or None)
    elif pre_seq_len:
        attach_prefix(model, pre_seq_len, prefix_projection)
    return model
