"""Fine-tune from a YAML file, with the command line and the files of the ChatGLM3 and GLM-4 repositories.

python common/finetune_hf.py DATA_DIR MODEL_DIR CONFIG.yaml [yes|no|STEP] [--flag value ...]

The last argument: yes continues from the newest checkpoint, a number from that one, no starts over and deletes the
checkpoints that are there. Without it an interrupted training of the same settings is continued. Further flags are
those of main.py and win over the file.
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from common.command import from_file
from common.data.look import check_files
from common.declared import declared
from common.errors import UserError, exit_on_user_error, nearest, note
from common.flags import REMOVED, RENAMED, current_flag, make_arguments, read_flags

if TYPE_CHECKING:  # torch and transformers take seconds
    from common.arguments import TrainingArguments
    from common.methods import Method

SECTIONS = (
    *("data_config", "max_input_length", "max_output_length", "quantization_bit", "training_args", "peft_config"),
    *("combine", "freezeV", "swanlab"),  # of GLM-4
)
DATA_FILES = {  # key -> flag of the file, flag of the job
    "train_file": ("train_file", "do_train"),
    "val_file": ("validation_file", "do_eval"),
    "test_file": ("test_file", "do_predict"),
}
SET_ELSEWHERE = {"validation_file", "max_source_length", "max_target_length"}
GENERATION = ("max_new_tokens", "num_beams", "do_sample", "top_p", "temperature")
# peft_type -> its dataclass of flags, and the keys of peft_config that have another name than their flag
METHODS: dict[str | None, tuple[str, dict[str, str]]] = {
    "LORA": ("LoraArguments", {"r": "lora_rank", "target_modules": "lora_target"}),
    "PREFIX_TUNING": ("PrefixArguments", {"num_virtual_tokens": "pre_seq_len"}),
    None: ("FullArguments", {}),
}
IGNORED = (  # keys of peft_config; the sizes are those of the model
    *("peft_type", "task_type", "inference_mode", "num_attention_heads", "token_dim", "num_layers"),
    *("num_transformer_submodules", "encoder_hidden_size"),
)


def read_yaml(file: Path) -> dict[str, Any]:
    """The sections of a configuration file. Raises UserError for a broken one or an unknown section."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"can't read the configuration file {file}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file}: broken YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: expected sections like training_args:, found {type(config).__name__}.")
    check_keys(file, "", config, SECTIONS)
    for name in ("data_config", "training_args", "peft_config"):
        config[name] = config.get(name) or {}
        if not isinstance(config[name], dict):
            raise UserError(f"{file}: {name} must hold keys with values.")
    if config.get("combine"):
        note(f"{file}: combine is not read: all answers are learned, but those with loss: false in the data.")
    if config.get("swanlab") not in (None, False, "disabled"):
        config["training_args"].setdefault("report_to", "swanlab")
    return config


def check_keys(file: Path, section: str, given: dict[str, Any], known: Collection[str]) -> None:
    """Raises UserError for an unknown key, naming the nearest known one."""
    for key in given:
        if key not in known:
            key = " ".join(str(key).split())
            meant = nearest(key, known)
            hint = f"did you mean {meant}?" if meant else f"there are {', '.join(sorted(known))}."
            raise UserError(f"{file}: unknown key {section}{key}: {hint}")


def data_defaults(file: Path, config: dict[str, Any], data_dir: Path) -> dict[str, Any]:
    """The flags of the data. A file is trained on or evaluated if it is named."""
    data = dict(config["data_config"])
    known = {*DATA_FILES, "num_proc", *declared("DataArguments")} - SET_ELSEWHERE
    check_keys(file, "data_config.", data, known)
    data.pop("num_proc", None)  # sentencepiece uses all cores by itself
    for key, value in data.items():
        if key.endswith("_column") and not isinstance(value, str | None):
            raise UserError(f"{file}: data_config.{key} is {value!r:.80}: give the name of a column.")
    data.setdefault("max_eval_samples", 50)  # the official script looks at the first 50 rows
    for key, (name, job) in DATA_FILES.items():
        value = data.pop(key, None)
        names = value if isinstance(value, list) else [value] if value else []
        if not all(isinstance(part, str) for part in names):
            raise UserError(f"{file}: data_config.{key} is {value!r:.80}: give the name of a file, or a list of names.")
        data[name] = (
            ",".join(str(data_dir / part.strip()) for name in names for part in name.split(",") if part) or None
        )
        data[job] = bool(value) or job == "do_train" and bool(data.get("train_datasets"))
    lengths = {"max_source_length": "max_input_length", "max_target_length": "max_output_length"}
    return data | {name: config.get(key) for name, key in lengths.items()}


