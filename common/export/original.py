"""A model for the code of its official repository: .bin files, and a config.json that names that code."""

from pathlib import Path

from common.files import read_json, write_json
from common.models.registry import ModelFolder

MODEL_CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py")
CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), CLASS),
}


def write_settings(folder: ModelFolder, output_dir: Path) -> None:
    """config.json and tokenizer_config.json with the names of the official code's classes."""
    folder.config.save_pretrained(output_dir)
    for file, entry in (
        ("config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}}),
    ):
        write_json(output_dir / file, (read_json(output_dir / file) or {}) | entry)
