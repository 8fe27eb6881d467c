"""ROUGE and BLEU-4 equal the scores of the official evaluation."""

import pytest

from common.metrics import load_dictionary, score, score_pair

ZERO = {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0, "bleu-4": 0.0}


@pytest.fixture(scope="module", autouse=True)
def dictionary():
    load_dictionary()


def check_pairs(pairs: list[dict]) -> None:
    for pair in pairs:
        assert score_pair(pair["pred"], pair["label"]) == pytest.approx(pair["scores"], abs=5e-5), pair["pred"]


def test_difficult_pairs(metrics_goldens):
    assert len(metrics_goldens["pairs"]) == 18
    check_pairs(metrics_goldens["pairs"])


def test_real_pairs_and_their_mean(real_rows):
    goldens = real_rows("metrics.json")
    pairs = goldens["pairs"][:50]
    check_pairs(pairs)
    means = score([pair["pred"] for pair in pairs], [pair["label"] for pair in pairs])
    assert means.pop("empty") == 0
    assert means == pytest.approx(goldens["means_over_first_50"], abs=1e-6)


def test_an_advertisement_against_another():
    """The official formula gives these numbers with the versions of requirements.txt."""
    scores = score_pair("白色的裙子简约大方，很显气质。", "这条白色的连衣裙简约大方，穿上很有气质。")
    assert scores == {"rouge-1": 60.8696, "rouge-2": 38.0952, "rouge-l": 60.8696, "bleu-4": 30.2453}


def test_empty_pairs_count_as_zero(metrics_goldens):
    """Each of these pairs ends the official evaluation with an error."""
    empty = metrics_goldens["empty_cases"]
    assert len(empty) == 8
    assert [score_pair(pair["pred"], pair["label"]) for pair in empty] == [None] * 8
    predictions = ["好看的裙子", *(pair["pred"] for pair in empty)]
    references = ["好看的裙子", *(pair["label"] for pair in empty)]
    scores = score(predictions, references)
    assert scores["empty"] == 8
    best = score(predictions[:1], references[:1])
    assert best["rouge-l"] == best["bleu-4"] == 100.0
    for name in ZERO:
        assert scores[name] == pytest.approx(best[name] / 9)


def test_nothing_but_empty_pairs():
    assert score(["", " "], ["好看", ""]) == {**ZERO, "empty": 2}


@pytest.mark.parametrize("text", ["。", ".", "...", "！？", "\u200b"])
def test_nothing_but_punctuation_is_no_error(text):
    """It counts as empty or scores 0."""
    scores = score([text], ["好看"])
    assert {name: scores[name] for name in ZERO} == ZERO


def test_another_number_of_references_is_an_error():
    with pytest.raises(ValueError):
        score(["好看", "好看"], ["好看"])
