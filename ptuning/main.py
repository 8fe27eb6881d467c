"""P-Tuning v2: trains keys and values in front of every layer (`--pre_seq_len` virtual tokens), the base is frozen.

Takes the flags of the official script; `python main.py --help` lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import PrefixArguments
from common.errors import exit_on_user_error
from common.finetune import run
from common.flags import parse_arguments
from common.methods.prefix import PTuning

if __name__ == "__main__":
    with exit_on_user_error():
        model_args, prefix_args, data_args, training_args = parse_arguments(PrefixArguments)
        run(PTuning(prefix_args), model_args, data_args, training_args)
