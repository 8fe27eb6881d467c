"""The order of the training rows: files mixed by shares, steps of like length, drawn anew in each epoch from a seed."""

from collections.abc import Iterator, Sequence

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import Sampler
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler

from common.arguments import TrainingArguments
from common.data.survey import columns_of, lengths_of
from common.errors import UserError

WINDOW = 50  # steps whose rows are sorted by length together
SHORTEST = 32  # tokens that a row counts for at least, or a prefix before each of many short rows would need the memory
ALIKE = 7 / 8  # of the longest of some rows that meet in other batches in each epoch: the length of the shortest


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


class KnowsEpoch(TrainerCallback):
    """Accelerate would not tell a sampler where several processes continue a training within an epoch."""

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.epoch = int(state.epoch or 0)


class RowOrder(Sampler[int], KnowsEpoch):
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


class TokenBatches(BatchRebalanceSampler, KnowsEpoch):
    """The batches of one process: as many rows of like length as fit into ``slots``, padded to the longest of them.

    The Trainer takes the batches of a BatchRebalanceSampler as they come. The rows, sorted by length, are divided once
    into groups of like length, in which all batches have as many rows; so each epoch has the same number of steps. In
    each epoch the rows of a group are shuffled, and then the steps. A group is filled up to whole steps with shorter
    rows; the last step has what is left, in as many batches, and repeats rows if there are fewer. Nothing decides the
    order but seed, epoch, and ``step``, the batches of a step of all processes. ``process``: its index, and the number
    of all.
    """

    def __init__(self, lengths: NDArray, slots: int, step: int, process: tuple[int, int], seed: int):
        counted = -np.sort(-np.maximum(lengths, SHORTEST))
        rows, start = np.argsort(-lengths, kind="stable"), 0
        self.groups: list[tuple[NDArray, int]] = []  # rows, and how many of them a step takes
        while start < len(rows):
            size = slots // counted[start] * step
            alike = np.searchsorted(-counted, -ALIKE * counted[start], side="right") - start
            self.groups.append((rows[start : start + -(-alike // size) * size], size))
            start += len(self.groups[-1][0])
        self.counts, self.step, self.process = [len(rows)], step, process
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return sum(-(-len(rows) // size) for rows, size in self.groups) * self.step // self.process[1]

    def __iter__(self) -> Iterator[list[int]]:
        random, (index, processes) = np.random.default_rng([self.seed, self.epoch]), self.process
        shuffled = [(random.permutation(rows), size) for rows, size in self.groups]
        *steps, last = [rows[i : i + size] for rows, size in shuffled for i in range(0, len(rows), size)]
        for rows in [*(steps[i] for i in random.permutation(len(steps))), last]:
            batches = np.array_split(np.resize(rows, max(len(rows), self.step)), self.step)
            yield from (batch.tolist() for batch in batches[index::processes])


def order_of(rows: Dataset, mix: str | None, files: int, args: TrainingArguments) -> RowOrder | TokenBatches | None:
    """The order of training rows from so many files; None: one that the Trainer knows. Raises UserError for the mix."""
    groups = args.train_sampling_strategy == "group_by_length"
    if not (mix or groups):
        return None
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.tokens_per_batch:
        step = args.gradient_accumulation_steps * args.processes
        process = (args.process_index, args.processes)
        return TokenBatches(lengths_of(rows), args.tokens_per_batch, step, process, seed)
    origins = columns_of(rows, "file")["file"] if mix else np.zeros(len(rows), np.int8)
    shares = parse_mix(mix, files) if mix else [1.0]
    return RowOrder(origins, shares, seed, lengths_of(rows) if groups else None, args.all_rows_per_step)
