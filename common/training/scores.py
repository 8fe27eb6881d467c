"""What an evaluation leaves: losses, scores, and the answers row by row, base beside tuned."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

from common.arguments import DataArguments
from common.data.dataset import Prepared
from common.errors import note
from common.metrics import SCORES, mean_scores, score_rows
from common.report.card import write_csv
from common.report.facts import chosen_rows
from common.report.record import Record
from common.terminal import show
from common.training.evaluation import ANSWERS, Judgement
from common.training.saves import combine_results
from common.training.summary import peak_memory, print_answers, print_scores
from common.training.trainer import FinetuneTrainer

TABLE = "predictions.csv"
Scores = Mapping[str, Sequence[dict[str, float] | None]]
"""The scores of each answer of base and tuned; None: one side is empty, or there is no reference."""


def save_judgements(
    trainer: FinetuneTrainer,
    splits: Mapping[str, Prepared],
    data_args: DataArguments,
    found: dict[str, Judgement],
    record: Record | None,
) -> None:
    """Writes and prints what --do_eval and --do_predict ask; ``found``: of tuned, and before it of base if asked for.

    eval_results.json: the losses, and perplexities of text. predict_results.json: the scores of the answers that have
    a reference. The loss on the general questions stands in one of them. predictions.csv: the answers with scores.
    """
    args = trainer.args
    if args.do_predict and record and "base" not in found:
        found = former_base(Path(args.output_dir), record, len(splits["test"].questions)) | found
    columns: dict[str, dict[str, float]] = {name: {} for name in found}
    if args.do_eval:
        save_losses(trainer, data_args, found, columns)
    scores: Scores = {}
    if args.do_predict:
        scores = save_scores(trainer, list(splits["test"].questions["reference"]), found, columns)
    for name, judged in found.items():
        columns[name] |= judged.probed
    if record is None:  # not the first process
        return
    former = record.data["scores"]  # of the same rows: an evaluation of the tuned model keeps those of the base
    record.data["scores"] = former | {name: former.get(name, {}) | column for name, column in columns.items()}
    print_scores(record.data["scores"])
    if args.do_predict:
        record.data["rows"] = save_answers(Path(args.output_dir), splits["test"], found, scores)
    combine_results(Path(args.output_dir))


def former_base(folder: Path, record: Record, count: int) -> dict[str, Judgement]:
    """The base's answers of an earlier evaluation, if the record has its scores on the same rows."""
    lines = read_lines(folder / ANSWERS["base"]) if "base" in record.data["scores"] else []
    answers = [line["predict"] for line in lines if isinstance(line.get("predict"), str)]
    return {"base": Judgement({}, {}, answers)} if len(answers) == count else {}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] for a missing or a broken one."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return [line for line in lines if isinstance(line, dict)]


def save_losses(
    trainer: FinetuneTrainer,
    data_args: DataArguments,
    found: Mapping[str, Judgement],
    columns: dict[str, dict[str, float]],
) -> None:
    """Adds the losses of the validation rows, and perplexities of text, to ``columns``."""
    metrics: dict[str, float] = {}
    for name, judged in found.items():
        if not judged.metrics:  # of an earlier evaluation
            continue
        prefix = "eval_base" if name == "base" else "eval"
        probed = {} if trainer.args.do_predict else judged.probed
        metrics |= judged.metrics | {f"{prefix}_{metric}": value for metric, value in probed.items()}
        columns[name]["loss"] = judged.metrics[f"{prefix}_loss"]
    if data_args.text_column:
        losses = {name: value for name, value in metrics.items() if name.endswith("_loss")}
        metrics |= {name.replace("_loss", "_perplexity"): math.exp(loss) for name, loss in losses.items()}
        for column in columns.values():
            column["perplexity"] = math.exp(column["loss"])
    trainer.save_metrics("eval", metrics, combined=False)


def save_scores(
    trainer: FinetuneTrainer,
    references: list[str | None],
    found: Mapping[str, Judgement],
    columns: dict[str, dict[str, float]],
) -> Scores:
    """Adds the mean scores of the answers that have a reference to ``columns``."""
    scores = {name: score_rows(judged.answers, references) for name, judged in found.items()}
    given = [reference is not None for reference in references]
    metrics: dict[str, float] = {}
    for name, judged in found.items():
        means = mean_scores(list(compress(scores[name], given))) if any(given) else {}
        columns[name] |= means
        prefix = "predict" if name == "tuned" else "predict_base"
        metrics |= {f"{prefix}_{metric}": value for metric, value in (means | judged.probed).items()}
    memory = {"predicted_memory": trainer.predicted_memory, **peak_memory()}
    trainer.save_metrics("predict", metrics | memory | {"predict_samples": len(references)}, combined=False)
    return scores


def save_answers(folder: Path, data: Prepared, found: Mapping[str, Judgement], scores: Scores) -> dict[str, Any]:
    """Writes predictions.csv, and prints a few answers below their questions. Returns the rows for the record."""
    questions, references = list(data.questions["text"]), list(data.questions["reference"])

    def row(at: int) -> dict[str, Any]:
        facts = {"row": at + 1, "question": questions[at], "reference": references[at]}
        return facts | {name: judged.answers[at] for name, judged in found.items()}

    nothing = dict.fromkeys(SCORES, 0.0)  # of a pair with an empty side, as in the means

    def all_scores(at: int) -> dict[str, float]:
        pairs = ((name, {} if references[at] is None else scores[name][at] or nothing) for name in found)
        return {f"{name} {metric}": value for name, pair in pairs for metric, value in pair.items()}

    columns = [f"{name} {metric}" for name in found for metric in SCORES]
    lines = (dict.fromkeys(columns) | row(at) | all_scores(at) for at in range(len(questions)))
    try:
        write_csv(folder / TABLE, lines, ["row", "question", "reference", *found, *columns])
    except OSError as error:
        note(f"warning: {folder / TABLE} can't be written ({error.strerror}): the answers are in {ANSWERS['tuned']}.")
    print_answers([row(at) for at in range(min(3, len(questions)))])
    if missing := references.count(None):
        show(f"{missing:,} of {len(references):,} questions have no reference: answered, not scored")
    names = {"base": "base_score", "tuned": "score"}
    characters = sum(map(len, questions)) + sum(len(text) for judged in found.values() for text in judged.answers)
    kept = chosen_rows([(pair or {}).get("rouge-l") for pair in scores["tuned"]], characters)
    rows = [row(at) | {names[name]: all_scores(at).get(f"{name} rouge-l") for name in found} for at in kept]
    return {"total": len(questions), "rows": rows}
