"""The order of the training rows: files mixed by shares, steps of like length, drawn anew in each epoch from a seed."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import TrainerCallback

from common.arguments import TrainingArguments
from common.data.survey import columns_of, lengths_of
from common.errors import UserError

WINDOW = 50  # steps whose rows are sorted by length together


def parse_mix(mix: str, files: int) -> list[float]:
    """The shares that ``mix`` gives. Raises UserError unless it has one number for each file."""
    try:
        shares = [float(share) for share in mix.split(",")]
    except ValueError:
        raise UserError(f"MIX={mix} (--mix): give numbers with commas between them, as in 1,0.3.") from None
    if len(shares) != files:
        raise UserError(f"MIX={mix} (--mix): numbers for {len(shares)} files, but the training has {files}.")
    if not all(0 <= share < float("inf") for share in shares) or not shares[0]:
        raise UserError(f"MIX={mix} (--mix): a share is at least 0, and that of the first file is above 0.")
    return shares


def like_lengths(rows: NDArray, lengths: NDArray, step: int, random: np.random.Generator) -> NDArray:
    """The shuffled ``rows`` of an epoch in steps of like length, which are shuffled too.

    They are sorted by length among ``WINDOW`` steps, so that other rows meet in each epoch. What fills no step comes
    last. ``step``: rows of a step of all processes, so that their number and the batches of a step change nothing.
    """
    whole = len(rows) // step * step
    window = np.arange(whole) // (WINDOW * step)
    by_length = rows[:whole][np.lexsort((lengths[rows[:whole]], window))]
    return np.concatenate((random.permutation(by_length.reshape(-1, step)).ravel(), rows[whole:]))


class RowOrder(Sampler[int], TrainerCallback):
    """The indices of the rows of an epoch, shuffled; with ``lengths`` those of a step have like ones.

    ``files``: the index of each row's file. Of file i an epoch takes shares[i] / shares[0] rows for each row of the
    first file: drawn without repetition, after whole passes where a file has fewer. Nothing but seed and epoch decides
    the draw, so a resumed training sees the rows of an uninterrupted one. Raises UserError for a file without rows.
    """

    def __init__(
        self, files: NDArray, shares: Sequence[float], seed: int, lengths: NDArray | None = None, step: int = 1
    ):
        self.parts = [np.flatnonzero(files == index) for index in range(len(shares))]
        self.counts = [round(share / shares[0] * len(self.parts[0])) for share in shares]
        if any(count and not len(part) for part, count in zip(self.parts, self.counts, strict=True)):
            raise UserError("MIX (--mix): a file has no row to train.")
        self.lengths, self.step = lengths, step
        self.seed, self.epoch = seed, 0

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        """Accelerate would not tell it where several processes continue a training within an epoch."""
        self.epoch = int(state.epoch or 0)

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        drawn = []
        for part, count in zip(self.parts, self.counts, strict=True):
            passes, rest = divmod(count, len(part)) if count else (0, 0)
            drawn += [part] * passes + [random.choice(part, rest, replace=False)] * bool(rest)
        rows = random.permutation(np.concatenate(drawn))
        yield from (rows if self.lengths is None else like_lengths(rows, self.lengths, self.step, random)).tolist()


def order_of(rows: Dataset, mix: str | None, files: int, args: TrainingArguments) -> RowOrder | None:
    """The order of training rows from so many files; None: one that the Trainer knows. Raises UserError for the mix."""
    groups = args.train_sampling_strategy == "group_by_length"
    if not (mix or groups):
        return None
    origins = columns_of(rows, "file")["file"] if mix else np.zeros(len(rows), np.int8)
    shares = parse_mix(mix, files) if mix else [1.0]
    seed = args.seed if args.data_seed is None else args.data_seed
    return RowOrder(origins, shares, seed, lengths_of(rows) if groups else None, args.all_rows_per_step)
