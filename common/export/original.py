"""A model for the code of its official repository: .bin files, and a config.json that names that code."""

from pathlib import Path

from common.export.vocabulary import TEMPLATES
from common.files import read_json, write_json
from common.models.registry import ModelFolder

MODEL_CODE = ("configuration_chatglm.py", "modeling_chatglm.py", "quantization.py", "tokenization_chatglm.py")
CLASS = "modeling_chatglm.ChatGLMForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"), CLASS),
}


def write_settings(folder: ModelFolder, output_dir: Path) -> None:
    """config.json and tokenizer_config.json with the names of the official code's classes, and GLM-4's template."""
    folder.config.save_pretrained(output_dir)
    tokenizer = f"tokenization_chatglm.{folder.spec.tokenizer.original_class}"
    template = {"chat_template": TEMPLATES["chatglm4"]} if folder.spec.key == "chatglm4" else {}
    for file, entry in (
        ("config.json", {"auto_map": AUTO_MAP}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [tokenizer, None]}} | template),
    ):
        write_json(output_dir / file, (read_json(output_dir / file) or {}) | entry)
