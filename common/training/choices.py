"""The choices that the flags leave open: plain text or conversations, the validation data, epochs or steps."""

from pathlib import Path

from transformers.trainer_utils import IntervalStrategy

from common.arguments import DataArguments, TrainingArguments
from common.data.examples import columns_of
from common.data.formats import is_text
from common.data.rows import read_rows
from common.data.shards import summary_of
from common.data.sources import find_files
from common.errors import UserError, note

SHIPPED = Path(__file__).resolve().parents[2] / "AdvertiseGen"
EPOCHS = 3.0


def training_files(data_args: DataArguments) -> list[Path]:
    """The files of the training rows, also of rows that were tokenized ahead. Raises UserError for a missing one."""
    if data_args.train_datasets:
        return [Path(file["file"]) for file in summary_of(Path(data_args.train_datasets))["findings"]]
    return find_files(data_args.train_file or "")


def is_shipped(files: list[Path]) -> bool:
    own = all(file.resolve().parent == SHIPPED and file.name.startswith("train") for file in files)
    return bool(files) and own


def choose_text(data_args: DataArguments) -> None:
    """Trains rows of plain text as text, without a flag. Raises UserError for a file that can't be read."""
    if data_args.train_datasets:
        data_args.text_column = summary_of(Path(data_args.train_datasets))["text_column"]
        return
    for file in find_files(data_args.train_file or "")[:1]:
        first = next((row for row in read_rows(file, data_args.text_unit) if not row.problem), None)
        if first and is_text(first.content, columns_of(data_args)):
            data_args.text_column = data_args.text_column or "text"


def choose(data_args: DataArguments, args: TrainingArguments) -> None:
    """Completes the flags. Raises UserError as ``training_files`` does."""
    if args.do_train:
        choose_text(data_args)
    if args.do_train and data_args.text_column and args.do_predict:
        note("note: plain text has no questions to answer: the loss is reported, and the perplexity.")
        args.do_predict, args.do_eval = False, True
    files = training_files(data_args) if args.do_train else []
    choose_validation(data_args, args, files)
    choose_length(args, is_shipped(files))


def choose_validation(data_args: DataArguments, args: TrainingArguments, files: list[Path]) -> None:
    """The shipped rows have a validation file; of other rows a share is held out, unless a file is given.

    Raises UserError if the best checkpoint is asked for, and there is no validation data.
    """
    evaluates = args.do_eval or args.do_predict
    if not (args.do_train and evaluates) or data_args.dataset_name:
        return
    given = data_args.validation_file or data_args.test_file
    if not given and is_shipped(files):
        given = ",".join(str(file.with_name(file.name.replace("train", "dev"))) for file in files)
    data_args.validation_file = data_args.validation_file or given
    data_args.test_file = data_args.test_file or given
    if given:
        return
    data_args.held_out = data_args.validation_split > 0
    if not data_args.held_out:
        if args.load_best_model_at_end:
            raise UserError(
                "--validation_split 0 leaves no rows to tell the best checkpoint by (BEST_METRIC, EARLY_STOPPING): "
                "name a VALIDATION_FILE (--validation_file), or leave them out."
            )
        note("note: there is no validation data (--validation_split 0): nothing is scored.")
        args.do_eval = args.do_predict = False
        args.eval_strategy = IntervalStrategy.NO


def choose_length(args: TrainingArguments, shipped: bool) -> None:
    """A number of steps that a user gives wins over epochs, and both over the defaults."""
    if args.max_steps > 0 and args.num_train_epochs is not None:
        note(f"note: --max_steps {args.max_steps} wins over --num_train_epochs {args.num_train_epochs:g}.")
    if shipped and args.max_steps <= 0 and args.num_train_epochs is None:
        args.max_steps = args.default_steps or -1
    if args.num_train_epochs is None:
        args.num_train_epochs = EPOCHS
