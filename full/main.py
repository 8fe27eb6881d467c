"""Full-parameter training: every weight of the model is trained and saved under its original name.

Takes the flags of ptuning/main.py for everything else; `python main.py --help` lists them all.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data.look import check_files
from common.errors import exit_on_user_error
from common.flags import make_arguments, read_flags

if __name__ == "__main__":
    with exit_on_user_error():
        flags = read_flags("FullArguments")
        check_files(flags)

        # Imported after the checks, because torch and transformers take seconds.
        from common.arguments import FullArguments
        from common.finetune import run
        from common.methods.full import Full

        model_args, full_args, data_args, training_args = make_arguments(FullArguments, flags)
        run(Full(full_args), model_args, data_args, training_args)
