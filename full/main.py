"""Full-parameter training: every weight of the model is trained and saved under its original name.

Takes the flags of ptuning/main.py for everything else; `python main.py --help` lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.arguments import FullArguments
from common.errors import exit_on_user_error
from common.finetune import run
from common.flags import parse_arguments
from common.methods.full import Full

if __name__ == "__main__":
    with exit_on_user_error():
        model_args, full_args, data_args, training_args = parse_arguments(FullArguments)
        run(Full(full_args), model_args, data_args, training_args)
