"""The numbers of the data report, from the columns of tokenized rows: lengths, cuts, repetitions, strange rows."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray

PERCENTILES = (50, 90, 95, 99, 100)
SHORTEST = 3  # tokens, the least that --max_source_length and --max_target_length may be
STRANGEST = 5  # rows
BINS = 40

SCRIPTS = {  # the letters of each script, as in a regular expression
    "Chinese": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Latin": "A-Za-zÀ-ÖØ-öø-ɏ\u1e00-\u1eff",
    "Japanese kana": "\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d",
    "Korean": "\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e",
    "Cyrillic": "\u0400-\u052f",
    "Greek": "\u0370-\u03ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Hebrew": "\u0590-\u05ff",
    "Devanagari": "\u0900-\u097f",
    "Thai": "\u0e00-\u0e7f",
}


def scripts_of(characters: Mapping[str, int]) -> dict[str, int]:
    """The number of letters of each script, the commonest first; ``characters``: the number of each character."""
    text = "".join(characters)
    found = {
        name: sum(characters[letter] for letter in re.findall(f"[{letters}]", text))
        for name, letters in SCRIPTS.items()
    }
    return dict(sorted(((name, count) for name, count in found.items() if count), key=lambda item: -item[1]))


class RowFacts(NamedTuple):
    """A tokenized row and its origin."""

    number: int  # its index in the tokenized rows
    file: int  # index in the list of files
    line: int  # its line, or its row where the file has no lines
    asked: int  # tokens of the question before anything is cut
    answered: int  # tokens of the answer


@dataclass
class Survey:
    """The numbers of one split. Lengths are tokens before anything is cut; percentiles are those of ``PERCENTILES``."""

    rows: int  # tokenized rows; a conversation of ChatGLM-6B and 2 gives one for each answer
    conversations: int  # rows of the files
    tokens: int
    asked: list[int]  # percentiles of the questions
    answered: list[int]  # of the answers
    both: list[int]  # of their sums
    source_limit: int
    target_limit: int
    joint: bool  # whether question and answer share the room of both limits
    is_text: bool  # plain text, which is split into blocks and never cut
    cut: int  # rows that lose tokens
    lost: int  # their lost tokens
    smallest: tuple[int, int]  # the lengths with the smallest sum that cut under 1% of the rows
    commonest: int  # rows with the commonest question
    first_with_it: RowFacts | None  # None without rows
    superfluous: int  # conversations that occurred before
    strangest: list[RowFacts]  # by length, the strangest first
    histograms: dict[str, tuple[list[int], list[int]]]  # edges in tokens and counts of question, answer and both


def survey(rows: Dataset, source_limit: int, target_limit: int, joint: bool) -> Survey:
    """Measures tokenized rows. ``joint``: the lengths share their room, as in ChatGLM3 and GLM-4."""
    columns = columns_of(rows, "file", "line", "row", "question", "asked", "answered")
    asked, answered = columns["asked"].astype(np.int64), columns["answered"].astype(np.int64)
    both = asked + answered
    asks = asked > 0
    if joint:
        excess = np.maximum(both - (source_limit + target_limit + 1), 0)
    else:
        excess = np.maximum(asked - source_limit, 0) + np.maximum(answered - target_limit, 0)
    excess[~asks] = 0  # plain text

    def facts(number: int) -> RowFacts:
        return RowFacts(number, *(int(columns[name][number]) for name in RowFacts._fields[1:]))

    origins = columns["file"].astype(np.int64) << 40 | columns["line"]
    firsts = first_of_each(origins)
    commonest, first = commonest_of(columns["question"], asks)
    return Survey(
        rows=len(both),
        conversations=len(firsts),
        tokens=int(both.sum()),
        asked=percentiles(asked),
        answered=percentiles(answered),
        both=percentiles(both),
        source_limit=source_limit,
        target_limit=target_limit,
        joint=joint,
        is_text=not asks.any(),
        cut=int(np.count_nonzero(excess)),
        lost=int(excess.sum()),
        smallest=smallest_lengths(asked[asks], answered[asks]),
        commonest=commonest,
        first_with_it=None if first is None else facts(first),
        superfluous=len(firsts) - len(first_of_each(columns["row"][firsts])),
        strangest=[facts(number) for number in strangest_of(both, origins)],
        histograms={
            name: histogram(lengths) for name, lengths in (("question", asked), ("answer", answered), ("both", both))
        },
    )


def overlap(train: Dataset, validation: Dataset) -> tuple[int, int]:
    """Counts the validation rows whose conversation, and those whose question, is in the training rows too."""
    ours, theirs = (columns_of(rows, "row", "question", "asked") for rows in (train, validation))
    same_row = is_in(theirs["row"], ours["row"])
    same_question = is_in(theirs["question"], ours["question"][ours["asked"] > 0]) & (theirs["asked"] > 0)
    return int(same_row.sum()), int(same_question.sum())


def is_in(values: NDArray, others: NDArray) -> NDArray:
    """Which values are among the others."""
    return pc.is_in(pyarrow.array(values), value_set=pyarrow.array(others)).to_numpy(zero_copy_only=False)


def columns_of(rows: Dataset, *names: str) -> dict[str, NDArray]:
    """Columns of whole numbers, in the order of the rows.

    Arrow would gather each of the selected rows on its own, for ten times the time and 2 KB a row.
    """
    return {name: in_order(rows, rows.data.column(name)) for name in names}


def lengths_of(rows: Dataset) -> NDArray:
    """The tokens of each row, which Arrow knows without reading them."""
    return in_order(rows, pc.list_value_length(rows.data.column("input_ids")))


def in_order(rows: Dataset, column: pyarrow.ChunkedArray) -> NDArray:
    """A column of the file as numbers of the rows, some of which may be selected."""
    values = column.to_numpy()
    return values if rows._indices is None else values[rows._indices.column(0).to_numpy()]


def percentiles(lengths: NDArray) -> list[int]:
    """For each of ``PERCENTILES`` the smallest length that so many rows don't exceed."""
    if not len(lengths):
        return [0] * len(PERCENTILES)
    return np.percentile(lengths, PERCENTILES, method="inverted_cdf").astype(int).tolist()


