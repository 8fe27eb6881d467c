"""ROUGE-1/2/L and BLEU-4 for Chinese, computed as in the official evaluation."""

import logging
from statistics import fmean

import jieba
from rouge_chinese import Rouge

from common.locking import cache_folder, guard

SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def load_dictionary() -> None:
    """Loads jieba's dictionary once per process. Its cache is in our folder; one process writes it at a time."""
    if not jieba.dt.initialized:
        jieba.setLogLevel(logging.WARNING)
        jieba.dt.tmp_dir = str(cache_folder())
        with guard("dictionary", "jieba"):
            jieba.initialize()


def score_pair(prediction: str, reference: str) -> dict[str, float] | None:
    """Scores of one pair, 0 to 100, rounded to 4 decimals; None if one side is empty.

    ROUGE is the F1 of jieba's words. BLEU-4 compares characters, with nltk's smoothing method 3.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # takes half a second; few starts need it

    words = " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
    try:
        rouge = Rouge().get_scores(*words)[0]
    except ValueError:  # "Hypothesis is empty.", raised for a text of full stops too
        return None
    scores = {name: round(rouge[name]["f"] * 100, 4) for name in SCORES[:3]}
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return scores | {"bleu-4": round(bleu * 100, 4)}


def score_rows(predictions: list[str], references: list[str | None]) -> list[dict[str, float] | None]:
    """The scores of each pair, as ``score_pair``; None too without a reference.

    Raises ValueError if the numbers of predictions and references differ.
    """
    load_dictionary()
    pairs = zip(predictions, references, strict=True)
    return [None if given is None else score_pair(prediction, given) for prediction, given in pairs]


def mean_scores(pairs: list[dict[str, float] | None]) -> dict[str, float]:
    """Mean scores over all pairs, and ``empty``: the number of pairs that scored 0 because one side was empty."""
    means = {name: fmean(pair[name] if pair else 0.0 for pair in pairs) for name in SCORES}
    return means | {"empty": pairs.count(None)}


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """``mean_scores`` of pairs. Raises ValueError if the numbers of predictions and references differ."""
    return mean_scores(score_rows(predictions, [*references]))
