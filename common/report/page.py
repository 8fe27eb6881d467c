"""The record of a training (run.json) -> report.html: one file that asks no network for anything."""

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

LARGEST = 1_000_000  # bytes of the page
POINTS = 2000  # of a curve
EVALUATIONS = 12  # whose answers are shown
# Characters of a text and items of a list. The next pair is taken only if a page is too large with the one before.
BOUNDS = ((2000, 400), (400, 100), (60, 20), (10, 4))
ROOM_FOR_ROWS = 100_000  # bytes that the rest of the page leaves at least
SCRIPTS = ("words.js", "charts.js", "rows.js", "facts.js", "results.js", "report.js")
COPIED = (
    *("status", "problem", "updated", "method", "model", "output_dir", "settings", "pieces", "progress", "data"),
    *("best_step", "scores", "warnings"),
)
CURVES = (
    *("loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory"),
    *("eval_rouge-1", "eval_rouge-2", "eval_rouge-l", "eval_bleu-4"),
)
CELLS = ("row", "question", "reference", "base", "tuned", "base_score", "score")


def page(record: dict) -> str:
    """The whole text of report.html, at most LARGEST bytes in UTF-8 for every record; any key may be missing."""
    room = LARGEST - len(filled("", "").encode())
    for bounds in BOUNDS:
        overview = as_json(overview_of(record, *bounds))
        left = room - len(overview.encode())
        if left >= ROOM_FOR_ROWS:
            break
    rows = record.get("rows") or {}
    chosen = chosen_rows(rows.get("rows") or [], left, *bounds)
    return filled(overview, f"[{','.join(chosen)}]")


def filled(record: str, rows: str) -> str:
    """The template with its style, its script and two texts in JSON."""
    template, parts = assets()
    return template.substitute(parts, record=record, rows=rows)


@cache
def assets() -> tuple[Template, dict[str, str]]:
    """The template, and the parts of it that are the same in every page."""
    folder = Path(__file__).parent
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    hashes = {f"{name}_hash": digest(text) for name, text in (("style", style), ("script", script))}
    template = Template((folder / "report.html").read_text(encoding="utf-8"))
    return template, {"style": style, "script": script, **hashes}


def digest(text: str) -> str:
    """The SHA-256 by which a browser knows an inline style or script that may be used."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def as_json(value: Any) -> str:
    """JSON that can't end the script element it stands in, and that UTF-8 can hold (half characters become "?")."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def overview_of(record: dict, characters: int, items: int) -> dict[str, Any]:
    """All that the page shows except the rows, bounded."""
    samples = record.get("samples") or {}
    answers = samples.get("answers") or []
    pieces = record.get("pieces") or []
    shown: dict[str, Any] = {key: record.get(key) for key in COPIED}
    shown["samples"] = {"rows": samples.get("rows"), "answers": spread(answers, EVALUATIONS)}
    totals = {
        "evaluations": len(answers),
        "rows": (record.get("rows") or {}).get("total"),
        "seconds": sum(piece.get("seconds") or 0 for piece in pieces),
        "tokens": sum(piece.get("tokens") or 0 for piece in pieces),
    }
    curves = curves_of(record.get("logs") or [])
    return bounded(shown, characters, items) | {"curves": curves, "totals": totals}


def bounded(value: Any, characters: int, items: int) -> Any:
    """``value`` with shorter texts and lists, without keys whose value is None.

    A number that is not finite, which JSON can't hold, becomes None.
    """
    if isinstance(value, str):
        cut = len(value) - characters
        return f"{value[:characters]}… [+{cut:,}]" if cut > 0 else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        pairs = [(key, part) for key, part in value.items() if part is not None][:items]
        return {bounded(str(key), characters, items): bounded(part, characters, items) for key, part in pairs}
    if isinstance(value, list | tuple):
        return [bounded(part, characters, items) for part in spread(value, items)]
    return value


def spread(values: list | tuple, most: int) -> list:
    """At most ``most`` (2 or more) values at even distances: the first, the last and others."""
    if len(values) <= most:
        return list(values)
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def curves_of(logs: list[dict]) -> dict[str, list[list]]:
    """{name: [steps, values]} of the curves that the logs hold, thinned; a value that is not finite is None."""
    curves = {}
    for name in CURVES:
        points = [(log["step"], rounded(log[name])) for log in logs if log.get(name) is not None and "step" in log]
        if points:
            curves[name] = [list(part) for part in zip(*thinned(points), strict=True)]
    return curves


def rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def thinned(points: list[tuple[int, float | None]]) -> list[tuple[int, float | None]]:
    """At most POINTS points: the first, the last, and of each of many parts both extremes and the first None."""
    if len(points) <= POINTS:
        return points
    length = math.ceil(len(points) / ((POINTS - 2) // 3))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), length):
        part = range(start, min(start + length, len(points)))
        numbers = [(value, i) for i in part if (value := points[i][1]) is not None]
        kept |= {min(numbers)[1], max(numbers)[1]} if numbers else set()
        kept |= set([i for i in part if points[i][1] is None][:1])
    return [points[i] for i in sorted(kept)]


def chosen_rows(rows: list[dict], room: int, characters: int, items: int) -> list[str]:
    """Rows as JSON lists of their CELLS, worst first, in at most ``room`` bytes.

    If not all fit, half of the room is for the worst ones, and the others are drawn evenly by score.
    """
    ordered = sorted(rows, key=lambda row: math.inf if row.get("score") is None else row["score"])
    packed = [as_json(bounded([row.get(cell) for cell in CELLS], characters, items)) for row in ordered]
    if weight(packed) <= room - 2:
        return packed
    worst = fitting(packed, room // 2)
    rest, left = packed[len(worst) :], room - 2 - weight(worst)
    return worst + fitting(rest[:: math.ceil(weight(rest) / left)], left)


def weight(texts: Iterable[str]) -> int:
    """Bytes, with a comma behind each text."""
    return sum(len(text.encode()) + 1 for text in texts)


def fitting(texts: list[str], room: int) -> list[str]:
    """The first texts that take at most ``room`` bytes together."""
    for number, text in enumerate(texts):
        room -= weight([text])
        if room < 0:
            return texts[:number]
    return texts
