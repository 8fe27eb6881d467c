"""The model card, README.md of an output folder, which hubs show; and predictions.csv, which Excel opens."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import replaced
from common.hub.hubs import is_hub_name
from common.models.registry import is_local

MARK = "<!-- made from run.json; without this line the file is yours, and no training changes it -->"
SCORES = {"rouge-1": "ROUGE-1", "rouge-2": "ROUGE-2", "rouge-l": "ROUGE-L", "bleu-4": "BLEU-4", "loss": "loss"}
FOLDERS = {"P-Tuning v2": "ptuning", "LoRA": "lora", "full-parameter training": "full"}
UNTOUCHED = ("[More Information Needed]", "has been generated automatically")  # in the cards of PEFT and of the Trainer
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet begins to compute


def written_by_hand(file: Path) -> bool:
    """Whether a card is there that these scripts did not write, nor a library."""
    if not file.is_file():
        return False
    text = file.read_text(encoding="utf-8", errors="replace")
    return not any(part in text for part in (MARK, *UNTOUCHED))


def cell(text: object) -> str:
    """A text as a cell of a Markdown table."""
    return re.sub(r"([\\`*_\[\]!|])", r"\\\1", " ".join(str(text).replace("&", "&amp;").replace("<", "&lt;").split()))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    return [f"| {' | '.join(map(cell, row))} |" for row in (headers, ["---"] * len(headers), *rows)]


def head(model: Mapping[str, Any], method: str) -> list[str]:
    """The fields that hubs read."""
    name = str(model.get("name", ""))
    lines = ["---", "language: [zh, en]", "pipeline_tag: text-generation"]
    if is_hub_name(name) and not is_local(name):
        lines.append(f"base_model: {json.dumps(name)}")
    if method == "LoRA":
        lines.append("library_name: peft")
    return [*lines, "---"]


def model_card(record: Mapping[str, Any]) -> str:
    """README.md in Markdown. Texts of users stand in tables, without Markdown of their own."""
    model, method, scores = record["model"], record["method"], record["scores"]
    name, folder = Path(str(model.get("name", ""))).name, FOLDERS[method]
    progress, pieces = record["progress"], record["pieces"]
    lines = [*head(model, method), "", MARK, "", f"# {name}, {method}", ""]
    train = next((split for split in record["data"] if split["split"] == "train"), None)
    if pieces and train:
        lines.append(
            f"{cell(model.get('family', ''))}, {cell(name)}, trained by {method}: {progress.get('step', 0):,} steps, "
            f"{progress.get('epoch') or 0:.2f} epochs of {train['rows']:,} rows, "
            f"{progress.get('tokens', 0):,} tokens, "
            f"{sum(piece['seconds'] for piece in pieces) / 60:,.1f} minutes on {cell(pieces[-1]['device'])}. "
            f"Trained parameters: {model.get('trainable', 0):,} of {model.get('parameters', 0):,}."
        )
    if record["best_step"]:
        lines.append(f"The weights are those of step {record['best_step']:,}, the best in the validation.")
    if any(scores.values()):
        columns = [column for column in ("base", "tuned") if column in scores]
        rows = [
            [label, *(f"{scores[column][key]:.2f}" if key in scores[column] else "" for column in columns)]
            for key, label in SCORES.items()
            if any(key in scores[column] for column in columns)
        ]
        lines += ["", "## Scores / 得分", "", *table(["", *columns], rows)]
    lines += ["", "## Use / 使用", "", "```bash", f"CHECKPOINT=FOLDER bash {folder}/cli_demo.sh"]
    lines += [f"CHECKPOINT=FOLDER bash {folder}/web_demo.sh", "```"]
    if record["data"]:
        files = [
            [split["split"], Path(file["file"]).name, file["format"], f"{file['rows']:,}", split["hash"]]
            for split in record["data"]
            for file in split["files"]
        ]
        lines += ["", "## Data / 数据", "", *table(["", "file", "format", "rows", "hash of the tokens"], files)]
    answers, rows = record["samples"]["answers"], record["samples"]["rows"]
    if answers:
        cells = [
            [row["question"], row["reference"], answers[0]["answers"][at], answers[-1]["answers"][at]]
            for at, row in enumerate(rows)
        ]
        titles = ["question", "reference", f"step {answers[0]['step']}", f"step {answers[-1]['step']}"]
        lines += ["", "## Answers / 回答", "", *table(titles, cells)]
    settings = [[setting["flag"], setting["value"], setting["from"]] for setting in record["settings"]]
    lines += ["", "## Settings / 设置", "", *table(["flag", "value", "from"], settings)]
    if pieces:
        versions = ", ".join(f"{package} {number}" for package, number in pieces[-1]["versions"].items())
        lines += ["", f"Commit of the scripts: {pieces[-1]['commit'] or 'unknown'}; {versions}."]
    return "\n".join([*lines, ""])


def write_csv(file: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """UTF-8 with a byte order mark, by which Excel knows it. A text that a spreadsheet would compute gets a quote."""
    with replaced(file, encoding="utf-8-sig", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(columns)
        for row in rows:
            cells = [row[column] for column in columns]
            risky = [isinstance(each, str) and each.startswith(FORMULA) for each in cells]
            writer.writerow([f"'{each}" if quoted else each for each, quoted in zip(cells, risky, strict=True)])
