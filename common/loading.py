"""A name -> its checkpoint folder, checked -> tokenizer and model. Nothing in a checkpoint folder is ever executed."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import UserError
from common.files import check_complete, weight_files
from common.hub.download import download, fetch_small_files
from common.hub.hubs import hub_id, is_hub_name
from common.methods.prefix import attach_prefix, check_prefix, load_prefix, read_prefix
from common.models.quantization import PackedWeight, packed_bits, packed_weights, quantization_config
from common.models.registry import empty_model, generation_of
from common.models.weights import weights_folder

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMOS = {"demo": DEMO_FOLDER / "chatglm", "demo3": DEMO_FOLDER / "chatglm3"}


def resolve_model(name: str, revision: str = "main", cache_dir: str | None = None) -> Path:
    """The folder of a demo, of a folder's own path, or of a model on a hub, which is downloaded if need be."""
    if name in DEMOS:
        return DEMOS[name]
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise UserError(
            f"no model folder {name}: give demo, demo3, an existing folder, a name like chatglm3-6b, or a hub id like "
            "THUDM/chatglm3-6b."
        )
    generation_of(fetch_small_files(name, revision, cache_dir))  # refuses what is not supported before gigabytes come
    return download(name, revision, cache_dir)


def check_model_folder(folder: Path) -> None:
    """Config, vocabulary and complete weights are there. Reads file ends only. Raises UserError naming what is not."""
    generation = generation_of(folder)
    if not (folder / generation.vocabulary).is_file():
        others = [name for name in ("ice_text.model", "tokenizer.model", "tokenizer.json") if (folder / name).is_file()]
        mixed = f" ({others[0]} belongs to another generation)" if others else ""
        raise UserError(
            f"{folder} is a {generation.name} without its vocabulary: {generation.vocabulary} is missing{mixed}."
        )
    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder} has no weights: neither *.safetensors nor *.bin is there.")
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, though the index of {folder} names it.")
        check_complete(file)
    if packed_bits(folder):
        check_packed_shapes(folder)


def check_packed_shapes(folder: Path) -> None:
    """Raises UserError for packed weights that don't fit config.json: once quantized again nobody would notice."""
    generation = generation_of(folder)
    parameters = dict(empty_model(generation.model, generation.config.from_pretrained(folder)).named_parameters())
    for name, weight in packed_weights(folder).items():
        if isinstance(weight, PackedWeight) and name in parameters and weight.shape != parameters[name].shape:
            raise UserError(
                f"{folder}: {name} unpacks to {list(weight.shape)} with the {weight.bits} bit that config.json says, "
                f"and the model needs {list(parameters[name].shape)}."
            )


