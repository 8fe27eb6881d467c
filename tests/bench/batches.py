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
from common.data.dataset import prepare_dataset
from common.data.order import RowOrder
from common.data.survey import lengths_of
from common.loading import load_tokenizer
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.training.report import console

ROOT = Path(__file__).resolve().parents[2]
SIZES = (4, 16)


def share(lengths: np.ndarray, batches: Iterable[Iterable[int]]) -> str:
    """The share of the slots that hold tokens."""
    found = [lengths[list(batch)] for batch in batches]
    return f"{sum(each.sum() for each in found) / sum(len(each) * each.max() for each in found):.3f}"


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
    table = Table("rows of a step", "random", "of like length")
    for size in SIZES:
        orders = (RowOrder(np.zeros(len(lengths), np.int8), [1], 42, grouped, size) for grouped in (None, lengths))
        drawn = [np.array(list(order)) for order in orders]
        table.add_row(str(size), *(share(lengths, np.split(rows, range(size, len(rows), size))) for rows in drawn))
    console().print(f"{len(lengths):,} rows of {lengths.min()} to {lengths.max():,} tokens, mean {lengths.mean():.0f}")
    console().print(table)


if __name__ == "__main__":
    main()
