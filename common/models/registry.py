"""Model name -> ``ModelFolder``: which model of the ChatGLM family it is, read from config.json alone, once."""

import inspect
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from common.errors import UserError
from common.files import LARGEST_TEXT, TEXTS, WHOLE_FILES, check_complete, check_no_text, read_json, weight_files
from common.hub.download import download, find_complete
from common.hub.hubs import hub_id, is_hub_name
from common.models import chatglm, chatglm2, glm4
from common.models.tensors import check_not_quantized
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer

PICTURE_KEYS = {"vision_config", "eva_config", "qformer_config", "image_length", "image_size", "boi_token_id"}
DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"
OTHER_WEIGHTS = (
    *(".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx"),
    *(".incomplete", ".aria2", ".crdownload", ".part"),  # of downloads that were broken off
)
RANGES: dict[str, tuple[float, float]] = {  # of numbers in config.json and generation_config.json, wider than any known
    **dict.fromkeys(("num_layers", "num_hidden_layers"), (1, 1000)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "multi_query_group_num"), (1, 4096)),
    **dict.fromkeys(("kv_channels", "head_dim"), (4, 4096)),
    "hidden_size": (1, 2**16),
    **dict.fromkeys(("inner_hidden_size", "ffn_hidden_size", "intermediate_size"), (1, 2**20)),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), (1, 2**22)),
    **dict.fromkeys(("max_sequence_length", "seq_length", "max_position_embeddings"), (1, 2**30)),
    **dict.fromkeys(("max_length", "max_new_tokens"), (1, 2**30)),
    **dict.fromkeys(("min_length", "min_new_tokens", "pre_seq_len"), (0, 2**16)),
    **dict.fromkeys(("layernorm_epsilon", "rms_norm_eps"), (1e-12, 1.0)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), (0.0, 1.0)),
    "rope_ratio": (1e-3, 1e6),
    "rope_theta": (1.0, 1e12),
    "partial_rotary_factor": (0.01, 1.0),
    "initializer_range": (0.0, 10.0),
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**22),
    "repetition_penalty": (0.0, 100.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, 64)),
    "no_repeat_ngram_size": (0, 1000),
}
NO_SETTINGS = (  # of a model that writes text
    *("quantization_config", "num_labels", "id2label", "label2id", "attribute_map", "sub_configs", "per_layer_config"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
DEMOS = {"demo": DEMO_FOLDER / "chatglm", "demo3": DEMO_FOLDER / "chatglm3"}


class ModelSpec(NamedTuple):
    """A model of the family: its classes, and the file of its vocabulary."""

    key: str
    name: str
    config: Any
    model: Any
    tokenizer: Any
    vocabulary: str


FIRST, SECOND = chatglm.ChatGLMForConditionalGeneration, chatglm2.ChatGLMForConditionalGeneration
SPECS = {
    spec.key: spec
    for spec in (
        ModelSpec("chatglm", "ChatGLM-6B", chatglm.ChatGLMConfig, FIRST, ChatGLMTokenizer, "ice_text.model"),
        ModelSpec("chatglm2", "ChatGLM2-6B", chatglm2.ChatGLMConfig, SECOND, ChatGLM2Tokenizer, "tokenizer.model"),
        ModelSpec("chatglm3", "ChatGLM3-6B", chatglm2.ChatGLMConfig, SECOND, ChatGLM3Tokenizer, "tokenizer.model"),
        ModelSpec("chatglm4", "GLM-4", chatglm2.ChatGLMConfig, SECOND, ChatGLM4Tokenizer, "tokenizer.model"),
        ModelSpec("glm", "GLM-4", AutoConfig, AutoModelForCausalLM, AutoTokenizer, "tokenizer.json"),
    )
}


@dataclass(frozen=True)
class ModelFolder:
    """A model, opened and checked: every part of the program takes this value and opens nothing again."""

    name: str  # an absolute path, a demo, or a hub id; adapters and prefixes record it as their base
    path: Path
    spec: ModelSpec
    config: PreTrainedConfig
    bits: int | None  # 4 or 8: the weights are packed as the original code packs them
    weights: tuple[Path, ...]  # weight files; empty: they are still on the hub
    revision: str = "main"
    cache_dir: str | None = None


def open_model(
    name: str | Path | ModelFolder, revision: str = "main", cache_dir: str | None = None, config_name: str | None = None
) -> ModelFolder:
    """Opens a demo, a folder, or a model on a hub. Downloads only small files, and reads only the ends of weight files.

    ``config_name``: another model, whose config.json counts instead. Raises UserError for a model that is not
    supported or not complete.
    """
    if isinstance(name, ModelFolder):
        return name
    name = str(name)
    complete: Path | None  # the folder, if its weights are here
    if is_local(name):
        complete = path = DEMOS.get(name) or Path(name)
        lasting_name = name if name in DEMOS else str(path.resolve())
    elif os.path.lexists(name):
        kind = "a file" if Path(name).is_file() else f"a link to {os.path.realpath(name)}, which is no folder"
        raise UserError(f"{name} is {kind}: MODEL (--model_name_or_path) is the folder that holds a model.")
    elif is_hub_name(name):
        complete = find_complete(name, revision, cache_dir)
        path = complete or download(name, revision, cache_dir, weights=False)
        lasting_name = hub_id(name)
    else:
        raise UserError(
            f"no model folder {name}: give demo, demo3, an existing folder, a name like chatglm3-6b, or a hub id like "
            "THUDM/chatglm3-6b."
        )
    content = read_config(path)
    if complete and (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter beside a model, and transformers would mix them: move one away.")
    spec = spec_of(path, content)
    check_sizes(path / "config.json", spec, content)
    check_vocabulary(path, spec)
    weights = checked_weights(path) if complete else ()
    check_not_quantized(path, content, weights)
    return ModelFolder(
        name=lasting_name,
        path=path,
        spec=spec,
        config=open_model(config_name).config if config_name else make_config(spec, content, path / "config.json"),
        bits=content.get("quantization_bit") or None,
        weights=weights,
        revision=revision,
        cache_dir=cache_dir,
    )


def fetch_weights(folder: ModelFolder) -> ModelFolder:
    """The model with its weights here: downloads them if they are still on the hub."""
    if folder.weights:
        return folder
    path = download(folder.name, folder.revision, folder.cache_dir)
    weights = checked_weights(path)
    check_not_quantized(path, read_config(path), weights)
    return replace(folder, path=path, weights=weights)


def make_config(spec: ModelSpec, content: dict[str, Any], file: Path | None = None) -> PreTrainedConfig:
    """The config object of the content of config.json, without what it says of quantized weights and of labels.

    No entry replaces a method, or chooses code that computes attention. Raises UserError for a content that can't be.
    """
    kind = type(AutoConfig.for_model(content["model_type"]))
    methods = {name for name, _ in inspect.getmembers(kind, callable)}
    content = {name: value for name, value in content.items() if name not in NO_SETTINGS and name not in methods}
    if spec.key == "chatglm4":
        content = {"bos_token_id": None} | content  # unlike the older ones
    try:
        config = kind.from_dict(content)
    except Exception as error:  # transformers checks the settings in many ways
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{file or 'config.json'}: transformers can't use it: {detail}: download it again.") from error
    if spec.config is chatglm2.ChatGLMConfig:
        config.generation = spec.key
    return config


def check_sizes(file: Path, spec: ModelSpec, content: dict[str, Any]) -> None:
    """Raises UserError if config.json has another value where a number must be, or one that no model has."""
    default = AutoConfig.for_model(content["model_type"]) if spec.key == "glm" else spec.config()
    defaults = vars(default) | (default.to_dict().get("rope_parameters") or {})
    rope = [content.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    content = {name: value for part in (*rope, content) if isinstance(part, dict) for name, value in part.items()}
    for name, value in content.items():
        kind = type(defaults.get(name))
        if name in RANGES and (value is not None or kind in (int, float)):
            check_number(file, name, value)
        elif kind is bool and type(value) is not bool:
            raise UserError(f"{file}: {name} is {value!r:.60}, not true or false: copy or download the file again.")
        elif name.endswith("_token_id"):
            check_token(file, name, value)
    sizes = {name: content.get(name, value) for name, value in defaults.items() if type(value) is int}
    config = spec.config(**sizes) if spec.key != "glm" else default.from_dict(sizes)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups or spec.key == "chatglm" and config.hidden_size % heads or config.head_dim % 4:
        raise UserError(
            f"{file}: {heads} heads in {groups} groups of {config.head_dim} numbers with hidden_size "
            f"{config.hidden_size} fit no model: copy or download the file again."
        )


def check_number(file: Path, name: str, value: Any) -> None:
    """Raises UserError if a value is not a number in the range of its name."""
    lowest, highest = RANGES[name]
    if type(value) not in (int, type(highest)):
        raise UserError(f"{file}: {name} is {value!r:.60}, not a number: copy or download the file again.")
    if not lowest <= value <= highest:  # nor is nan
        raise UserError(
            f"{file}: {name} is {value!r:.60}, and models have {lowest:,} to {highest:,}: copy or download it again."
        )


def check_token(file: Path, name: str, value: Any) -> None:
    """Raises UserError if a value is not the id of a token, several ids, or none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if len(ids) > 1000 or not all(type(each) is int and -1 <= each <= RANGES["vocab_size"][1] for each in ids):
        raise UserError(f"{file}: {name} is {value!r:.60}, not the number of a token.")


def read_generation(path: Path, config: PreTrainedConfig) -> GenerationConfig:
    """The settings of text generation of a folder, or of its config. Raises UserError for settings that can't work."""
    file = path / "generation_config.json"
    if not file.is_file():
        return GenerationConfig.from_model_config(config)
    content = read_json(file) or {}
    for name, value in content.items():
        if name in RANGES and value is not None:
            check_number(file, name, value)
        elif name.endswith("_token_id"):
            check_token(file, name, value)
    try:
        return GenerationConfig.from_pretrained(path)
    except Exception as error:  # it checks the settings in many ways
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: transformers can't use it: {detail}. Remove it, or download it again.") from error


def check_amount(folder: ModelFolder) -> None:
    """Raises UserError if config.json describes far more weights than the files hold: they would be allocated first."""
    config, stored = folder.config, sum(file.stat().st_size for file in folder.weights)
    layer = config.intermediate_size + config.num_attention_heads * config.head_dim
    least = config.hidden_size * (config.vocab_size + config.num_hidden_layers * layer)  # without the smaller parts
    if least > 2 * stored:  # a byte holds two weights of 4 bits
        raise UserError(
            f"{folder.path / 'config.json'} describes {least:,} weights, and the weight files have {stored:,} bytes: "
            "they don't belong together; copy or download the model again."
        )


def checked_weights(path: Path) -> tuple[Path, ...]:
    """The weight files of a folder. Raises UserError for a missing or truncated one."""
    files = weight_files(path)
    if not files:
        names = " nor ".join(WHOLE_FILES)
        raise UserError(f"{path} has no weights: neither {names} is there, nor shards{other_weights(path)}.")
    for file in files:
        if not os.path.lexists(file):
            known = f"the index of {path} names it" if any(path.glob("*.index.json")) else "other shards are there"
            raise UserError(f"{file} is missing, though {known}.")
        check_complete(file)
    return tuple(files)


def other_weights(path: Path) -> str:
    """Names the weights of a folder that can't be read, in brackets; "" if there are none."""
    found = ", ".join(sorted(file.name for file in path.iterdir() if file.suffix in OTHER_WEIGHTS))
    return f" ({found} is in a format or under a name that is not read)" if found else ""


def check_vocabulary(path: Path, spec: ModelSpec) -> None:
    """Raises UserError if the vocabulary is missing, or text that is none, or if a file beside it is broken."""
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).is_file() and read_json(path / name) is None:
            check_no_text(path / name, "settings", TEXTS[:2])
            raise UserError(f"{path / name} is no JSON object: copy or download it again.")
    if (path / spec.vocabulary).is_file():
        if (size := (path / spec.vocabulary).stat().st_size) > LARGEST_TEXT:
            raise UserError(f"{path / spec.vocabulary} has {size:,} bytes, too many: download it again.")
        check_no_text(path / spec.vocabulary, "vocabulary", TEXTS[:2] if spec.key in ("glm", "chatglm4") else TEXTS)
        return
    others = [name for name in ("ice_text.model", "tokenizer.model", "tokenizer.json") if (path / name).is_file()]
    mixed = f" ({others[0]} belongs to another model)" if others else ""
    raise UserError(f"{path} is a {spec.name} without its vocabulary: {spec.vocabulary} is missing{mixed}.")


def is_local(name: str) -> bool:
    """Whether a name is that of a demo or of an existing folder."""
    return name in DEMOS or bool(name) and os.path.isdir(name)


def empty_model(spec: ModelSpec, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes only; no file is read."""
    # Not from_config, which looks at contents under ZeRO-3.
    make = spec.model._model_mapping[type(config)] if spec.model is AutoModelForCausalLM else spec.model
    try:
        with torch.device("meta"):
            return make(config)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, ZeroDivisionError) as error:
        problem = f"{type(error).__name__} {error!s:.100}"
        raise UserError(f"the config.json of this {spec.name} describes no model: {problem}.") from error


class AnyChatGLMConfig(chatglm.ChatGLMConfig):
    """AutoConfig finds this class under the model type that all models share; it makes the fitting config."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        fitting = chatglm2.ChatGLMConfig if "padded_vocab_size" in config_dict else chatglm.ChatGLMConfig
        return fitting.from_dict(config_dict, **kwargs)


AutoConfig.register("chatglm", AnyChatGLMConfig)
for _module in (chatglm, chatglm2):
    AutoModelForCausalLM.register(_module.ChatGLMConfig, _module.ChatGLMForConditionalGeneration)
for _model in (glm4.GlmForCausalLM, glm4.Glm4ForCausalLM):  # in place of those of transformers
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)


def read_config(path: Path) -> dict[str, Any]:
    """The content of config.json. Raises UserError if it is missing or broken."""
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} is no model folder: it has no config.json{other_weights(path)}.")
    config = read_json(file)
    if config is None:
        check_no_text(file, "settings of the model", TEXTS[:2])
        raise UserError(f"{file} is no JSON object.")
    return config


def spec_of(path: Path, config: dict[str, Any]) -> ModelSpec:
    """The model of a folder with this config.json. Raises UserError for an unsupported model and names it."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    if not isinstance(classes, list):
        raise UserError(f"{path / 'config.json'}: architectures is {classes!r:.60}, not a list of names.")
    classes = list(map(str, classes))
    code = json.dumps([classes, config.get("auto_map")])
    of_transformers = "num_hidden_layers" in config or "num_layers" not in config  # GLM-10B has the type glm too
    problem = ""
    if PICTURE_KEYS & config.keys() or re.search("image|vision|visual|cogvlm", code, re.IGNORECASE):
        problem = "a model that sees pictures"
    elif any("Classification" in name for name in classes):
        problem = f"a {classes[0]}, which writes no text"
    elif kind in ("glm", "glm4") and of_transformers:
        return SPECS["glm"]
    elif kind != "chatglm" or not {"inner_hidden_size", "padded_vocab_size"} & config.keys():
        problem = f"a model of type {kind!r}" + f" ({', '.join(map(str, classes))})" * (kind == "glm")
    if problem:
        raise UserError(
            f"{path / 'config.json'} describes {problem}: supported are ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4."
        )
    if config.get("vocab_size") == 150528:
        raise UserError(
            f"{path} is a ChatGLM-6B with the old vocabulary of 150,528 words: use a checkpoint with 130,528."
        )
    return SPECS["chatglm" if "inner_hidden_size" in config else later_generation(path, config)]


def later_generation(path: Path, config: dict[str, Any]) -> str:
    """chatglm4 by its tokenizer or its vocabulary; chatglm2 or chatglm3, which differ only in prompts, by hints.

    Hints are the config, the tokenizer's code as text, and names.
    """
    tokenizer_config = read_json(path / "tokenizer_config.json") or {}
    classes = (config.get("generation"), tokenizer_config.get("tokenizer_class"))
    if config.get("padded_vocab_size") == 151552 or {"chatglm4", "ChatGLM4Tokenizer"} & {*map(str, classes)}:
        return "chatglm4"
    code = path / "tokenization_chatglm.py"
    source = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    of_code = "chatglm3" if "<|assistant|>" in source else "chatglm2" if "def build_prompt" in source else ""
    place = path.resolve()
    own_name = place.parents[1].name if place.parent.name == "snapshots" else place.name  # in Hugging Face's cache
    named = (config.get("_name_or_path"), tokenizer_config.get("name_or_path"), own_name)
    for hint in (config.get("generation"), tokenizer_config.get("generation"), of_code, *named):
        if found := re.findall(r"chatglm-?([23])|(?:codegeex)(2)", str(hint).lower()):
            return f"chatglm{''.join(found[-1])}"
    raise UserError(
        f"{path} may be a ChatGLM2 or a ChatGLM3, which differ in their prompts only: "
        'write "generation": "chatglm3" (or "chatglm2") into its config.json.'
    )
