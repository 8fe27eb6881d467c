"""Notes in each Python process of a program what its whole session has computed so far, around its steps and answers.

peers.py puts it as sitecustomize.py into a folder of PYTHONPATH. PEERS_RECORD: the file of notes, one JSON list a line:
[what, CPU seconds of all processes before it, and after it, sizes].
"""

import json
import os
import sys
from importlib.machinery import PathFinder

TICKS = os.sysconf("SC_CLK_TCK")


def no_sizes(args, result):
    return []


def batch_sizes(args, result):
    """Positions of a batch with its pads, and those with a label."""
    inputs = args[2]
    return [inputs["input_ids"].numel(), int((inputs["labels"] != -100).sum())]


def answer_sizes(args, result):
    return list((result["sequences"] if isinstance(result, dict) else result).shape)


def no_rows(args, result):
    return [0]


# module -> class ("": none), functions, what they are, sizes. Encoding: reading the files and making token ids of them.
METHODS = {
    "transformers.trainer": ("Trainer", "training_step", "batch", batch_sizes),
    "transformers.trainer_callback": ("CallbackHandler", "on_step_end", "step", no_sizes),
    "transformers.generation.utils": ("GenerationMixin", "generate", "answers", answer_sizes),
    "datasets.load": ("", "load_dataset", "encoding", no_sizes),
    "datasets.arrow_dataset": ("Dataset", "map", "encoding", no_sizes),
    "common.data.dataset": ("", "prepare_dataset", "encoding", no_sizes),
    "common.models.products": ("", "pack unpack", "answers", no_rows),
}


def seconds():
    """CPU seconds of all processes of this session, and of those that have ended."""
    total = 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == os.getsid(0):
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def note_calls(owner, name, what, sizes):
    function = getattr(owner, name)

    def call(*args, **kwargs):
        before = seconds()
        result = function(*args, **kwargs)
        with open(os.environ["PEERS_RECORD"], "a") as file:
            file.write(json.dumps([what, before, seconds(), sizes(args, result)]) + "\n")
        return result

    setattr(owner, name, call)


class Finder:
    """Lets a module of METHODS be noted as soon as it is there: nothing is imported earlier than without the clock."""

    @staticmethod
    def find_spec(name, path, target=None):
        if name not in METHODS:
            return None
        spec, (owner, functions, *noted) = PathFinder.find_spec(name, path), METHODS[name]
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for function in functions.split():
                note_calls(vars(module)[owner] if owner else module, function, *noted)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder)
