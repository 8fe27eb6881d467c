"""Which ChatGLM a checkpoint folder holds, told by its config.json, and the classes that belong to it."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from common.errors import UserError
from common.files import read_json
from common.models import chatglm, chatglm2
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer


class Generation(NamedTuple):
    """Its classes, ours or those that transformers finds by itself, and the file that holds its vocabulary."""

    key: str
    name: str
    config: Any
    model: Any
    tokenizer: Any
    vocabulary: str


GENERATIONS = {
    generation.key: generation
    for generation in (
        Generation(
            "chatglm",
            "ChatGLM-6B",
            chatglm.ChatGLMConfig,
            chatglm.ChatGLMForConditionalGeneration,
            ChatGLMTokenizer,
            "ice_text.model",
        ),
        Generation(
            "chatglm2",
            "ChatGLM2-6B",
            chatglm2.ChatGLMConfig,
            chatglm2.ChatGLMForConditionalGeneration,
            ChatGLM2Tokenizer,
            "tokenizer.model",
        ),
        Generation(
            "chatglm3",
            "ChatGLM3-6B",
            chatglm2.ChatGLMConfig,
            chatglm2.ChatGLMForConditionalGeneration,
            ChatGLM3Tokenizer,
            "tokenizer.model",
        ),
        Generation("glm", "GLM-4", AutoConfig, AutoModelForCausalLM, AutoTokenizer, "tokenizer.json"),
    )
}


def empty_model(model_class: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of a generation's class on the meta device: shapes without weights, of which nothing is read."""
    make = model_class.from_config if model_class is AutoModelForCausalLM else model_class
    with torch.device("meta"):
        return make(config)


class AnyChatGLMConfig(chatglm.ChatGLMConfig):
    """What AutoConfig finds under the name that all generations share: reads the config class that fits."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        fitting = chatglm2.ChatGLMConfig if "padded_vocab_size" in config_dict else chatglm.ChatGLMConfig
        return fitting.from_dict(config_dict, **kwargs)


AutoConfig.register("chatglm", AnyChatGLMConfig)
for _module in (chatglm, chatglm2):
    AutoModelForCausalLM.register(_module.ChatGLMConfig, _module.ChatGLMForConditionalGeneration)


def read_config(folder: Path) -> dict:
    """The content of config.json. Raises UserError where it is missing or broken."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json.")
    config = read_json(file)
    if config is None:
        raise UserError(f"{file} is no JSON object.")
    return config


def generation_of(folder: Path) -> Generation:
    """Raises UserError for a model that is not supported, naming it."""
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in ("glm", "glm4"):
        return GENERATIONS["glm"]
    if kind != "chatglm" or not {"inner_hidden_size", "padded_vocab_size"} & config.keys():
        raise UserError(
            f"{folder / 'config.json'} describes a model of type {kind!r}: "
            "supported are ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, and GLM-4 in the format of transformers."
        )
    if config.get("vocab_size") == 150528:
        raise UserError(
            f"{folder} is a ChatGLM-6B with the old vocabulary of 150,528 words: use a checkpoint with 130,528."
        )
    if config.get("padded_vocab_size") == 151552:
        raise UserError(
            f"{folder} is a GLM-4 in its first format, which needs the code beside it: use the checkpoint whose name "
            "ends in -hf (THUDM/glm-4-9b-chat-hf), or a GLM-4-0414."
        )
    return GENERATIONS["chatglm" if "inner_hidden_size" in config else second_or_third(folder, config)]


def second_or_third(folder: Path, config: dict) -> str:
    """One architecture with two prompts: told apart by their names, or by the tokenizer's code, read as text."""
    tokenizer_config = read_json(folder / "tokenizer_config.json") or {}
    code = folder / "tokenization_chatglm.py"
    for certain in (config.get("generation"), tokenizer_config.get("generation")):
        if certain in ("chatglm2", "chatglm3"):
            return certain
    source = code.read_text(encoding="utf-8", errors="replace") if code.is_file() else ""
    for sign, generation in (("<|assistant|>", "chatglm3"), ("def build_prompt", "chatglm2")):
        if sign in source:
            return generation
    place = folder.resolve()
    own_name = place.parents[1].name if place.parent.name == "snapshots" else place.name  # of the hub's cache, or any
    for name in (config.get("_name_or_path"), tokenizer_config.get("name_or_path"), own_name):
        found = re.findall(r"chatglm-?([23])|(?:codegeex)(2)", str(name).lower())
        if found:
            return f"chatglm{''.join(found[-1])}"
    raise UserError(
        f"{folder} may be a ChatGLM2 or a ChatGLM3, which differ in their prompts only: "
        'write "generation": "chatglm3" (or "chatglm2") into its config.json.'
    )
