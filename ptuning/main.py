"""P-Tuning v2: trains keys and values in front of every layer (`--pre_seq_len` virtual tokens), the base is frozen.

Takes the flags of the official script; `python main.py --help` lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data.look import check_files
from common.errors import exit_on_user_error
from common.flags import make_arguments, read_flags

if __name__ == "__main__":
    with exit_on_user_error():
        flags = read_flags("PrefixArguments")
        check_files(flags)

        # Imported after the checks, because torch and transformers take seconds.
        from common.arguments import PrefixArguments
        from common.finetune import run
        from common.methods.prefix import PTuning

        model_args, prefix_args, data_args, training_args = make_arguments(PrefixArguments, flags)
        run(PTuning(prefix_args), model_args, data_args, training_args)
