"""The data report in the terminal: lengths beside their limits, cuts, repetitions, scripts, the strangest rows."""

from collections.abc import Mapping

from rich.table import Column, Table

from common.data.survey import PERCENTILES, RowFacts, Survey
from common.errors import note
from common.report.facts import MANY_CUT
from common.terminal import show

MANY_EQUAL, SHARE_EQUAL = 5, 0.1  # rows with one question: at least so many, and a larger share than that


def print_survey(split: str, found: Survey, files: list[str], scripts: Mapping[str, int], full: bool) -> None:
    """Prints the data report of a split, and warnings on stderr.

    scripts: letters of each script. full: repetitions, scripts and the strangest rows too, and lengths of a validation.
    """
    if full or split == "train":
        print_lengths(split, found)
    if full:
        print_content(found, files, scripts)
    warn(split, found, files)


def percent(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"


def print_lengths(split: str, found: Survey) -> None:
    """Rows, tokens, percentiles beside the limits, and the cut."""
    several = f" of {found.conversations:,} conversations or texts" if found.conversations < found.rows else ""
    title = f"{split}: {found.rows:,} rows{several}, {found.tokens:,} tokens"
    names = [*(f"{share}%" for share in PERCENTILES[:-1]), "longest", "limit"]
    headers = (Column(name, justify="right") for name in names)
    table = Table(Column(title), *headers, box=None, padding=(0, 2, 0, 0))
    if found.is_text:
        lines = {"text": (found.answered, "")}
    elif found.joint:
        room = f"{found.source_limit:,} + {found.target_limit:,} + 1"
        lines = {"question": (found.asked, ""), "answer": (found.answered, ""), "both": (found.both, room)}
    else:
        limits = f"{found.source_limit:,}", f"{found.target_limit:,}"
        lines = {"question": (found.asked, limits[0]), "answer": (found.answered, limits[1])}
    for name, (lengths, limit) in lines.items():
        table.add_row(f"  {name}", *(f"{length:,}" for length in lengths), limit)
    show(table)
    if found.cut:
        lost = f"{found.lost:,} tokens ({percent(found.lost, found.tokens)}) are lost"
        show(f"  cut: {found.cut:,} rows ({percent(found.cut, found.rows)}); {lost}")


def print_content(found: Survey, files: list[str], scripts: Mapping[str, int]) -> None:
    """The smallest lengths, repetitions, scripts, and the strangest rows."""
    lines = []
    if not found.is_text:
        lines.append(f"lengths that cut under 1% of the rows: {settings(found)}")
    lines.append(f"conversations or texts that occur again: {found.superfluous:,}")
    if found.first_with_it and found.commonest > 1:
        where = place(found.first_with_it, files)
        lines.append(f"rows with the commonest question: {found.commonest:,}, the first in {where}")
    letters = [f"{percent(count, sum(scripts.values()))} {name}" for name, count in scripts.items()]
    lines.append(f"letters: {', '.join(letters) or 'none'}")
    show(*(f"  {line}" for line in lines), sep="\n")
    if found.strangest:
        numbers = [Column(name, justify="right") for name in ("line or row", "question", "answer")]
        table = Table("file", *numbers, title="strangest rows by length, in tokens", title_justify="left")
        for row in found.strangest:
            table.add_row(files[row.file], *(f"{number:,}" for number in (row.line, row.asked, row.answered)))
        show(table)


def settings(found: Survey) -> str:
    """The lengths that would do, as variables and as flags."""
    source, target = found.smallest
    variables = f"MAX_SOURCE_LENGTH={source} MAX_TARGET_LENGTH={target}"
    return f"{variables} (--max_source_length {source} --max_target_length {target})"


def place(row: RowFacts, files: list[str]) -> str:
    return f"{files[row.file]}, line or row {row.line:,}"


def warn(split: str, found: Survey, files: list[str]) -> None:
    """Warns where many rows are cut, or ask the same."""
    if found.cut > MANY_CUT * found.rows:
        note(f"warning: {percent(found.cut, found.rows)} of the {split} rows are cut: {settings(found)} cut under 1%.")
    if found.commonest >= MANY_EQUAL and found.commonest > SHARE_EQUAL * found.rows and found.first_with_it:
        note(
            f"warning: {found.commonest:,} of {found.rows:,} {split} rows ask the same question, the first in "
            f"{place(found.first_with_it, files)}: is a column not read?"
        )


def warn_of_overlap(rows: int, conversations: int, questions: int) -> None:
    """Warns where some of the ``rows`` of a validation are trained too; the counts are those of ``overlap``."""
    if conversations or questions:
        note(
            f"warning: of {rows:,} validation rows {conversations:,} are training rows too, and {questions:,} have a "
            "question that is trained: their scores say little about new questions."
        )
