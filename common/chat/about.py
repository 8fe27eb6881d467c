"""What a trained folder says about its training: for the chats, which show it and do without it."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from common.files import read_json
from common.trained import RUN_FILE

METRIC = "rouge-l"
MOST_QUESTIONS, LONGEST_QUESTION = 6, 200  # longer ones are no examples to click


class About(NamedTuple):
    """Facts about a trained folder; None and empty where it does not tell them."""

    model: str = ""  # name of the base model
    step: int | None = None
    scores: tuple[float, float] | None = None  # ROUGE-L of base and tuned model, 0 to 100
    questions: tuple[str, ...] = ()  # of the training rows


def output_folder(folder: Path) -> Path:
    """The output folder of a trained folder, which may be one of its checkpoints."""
    return folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder


def about(folder: Path) -> About:
    """The facts about a result or a checkpoint; a score is that of the result."""
    output = output_folder(folder)
    run, state = content(output / RUN_FILE), content(folder / "trainer_state.json")
    model, questions = entry(run, "model", "name"), entry(run, "questions")
    step = entry(state, "global_step")
    base: Any = None
    tuned: Any = None
    if folder == output:
        results = content(folder / "all_results.json")
        step = entry(run, "progress", "step") if step is None else step
        base = entry(run, "scores", "base", METRIC) or entry(results, f"predict_base_{METRIC}")
        tuned = entry(run, "scores", "tuned", METRIC) or entry(results, f"predict_{METRIC}")
    return About(
        model if isinstance(model, str) else "",
        step if is_number(step) else None,
        (base, tuned) if is_number(base) and is_number(tuned) else None,
        tuple(filter(is_question, questions))[:MOST_QUESTIONS] if isinstance(questions, list) else (),
    )


def content(file: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if it can't be read."""
    try:
        return read_json(file) or {}
    except OSError:
        return {}


def entry(value: Any, *names: str) -> Any:
    """The entry of nested objects; None if there is none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def is_question(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and len(value) <= LONGEST_QUESTION
