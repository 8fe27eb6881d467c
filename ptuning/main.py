"""P-Tuning v2: trains keys and values in front of every layer (`--pre_seq_len` virtual tokens), the base is frozen.

Takes the flags of the official script; `python main.py --help` lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import parse_arguments
from common.errors import UserError, exit_on_user_error
from common.finetune import run
from common.prefix import restore_prefix, save_prefix, without_prefix
from common.trainer import Method

P_TUNING = Method("P-Tuning v2", save=save_prefix, restore=restore_prefix, base=without_prefix)

if __name__ == "__main__":
    with exit_on_user_error():
        model_args, data_args, training_args = parse_arguments()
        if training_args.do_train and not (model_args.pre_seq_len or model_args.ptuning_checkpoint):
            raise UserError("--do_train needs --pre_seq_len, the number of virtual tokens to train.")
        run(P_TUNING, model_args, data_args, training_args)
