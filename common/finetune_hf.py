"""Fine-tune from a YAML file, with the command line and the files of the ChatGLM3 repository.

python common/finetune_hf.py DATA_DIR MODEL_DIR CONFIG.yaml [yes|no|STEP] [--flag value ...]

The last argument: yes continues from the newest checkpoint, a number from that one, no starts over and deletes the
checkpoints that are there. Without it an interrupted training of the same settings is continued. Further flags are
those of main.py and win over the file.
"""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from common.arguments import (
    DataArguments,
    FullArguments,
    LoraArguments,
    PrefixArguments,
    TrainingArguments,
)
from common.errors import UserError, exit_on_user_error
from common.finetune import run
from common.flags import REMOVED, RENAMED, parse_arguments
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.training.checkpoints import complete_checkpoints

SECTIONS = ("data_config", "max_input_length", "max_output_length", "quantization_bit", "training_args", "peft_config")
DATA_FILES = {"train_file": "train_file", "val_file": "validation_file", "test_file": "test_file"}
SET_ELSEWHERE = {"validation_file", "max_source_length", "max_target_length"}
GENERATION = ("max_new_tokens", "num_beams", "do_sample", "top_p", "temperature")
# keys of a peft_config -> flags; None: it says what is so anyway
LORA = {
    "r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "peft_type": None,
    "task_type": None,
    "inference_mode": None,
}
PREFIX = {
    "num_virtual_tokens": "pre_seq_len",
    "prefix_projection": "prefix_projection",
    # the sizes are those of the model
    "num_attention_heads": None,
    "token_dim": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "encoder_hidden_size": None,
    "peft_type": None,
    "task_type": None,
    "inference_mode": None,
}
METHODS: dict[str | None, tuple[type, dict, Callable]] = {  # peft_type -> its flags, its keys, the method
    "LORA": (LoraArguments, LORA, Lora),
    "PREFIX_TUNING": (PrefixArguments, PREFIX, PTuning),
    None: (FullArguments, {}, Full),
}


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a configuration file. Raises UserError for a broken one or an unknown section."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"no configuration file {file}.") from error
    except IsADirectoryError as error:
        raise UserError(f"{file} is a folder, not a configuration file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: broken YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected sections like training_args:, found {type(config).__name__}.")
    check_keys(file, "", config, SECTIONS)
    for name in ("data_config", "training_args", "peft_config"):
        if not isinstance(config.setdefault(name, {}) or {}, dict):
            raise UserError(f"{file}: {name} must hold keys with values.")
        config[name] = config[name] or {}
    return config


def check_keys(file: Path, section: str, given: dict[str, Any], known: Collection[str]) -> None:
    """Raises UserError for an unknown key, naming the nearest known one."""
    for key in given:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(sorted(known))}."
            raise UserError(f"{file}: unknown key {section}{key}: {hint}")


def flag(name: str, value: Any) -> list[str]:
    """A value of the file as it is written on a command line; nothing for null."""
    if value is None:
        return []
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return [f"--{name}", json.dumps(value) if isinstance(value, (bool, dict)) else str(value)]


def data_flags(file: Path, config: dict[str, Any], data_dir: Path) -> list[str]:
    data = dict(config["data_config"])
    known = {*DATA_FILES, "num_proc", *DataArguments.__dataclass_fields__} - SET_ELSEWHERE
    check_keys(file, "data_config.", data, known)
    data.pop("num_proc", None)  # sentencepiece uses all cores by itself
    flags = []
    for key, name in DATA_FILES.items():
        value = data.pop(key, None) or []
        names = value if isinstance(value, list) else str(value).split(",")
        flags += flag(name, [str(data_dir / part.strip()) for part in names] or None)
    if not {"prompt_column", "conversation_column", "text_column"} & data.keys():
        data["conversation_column"] = "conversations"
    data.setdefault("max_eval_samples", 50)  # the official script looks at the first 50 rows
    lengths = {
        "max_source_length": config.get("max_input_length"),
        "max_target_length": config.get("max_output_length"),
    }
    return flags + [word for name, value in (data | lengths).items() for word in flag(name, value)]


