"""ROUGE-1/2/L and BLEU-4 for Chinese, by the formula of the official evaluation."""

import logging
from statistics import fmean

import jieba
from rouge_chinese import Rouge

from common.locking import cache_folder, guard

SCORES = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")


def load_dictionary() -> None:
    """Loads jieba's dictionary once per process, with its cache in our folder and one writer at a time."""
    if not jieba.dt.initialized:
        jieba.setLogLevel(logging.WARNING)
        jieba.dt.tmp_dir = str(cache_folder())
        with guard("dictionary", "jieba"):
            jieba.initialize()


def score_pair(prediction: str, reference: str) -> dict[str, float] | None:
    """Scores of one pair, 0 to 100, rounded to 4 decimals; None where one side has nothing to compare.

    ROUGE: F1 on jieba's words. BLEU-4: on characters, smoothing method 3 of nltk.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # half a second that most starts can spare

    words = " ".join(jieba.cut(prediction)), " ".join(jieba.cut(reference))
    try:
        rouge = Rouge().get_scores(*words)[0]
    except ValueError:  # "Hypothesis is empty.", also for a text of nothing but full stops
        return None
    scores = {name: round(rouge[name]["f"] * 100, 4) for name in SCORES[:3]}
    bleu = sentence_bleu([list(reference)], list(prediction), smoothing_function=SmoothingFunction().method3)
    return scores | {"bleu-4": round(bleu * 100, 4)}


def score(predictions: list[str], references: list[str]) -> dict[str, float]:
    """Mean scores over all pairs, and ``empty``: how many pairs counted as 0 because one side was empty."""
    load_dictionary()
    pairs = [score_pair(*pair) for pair in zip(predictions, references, strict=True)]
    means = {name: fmean(pair[name] if pair else 0.0 for pair in pairs) for name in SCORES}
    return means | {"empty": pairs.count(None)}
