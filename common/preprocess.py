"""Tokenizes training data ahead, on all cores, into a folder of shards that every training takes as --train_datasets.

python common/preprocess.py --train_file FILE --model_name_or_path MODEL --output_dir train_datasets [--num_shards 8]

The same command continues a run that was interrupted: finished shards are kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.data.look import check_files
from common.errors import UserError, exit_on_user_error
from common.flags import objects_of, values_of

USAGE = "preprocess.py --train_file FILE --model_name_or_path MODEL --output_dir FOLDER [--flag value ...]"


def main(argv: list[str] | None = None) -> None:
    flags = values_of(("PreprocessArguments", "ModelArguments", "DataArguments"), USAGE, argv)
    if not (flags["train_file"] or flags["dataset_name"]):
        raise UserError("nothing to do: give --train_file (or --dataset_name).")
    check_files(flags | {"do_train": True, "do_eval": False, "do_predict": False})

    # Imported after the checks, because torch and transformers take seconds.
    from common.arguments import DataArguments, ModelArguments, PreprocessArguments
    from common.sharding import make_shards

    make_shards(*objects_of((PreprocessArguments, ModelArguments, DataArguments), flags))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