def check_takes_prefix(folder: Path) -> None:
    """Raises UserError for a model whose code is not ours: it has no place for a prefix."""
    generation = generation_of(folder)
    if generation.key == "glm":
        raise UserError(f"P-Tuning v2 is for ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B; {folder} is a {generation.name}.")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a demo, a checkpoint folder or a hub id. Raises UserError for one of another generation."""
    folder = resolve_model(str(path))
    generation = generation_of(folder)
    if generation.key == "glm":
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, padding_side="left")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer
    try:
        tokenizer = generation.tokenizer.from_pretrained(folder)
    except RuntimeError as error:
        vocabulary = folder / generation.vocabulary
        raise UserError(f"{vocabulary} is no vocabulary of {generation.name}: copy or download it again.") from error
    rows = generation.config.from_pretrained(folder).vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{folder} mixes files of different models: {generation.vocabulary} has {tokenizer.vocab_size:,} tokens "
            f"and the model {rows:,}."
        )
    return tokenizer


def generation_config(folder: Path) -> GenerationConfig:
    """The defaults of generation: generation_config.json, or what config.json says of them."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def load_base(
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    quantization_bit: int | None,
    device: torch.device | str | None,
) -> PreTrainedModel:
    """The model of a folder, without prefix and adapter. Raises UserError where weights and config do not fit.

    The weights are mapped, not read: those that stay on the CPU in the dtype that they are stored in are shared by
    all processes of the machine, and the others are unpacked, converted, moved and quantized one by one.
    """
    packed = packed_weights(folder) if packed_bits(folder) else None
    try:
        model, report = generation_of(folder).model.from_pretrained(
            None if packed else weights_folder(folder),
            state_dict=packed,
            config=config,
            dtype=dtype,
            device_map=None if device is None else {"": torch.device(device)},
            quantization_config=quantization_config(quantization_bit, dtype),
            generation_config=GenerationConfig(),  # the folder's own follows; there is none beside converted weights
            output_loading_info=True,
        )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UserError(f"the weights in {folder} have other shapes than its config.json says.") from error
    if report["missing_keys"]:
        first, count = min(report["missing_keys"]), len(report["missing_keys"])
        raise UserError(f"{folder} is no whole model: {count} weights are missing, {first} among them.")
    model.generation_config = generation_config(folder)
    model.generation_config.bos_token_id = config.bos_token_id
    return model


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    quantization_bit: int | None = None,
    pre_seq_len: int | None = None,
    prefix_projection: bool = False,
    ptuning_checkpoint: str | Path | None = None,
    adapter: str | Path | None = None,
    config_path: str | Path | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """The model, in evaluation mode, with its prefix or its LoRA adapter if one is asked for.

    A prefix is read from ``ptuning_checkpoint``, or from ``path`` if that holds base and prefix; its length and kind
    stand there. Where there is none, ``pre_seq_len`` makes a new, trainable one. Given both, they must agree.
    ``name``: what adapter and prefix shall remember as their base, where it is not ``path``.
    ``device``: where the weights go, one by one, so that the host never holds the model; default: they stay on the
    CPU. Not to be given under ZeRO-3, where DeepSpeed places them.
    Raises UserError where something does not fit, and for an unusable folder.
    """
    folder = resolve_model(str(path))
    check_model_folder(folder)
    if adapter and (ptuning_checkpoint or pre_seq_len):
        raise UserError("a model takes a LoRA adapter or a prefix, not both.")
    if adapter:
        from common.methods.lora import adapter_config, load_adapter  # with PEFT, which takes two seconds to import

        adapter_config(adapter)
    if ptuning_checkpoint:
        check_prefix(ptuning_checkpoint, pre_seq_len, prefix_projection or None)
    generation = generation_of(folder)
    config = generation.config.from_pretrained(resolve_model(str(config_path or folder)))
    if generation.key in ("chatglm2", "chatglm3"):
        config.generation = generation.key
    model = load_base(folder, config, dtype, quantization_bit or packed_bits(folder), device)
    model.name_or_path = model.config.name_or_path = lasting_name(name or str(path))
    if adapter:
        return load_adapter(model, adapter)
    stored_length = None if generation.key == "glm" else config.pre_seq_len
    if ptuning_checkpoint is None and stored_length and read_prefix(folder):
        ptuning_checkpoint = folder  # an old full checkpoint, base and prefix in one
    if ptuning_checkpoint or pre_seq_len:
        check_takes_prefix(folder)
    if ptuning_checkpoint:
        load_prefix(model, ptuning_checkpoint, pre_seq_len, prefix_projection or None)
    elif pre_seq_len:
        attach_prefix(model, pre_seq_len, prefix_projection)
    return model


def lasting_name(name: str) -> str:
    """A name that will mean the same model from any working directory, and to other programs."""
    if name not in DEMOS and Path(name).is_dir():
        return str(Path(name).resolve())
    return hub_id(name) if is_hub_name(name) else name


def is_base(name: str) -> bool:
    """Whether a name can be that of a model: a demo's, a folder's, or one on a hub."""
    return name in DEMOS or bool(name) and Path(name).is_dir() or is_hub_name(name)


def base_of_adapter(folder: str | Path, override: str | None = None) -> str:
    """The base model that an adapter names, or the one given instead. Raises UserError where it is no longer there."""
    from common.methods.lora import adapter_config

    named = adapter_config(folder).get("base_model_name_or_path") or ""
    base = override or named
    if is_base(base):
        return base
    raise UserError(
        f"the base model of {folder} is not at {base or 'any place that it names'}: set MODEL (--model_name_or_path) "
        "to where it is now, or base_model_name_or_path in adapter_config.json."
    )
