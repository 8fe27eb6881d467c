"""The first training row in the terminal: what is given and what is learned, and on demand every token."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from common.terminal import console, show
from common.tokenizers.chatglm4 import ChatGLM4Tokenizer

LONGEST = 600  # characters of a block
BYTE = re.compile("<0x[0-9A-F]{2}>")  # as sentencepiece writes a byte
MOST_BYTES = 4  # of a character
GAP = 4  # columns between two tables


def print_first_row(row: Mapping[str, list[int]], tokenizer: PreTrainedTokenizerBase, tokens: bool) -> None:
    """Prints the blocks of a row (input_ids, labels) as text; ``tokens``: and a table of its tokens and labels."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    for learned, block in groupby(pairs, lambda pair: pair[1] != -100):
        ids = [index for index, _ in block]
        title = f"first row, {len(ids):,} tokens {'learned' if learned else 'given'}: "
        tokens_alone = " ".join(tokenizer.convert_ids_to_tokens(ids))  # where nothing but special tokens is given
        text = visible(tokenizer.decode(ids, skip_special_tokens=False) or tokens_alone)
        if len(text) > LONGEST:
            text = f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"
        show(Text.assemble((title, "dim"), (text, "green" if learned else "")))
    if tokens:
        show(token_table(list(cells_of(pairs, tokenizer)), console().width))


def visible(text: str) -> str:
    """With escapes for what can't be seen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def cells_of(pairs: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str, str]]:
    """(text, ids, labels) of each token; tokens that are bytes of one character are joined."""
    waiting: list[tuple[int, int]] = []
    for pair in pairs:
        waiting.append(pair)
        token, is_byte = token_of(tokenizer, pair[0])
        if is_byte:
            token = tokenizer.decode([index for index, _ in waiting])
            if "\ufffd" in token and len(waiting) < MOST_BYTES:
                continue
        elif len(waiting) > 1:
            yield cell("\ufffd", waiting[:-1])
            waiting = [pair]
        yield cell(token, waiting)
        waiting = []
    if waiting:
        yield cell("\ufffd", waiting)


def cell(text: str, pairs: Sequence[tuple[int, int]]) -> tuple[str, str, str]:
    ids, labels = zip(*pairs, strict=True)
    return visible(text).replace(" ", "▁"), " ".join(map(str, ids)), "-" if labels[0] == -100 else "learned"


def token_of(tokenizer: PreTrainedTokenizerBase, index: int) -> tuple[str, bool]:
    """The text of a token, and whether it holds a part of a character. GLM-4 has no other tokens than bytes."""
    if tokenizer.is_fast or isinstance(tokenizer, ChatGLM4Tokenizer):
        text = tokenizer.decode([index])
        return text, "\ufffd" in text
    token = tokenizer.convert_ids_to_tokens(index)
    return token, bool(BYTE.fullmatch(token))


def token_table(cells: Sequence[tuple[str, str, str]], width: int) -> Table:
    """In as many columns as fit into ``width``."""
    titles, longest = ("token", "id", "loss"), 24
    widths = [min(max(map(cell_len, column)), longest) for column in zip(titles, *cells, strict=True)]
    across = max(1, (width + GAP) // (sum(widths) + len(titles) - 1 + GAP))
    down = -(-len(cells) // across)
    columns, parts = Table.grid(padding=(0, GAP, 0, 0)), []
    for first in range(0, len(cells), down):
        headers = [
            Column("token", overflow="fold", max_width=longest),
            *(Column(title, justify="right") for title in titles[1:]),
        ]
        parts.append(Table(*headers, box=None, padding=(0, 1, 0, 0), pad_edge=False))
        for each in cells[first : first + down]:
            parts[-1].add_row(*each)
    columns.add_row(*parts)
    return columns
