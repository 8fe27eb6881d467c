"""Who can answer: a tuned model, other trainings on its base, and the base itself, all in the memory of one model."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.chat.about import About, about, output_folder
from common.chat.chat import load_chat
from common.chat.labels import said
from common.chat.rounds import BASE
from common.loading import load_model, method_of
from common.methods import Method
from common.models.precision import compute_dtype
from common.models.products import pack
from common.trained import base_of, holds_result, recorded_base
from common.training.saves import checkpoint_folders

MOST = 12  # trainings to choose from; each takes the memory of its prefix or adapter once it has answered

Opened = AbstractContextManager[PreTrainedModel]


class Speaker(NamedTuple):
    """``open`` gives a context to answer in; ``method`` is a name, "" for a whole model."""

    open: Callable[[], Opened]
    method: str
    about: About


def described(name: str, speaker: Speaker, language: str) -> str:
    """What is known about a speaker: its method, name, step, and the scores of base and tuned model."""
    facts = speaker.about
    method = speaker.method or said("all_weights", language)
    known = [said("untuned", language)] if name == BASE else [method, name]
    known += [said("step", language, step=facts.step)] if facts.step is not None else []
    known += ["ROUGE-L {:.2f} → {:.2f}".format(*facts.scores)] if facts.scores else []
    return " · ".join(known)


def load_speakers(
    args: argparse.Namespace, compare: str
) -> tuple[dict[str, Speaker], PreTrainedTokenizerBase, PreTrainedModel]:
    """The speakers by name, the loaded model first; the tokenizer; the model. Completes ``args`` as ``load_chat`` does.

    ``compare`` is "true" to load a second model where the base is not in the memory of the first.
    """
    model, tokenizer, trained = load_chat(args)
    pack(model)
    folder = args.checkpoint
    facts = about(folder) if folder else About()
    base = args.model_name_or_path or (recorded_base(folder)[1] if folder else "demo") or folder
    of_base = About(model=facts.model or Path(str(base)).name)
    if not folder:
        return {BASE: Speaker(partial(nullcontext, model), "", of_base)}, tokenizer, model
    method: Method | None = method_of(**trained) if trained else None
    name = method.name if method else ""
    facts = facts._replace(model=of_base.model)
    speakers = {label(folder, folder): Speaker(partial(nullcontext, model), name, facts)}
    if method:
        for other in trainings_beside(folder):
            opened = partial(open_later, cache(partial(method.more, model, other)))
            speakers[label(other, folder)] = Speaker(opened, name, about(other)._replace(model=of_base.model))
        speakers[BASE] = Speaker(partial(method.base, model), "", of_base)
    elif compare == "true":
        own = base_of(folder, args.model_name_or_path)
        second = load_model(own, compute_dtype(model.device), args.quantization_bit, device=model.device)
        speakers[BASE] = Speaker(partial(nullcontext, second), "", of_base)
    return speakers, tokenizer, model


def open_later(load: Callable[[], Callable[[], Any]]) -> Opened:
    """Loads a prefix or an adapter when it is asked for the first time."""
    return load()()


def trainings_beside(folder: Path) -> list[Path]:
    """The other results and checkpoints on the same base: those of the same training, and one of each beside it.

    Of a training that has no result the newest checkpoint counts.
    """
    output, own = output_folder(folder), recorded_base(folder)

    def fit(candidates: list[Path]) -> Iterator[Path]:
        for candidate in candidates:
            with suppress(OSError):
                if own[1] and holds_result(candidate) and recorded_base(candidate) == own:
                    yield candidate

    found = list(fit([output, *reversed(checkpoint_folders(output))]))
    for beside in sorted(output.resolve().parent.iterdir()):
        if beside != output.resolve():
            found += list(fit([beside, *reversed(checkpoint_folders(beside))]))[:1]
    return [each for each in found if each.resolve() != folder.resolve()][:MOST]


def label(folder: Path, own: Path) -> str:
    """The name of a trained folder beside the loaded one."""
    folder, output = folder.resolve(), output_folder(own.resolve())
    if folder == output or folder.parent == output or output_folder(folder) == folder:
        return folder.name
    return f"{folder.parent.name}/{folder.name}"
