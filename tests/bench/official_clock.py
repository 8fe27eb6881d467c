"""Runs a program and notes the CPU time of its steps and answers; transformers 4.27 to 5 alike.

python official_clock.py RECORD.json PROGRAM FLAGS...
"""

import atexit
import json
import os
import runpy
import sys
import time
from pathlib import Path

import transformers
from transformers.trainer_callback import CallbackHandler

record, program, *flags = sys.argv[1:]
found = {"steps": [], "tokens": [], "answers": []}
mixin = transformers.generation.GenerationMixin


def noted(owner, name, note):
    """Puts ``note(result, CPU seconds)`` behind a method."""
    method = getattr(owner, name)

    def call(*args, **kwargs):
        begun = time.process_time()
        result = method(*args, **kwargs)
        note(result, time.process_time() - begun)
        return result

    setattr(owner, name, call)


def count(model, args, inputs):
    """The real tokens of a batch: in each row from the first to the last that is no pad, which a text may hold too."""
    if model.training:
        real = [(row != int(os.environ["PAD"])).nonzero() for row in inputs["input_ids"]]
        found["tokens"].append(sum(int(places.max() - places.min()) + 1 for places in real))


noted(CallbackHandler, "on_step_end", lambda *_: found["steps"].append(time.process_time()))
noted(mixin, "generate", lambda ids, seconds: found["answers"].append([seconds, len(ids)]))
if Path(__file__).resolve().parents[2] in Path(program).resolve().parents:  # ours arranges weights before answers
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from common.models import products

    for name in ("pack", "unpack"):
        noted(products, name, lambda _, seconds: found["answers"].append([seconds, 0]))
begin = CallbackHandler.on_train_begin


def on_train_begin(self, *args, **kwargs):
    self.model.register_forward_pre_hook(count, with_kwargs=True)  # the older ones have a Trainer of their own
    return begin(self, *args, **kwargs)


CallbackHandler.on_train_begin = on_train_begin


@atexit.register
def write():
    with open(record, "w") as file:
        json.dump(found, file)


sys.argv = [program, *flags]
sys.path[0] = os.path.dirname(os.path.abspath(program))
runpy.run_path(program, run_name="__main__")
