"""How many slots of the training batches hold tokens, by the order of the rows.

    python tests/bench/batches.py --vocabulary ice_text.model --data DEV.json      AdvertiseGen, ChatGLM-6B's tokens
    python tests/bench/batches.py --spread                                         lengths of 20 to 2,000 tokens

Rows of AdvertiseGen have 64 + 64 tokens at most, as the official scripts cut them. ``--spread`` draws the lengths of
20,000 rows instead, with logarithms that are equally likely. Nothing is trained.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from rich.table import Table

from common.arguments import DataArguments
from common.data import collator
from common.data.dataset import prepare_dataset
from common.data.order import RowOrder, TokenBatches
from common.data.survey import lengths_of
from common.loading import load_tokenizer
from common.terminal import console
from common.tokenizers.chatglm import ChatGLMTokenizer

ROOT = Path(__file__).resolve().parents[2]
SIZES, SLOTS = (4, 16), (4096, 16384)


def share(lengths: np.ndarray, batches: Iterable) -> str:
    """The share of the slots that hold tokens. ``batches``: of indices of rows, or of the lengths of packed rows."""
    found = [each if isinstance(each, Packed) else lengths[list(each)] for each in batches]
    return f"{sum(sum(each) for each in found) / sum(len(each) * max(each) for each in found):.3f}"


class Packed(list[int]):
    """The lengths of the packed rows of a batch."""


def packed(lengths: np.ndarray, batches: Iterable) -> list[Packed]:
    """Up to the longest row there is."""
    rows = (lengths[batch].tolist() for batch in batches)
    return [
        Packed(sum(row[index] for index in indices) for indices in collator.share(row, int(lengths.max())))
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", help="ice_text.model; default: the demo's")
    parser.add_argument("--data", default=str(ROOT / "AdvertiseGen" / "train.json"))
    parser.add_argument("--spread", action="store_true")
    args = parser.parse_args()
    if args.spread:
        lengths = np.exp(np.random.default_rng(42).uniform(np.log(20), np.log(2000), 20_000)).astype(int)
    else:
        tokenizer = ChatGLMTokenizer(args.vocabulary) if args.vocabulary else load_tokenizer("demo")
        columns = DataArguments(max_source_length=64, max_target_length=64, train_file=args.data)
        lengths = lengths_of(prepare_dataset(columns, args.data, tokenizer, "train").rows)
    table = Table("", "random", "of like length", "random, packed")
    for size in SIZES:
        orders = (RowOrder(np.zeros(len(lengths), np.int8), [1], 42, grouped, size) for grouped in (None, lengths))
        drawn = [np.array(list(order)) for order in orders]
        batches = [np.split(rows, range(size, len(rows), size)) for rows in drawn]
        table.add_row(f"{size} rows", *(share(lengths, each) for each in [*batches, packed(lengths, batches[0])]))
    for slots in SLOTS:
        table.add_row(f"{slots:,} slots", "", share(lengths, TokenBatches(lengths, slots, 1, (0, 1), 42)))
    console().print(f"{len(lengths):,} rows of {lengths.min()} to {lengths.max():,} tokens, mean {lengths.mean():.0f}")
    console().print(table)


if __name__ == "__main__":
    main()