def training_defaults(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    training = dict(config["training_args"])
    check_keys(file, "training_args.", training, [*declared("TrainingArguments"), *RENAMED, *REMOVED])
    generation = training.pop("generation_config", None) or {}
    check_keys(file, "training_args.generation_config.", generation, GENERATION)
    training = dict(filter(None, (current_flag(name, value) for name, value in training.items())))
    if not config["data_config"].get("val_file"):
        training["eval_strategy"] = "no"
    if deepspeed := str(training.get("deepspeed") or ""):  # relative to the working directory, or to this file
        found = [place for place in (Path(deepspeed), file.parent / deepspeed) if place.is_file()]
        if not found:
            raise UserError(f"{file}: training_args.deepspeed: no file {deepspeed}.")
        training["deepspeed"] = str(found[0])
    return training | generation


def read_config(file: Path, data_dir: Path, model: str, flags: list[str]) -> tuple[str, dict[str, Any]]:
    """The name of the method's dataclass, and the values of all flags; ``flags`` win over the file.

    Raises UserError for a broken file, and for unknown or bad keys.
    """
    config = read_yaml(file)
    peft = config["peft_config"]
    kind = peft.get("peft_type")
    if kind not in list(METHODS) or peft and kind is None:
        raise UserError(f"{file}: peft_config.peft_type is {kind!r}; there are LORA and PREFIX_TUNING.")
    arguments, renamed = METHODS[kind]
    check_keys(file, "peft_config.", peft, [*renamed, *declared(arguments), *IGNORED])
    if peft.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise UserError(f"{file}: peft_config.task_type is {peft['task_type']!r}: ChatGLM is a CAUSAL_LM.")
    defaults: dict[str, Any] = {"model_name_or_path": model, "quantization_bit": config.get("quantization_bit")}
    defaults |= data_defaults(file, config, data_dir) | training_defaults(file, config)
    defaults |= {renamed.get(key, key): value for key, value in peft.items() if key not in IGNORED}
    if isinstance(defaults.get("lora_target"), list):
        defaults["lora_target"] = ",".join(map(str, defaults["lora_target"]))
    given = {name: value for name, value in defaults.items() if value is not None}
    from_file.update(given)
    return arguments, read_flags(arguments, flags, given)


def make_method(arguments: str, values: dict[str, Any]) -> tuple["Method", tuple[Any, ...]]:
    """The method, and (model, data, training) arguments. Raises UserError for values that contradict each other."""
    from common.arguments import FullArguments, LoraArguments, PrefixArguments
    from common.methods.full import Full
    from common.methods.lora import Lora
    from common.methods.prefix import PTuning

    methods: dict[str, tuple[type, Any]] = {
        "LoraArguments": (LoraArguments, Lora),
        "PrefixArguments": (PrefixArguments, PTuning),
        "FullArguments": (FullArguments, Full),
    }
    kind, method = methods[arguments]
    model_args, method_args, *others = make_arguments(kind, values)
    return method(method_args), (model_args, *others)


def resume(choice: str, args: "TrainingArguments") -> None:
    """Sets the flags that the last argument asks for. Raises UserError for a checkpoint that does not exist."""
    from common.training.saves import checkpoint_folders

    output_dir = Path(args.output_dir)
    existing = {path.name.rpartition("-")[2]: path for path in checkpoint_folders(output_dir)}
    if choice.lower() == "no":
        args.overwrite_output_dir = True
    elif choice.lower() == "yes":
        args.resume_from_checkpoint = "true" if existing else None
    elif choice in existing:
        args.resume_from_checkpoint = str(existing[choice])
    elif choice:
        there = f"there are {', '.join(existing)}" if existing else "there is none"
        raise UserError(f"no checkpoint {choice} in {output_dir}: {there}; or yes for the newest, or no.")


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

    arguments, values = read_config(args.config_file, args.data_dir, args.model_dir, further)
    check_files(values)
    method, parsed = make_method(arguments, values)
    from common.finetune import run

    resume(args.auto_resume_from_checkpoint, parsed[-1])
    run(method, *parsed)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
