"""The command that started this program, and the variables of the scripts beside the flags that they become."""

import os
import re
import shlex
import sys
from typing import NamedTuple

import psutil

OTHER_NAMES = {  # flag: its variable
    "model_name_or_path": "MODEL",
    "learning_rate": "LR",
    "num_train_epochs": "EPOCHS",
    "per_device_train_batch_size": "BATCH_SIZE",
    "per_device_eval_batch_size": "EVAL_BATCH_SIZE",
    "gradient_accumulation_steps": "GRAD_ACCUM",
    "activation_checkpointing": "GRADIENT_CHECKPOINTING",
    "metric_for_best_model": "BEST_METRIC",
    "do_eval": "EVALUATE",
}
SAME_NAMES = set(  # a variable is its flag in capitals
    "train_file train_datasets validation_file validation_split test_file probe_file mix skip_bad_rows strict_data "
    "prompt_column response_column history_column conversation_column text_column text_unit packing max_steps "
    "default_steps eval_steps early_stopping logging_steps save_steps save_total_limit save_format tokens_per_batch "
    "rows_per_step max_source_length max_target_length output_dir checkpoint quantization_bit check_memory precision "
    "deepspeed fsdp_config pre_seq_len lora_rank lora_alpha lora_target lora_dropout show_answers log_format dtype "
    "format num_shards host port compare share system_prompt allowed_hosts".split()
)
VARIABLES = OTHER_NAMES | {flag: flag.upper() for flag in SAME_NAMES}
FLAG = re.compile(r"(?<![\w-])--(\w+)(?:[ =](\d[\w.-]*|auto|true|false|fp32|fp16|bf16|random)\b)?(?!\w)")


from_file: set[str] = set()  # flags that a file of settings gives


class Given(NamedTuple):
    """What a user set: variables of the script, and flags after its name."""

    variables: set[str]
    flags: set[str]


def flags_of(words: list[str]) -> set[str]:
    return {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}


def given() -> Given:
    """From the command that common/launch.sh writes down; without a script all flags are the user's."""
    words = shlex.split(os.environ.get("RESUME_COMMAND", ""))
    if "bash" not in words:
        return Given(set(), flags_of(sys.argv[1:]))
    at = words.index("bash")
    return Given({word.partition("=")[0] for word in words[:at] if "=" in word}, flags_of(words[at + 2 :]))


def origin_of(flag: str, own: Given) -> str:
    """Who set a flag: flag (the user), variable, script, file (of settings), or "" for none of them."""
    variable = VARIABLES.get(flag, "")
    if flag in own.flags:
        return "flag"
    if variable in own.variables:
        return "variable"
    if flag in flags_of(sys.argv[1:]):
        return "script"
    return "file" if flag in from_file else ""


def flag_of(name: str) -> str:
    """A flag, behind its variable if it has one."""
    return f"{VARIABLES[name]} (--{name})" if name in VARIABLES else f"--{name}"


def with_variables(sentence: str) -> str:
    """The sentence with the variable before each flag that has one, where a script was started."""
    if "RESUME_COMMAND" not in os.environ or ".py " in sentence:  # which quotes a command
        return sentence

    def both(found: re.Match[str]) -> str:
        flag, value = found[1], found[2]
        variable = VARIABLES.get(flag, "")
        if not variable or re.search(rf"\b{variable}\b", sentence):
            return found[0]
        return f"{variable}{f'={value}' if value else ''} ({found[0]})"

    return FLAG.sub(both, sentence)


def this_command() -> str:
    """What started this training, as a shell reads it: its script, its launcher, or this program."""
    launched = {"EXIT_WHEN_PREEMPTED", "LOCAL_RANK"} & os.environ.keys()
    words = psutil.Process(os.getppid()).cmdline() if launched else sys.orig_argv
    command = os.environ.get("RESUME_COMMAND", "").strip() or f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"
    return re.sub(r" --(overwrite_output_dir( true)?|resume_from_checkpoint[ =]\S+)(?= |$)", "", command)