def training_flags(file: Path, config: dict[str, Any]) -> list[str]:
    training = dict(config["training_args"])
    known = [*TrainingArguments.__dataclass_fields__, *RENAMED, *REMOVED]
    check_keys(file, "training_args.", training, known)
    generation = training.pop("generation_config", None) or {}
    check_keys(file, "training_args.generation_config.", generation, GENERATION)
    deepspeed = training.get("deepspeed")
    if not config["data_config"].get("val_file"):
        training |= {"eval_strategy": "no"}
        training.pop("evaluation_strategy", None)
    if deepspeed and not isinstance(deepspeed, str):
        raise UserError(f"{file}: training_args.deepspeed must name a file.")
    if deepspeed:  # a file, relative to where the user is, or to this one
        found = [place for place in (Path(deepspeed), file.parent / deepspeed) if place.is_file()]
        if not found:
            raise UserError(f"{file}: training_args.deepspeed: no file {deepspeed}.")
        training["deepspeed"] = str(found[0])
    return [word for name, value in (training | generation).items() for word in flag(name, value)]


def method_flags(file: Path, peft: dict[str, Any], keys: dict[str, str | None]) -> list[str]:
    check_keys(file, "peft_config.", peft, keys)
    if peft.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise UserError(f"{file}: peft_config.task_type is {peft['task_type']!r}: ChatGLM is a CAUSAL_LM.")
    return [word for key, value in peft.items() if (name := keys[key]) for word in flag(name, value)]


def resume(choice: str, args: TrainingArguments) -> None:
    """Sets what the last argument asks for. Raises UserError for a checkpoint that does not exist."""
    output_dir = Path(args.output_dir)
    existing = {path.name.rpartition("-")[2]: path for path in complete_checkpoints(output_dir)}
    if choice.lower() == "no":
        args.overwrite_output_dir = True
    elif choice.lower() == "yes":
        args.resume_from_checkpoint = "true" if existing else None
    elif choice in existing:
        args.resume_from_checkpoint = str(existing[choice])
    elif choice:
        there = f"there are {', '.join(existing)}" if existing else "there is none"
        raise UserError(f"no complete checkpoint {choice} in {output_dir}: {there}; or yes for the newest, or no.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_dir", type=Path, help="folder of the data files")
    parser.add_argument("model_dir", help="demo, demo3, a folder with a checkpoint, or a hub id")
    parser.add_argument("config_file", type=Path, help="lora.yaml, ptuning_v2.yaml, sft.yaml or your own")
    parser.add_argument("auto_resume_from_checkpoint", nargs="?", default="", help="yes, no, or a checkpoint's number")
    words = sys.argv[1:]
    end = next((i for i, word in enumerate(words) if word.startswith("--") and word != "--help"), len(words))
    args, further = parser.parse_args(words[:end]), words[end:]

    config = read_yaml(args.config_file)
    kind = config["peft_config"].get("peft_type")
    if kind not in list(METHODS) or config["peft_config"] and kind is None:
        raise UserError(f"{args.config_file}: peft_config.peft_type is {kind!r}; there are LORA and PREFIX_TUNING.")
    method_arguments, keys, make_method = METHODS[kind]
    wanted = [
        ("do_train", "train_file"),
        ("do_train", "train_datasets"),
        ("do_eval", "val_file"),
        ("do_predict", "test_file"),
    ]
    flags = ["--model_name_or_path", args.model_dir, *flag("quantization_bit", config.get("quantization_bit"))]
    flags += [f"--{name}" for name, file in wanted if config["data_config"].get(file)]
    flags += data_flags(args.config_file, config, args.data_dir)
    flags += training_flags(args.config_file, config)
    flags += method_flags(args.config_file, config["peft_config"], keys)
    model_args, chosen, data_args, training_args = parse_arguments(method_arguments, flags + further)
    resume(args.auto_resume_from_checkpoint, training_args)
    run(make_method(chosen), model_args, data_args, training_args)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