def histogram(lengths: NDArray) -> tuple[list[int], list[int]]:
    """(edges, counts) of at most ``BINS`` bins of equal width in whole tokens."""
    longest = int(lengths.max()) if len(lengths) else 0
    width = longest // BINS + 1
    edges = np.arange(0, longest + 2 * width, width)
    return edges.tolist(), np.histogram(lengths, edges)[0].tolist()


def first_of_each(values: NDArray) -> NDArray:
    """The index where each value is first."""
    return np.unique(values, return_index=True)[1]


def strangest_of(lengths: NDArray, origins: NDArray) -> list[int]:
    """The rows whose logarithms of length are farthest from the median, one of each origin."""
    if not len(lengths):
        return []
    logs = np.log(np.maximum(lengths, 1))
    distance = np.abs(logs - np.median(logs))
    found: dict[int, int] = {}  # origin: row
    for row in np.argsort(-distance, kind="stable"):
        if len(found) == STRANGEST or not distance[row]:
            break
        found.setdefault(int(origins[row]), int(row))
    return list(found.values())


def allowed(rows: int) -> int:
    """The most rows that are under 1% of all."""
    return max(0, -(-rows // 100) - 1)


def smallest_lengths(asked: NDArray, answered: NDArray) -> tuple[int, int]:
    """The lengths with the smallest sum that cut under 1%, where questions and answers have a limit each.

    In an evaluation they have one in each model, also where they share their room in a training.
    The longest questions are given up one by one. As many of the longest answers of the other rows can be given up as
    are left of the 1%: ``place`` is the first answer, longest first, that must fit.
    """
    if not len(asked):
        return 0, 0
    may_cut = allowed(len(asked))
    top = slice(-1, -2 - may_cut, -1)  # longest first; the one after the last that may be cut is there too
    by_question, by_answer = (np.argsort(lengths, kind="stable")[top].tolist() for lengths in (asked, answered))
    rank = {row: position for position, row in enumerate(by_answer)}
    given_up, place, sums = set(), may_cut, []
    for row in by_question:
        sums.append((int(asked[row] + answered[by_answer[place]]), int(asked[row])))
        given_up.add(row)
        if rank.get(row, place) >= place:
            place = next((better for better in range(place - 1, -1, -1) if by_answer[better] not in given_up), 0)
    total, source = min(sums)
    return max(source, SHORTEST), max(total - source, SHORTEST)


def commonest_of(values: NDArray, where: NDArray) -> tuple[int, int | None]:
    """How often the commonest of the values occurs, and the index where it is first; (0, None) without values."""
    indices = np.flatnonzero(where)
    if not len(indices):
        return 0, None
    _, firsts, counts = np.unique(values[indices], return_index=True, return_counts=True)
    most = int(counts.max())
    return most, int(indices[firsts[counts == most].min()])
