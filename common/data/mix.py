"""Several training files, mixed by shares: the rows of each epoch are drawn anew from a seed."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from common.errors import UserError


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


class MixSampler(Sampler[int]):
    """The indices of the rows of an epoch, shuffled.

    ``files``: the index of each row's file. Of file i an epoch takes shares[i] / shares[0] rows for each row of the
    first file: drawn without repetition, after whole passes where a file has fewer. Nothing but seed and epoch decides
    the draw, so a resumed training sees the rows of an uninterrupted one. Raises UserError for a file without rows.
    """

    def __init__(self, files: np.ndarray, shares: Sequence[float], seed: int):
        self.parts = [np.flatnonzero(files == index) for index in range(len(shares))]
        self.counts = [round(share / shares[0] * len(self.parts[0])) for share in shares]
        if any(count and not len(part) for part, count in zip(self.parts, self.counts, strict=True)):
            raise UserError("MIX (--mix): a file has no row to train.")
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng([self.seed, self.epoch])
        drawn = []
        for part, count in zip(self.parts, self.counts, strict=True):
            passes, rest = divmod(count, len(part)) if count else (0, 0)
            drawn += [part] * passes + [random.choice(part, rest, replace=False)] * bool(rest)
        yield from random.permutation(np.concatenate(drawn)).tolist()
