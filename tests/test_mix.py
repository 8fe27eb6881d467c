"""Training files that are mixed by shares: the counts of an epoch, and draws that a resume repeats."""

import numpy as np
import pytest

from common.data.mix import MixSampler, parse_mix
from common.errors import UserError

FILES = np.repeat([0, 1, 2], [60, 100, 5])


def counts(sampler: MixSampler, epoch: int) -> list[int]:
    sampler.set_epoch(epoch)
    drawn = np.array(list(sampler))
    assert len(drawn) == len(sampler)
    return np.bincount(FILES[drawn], minlength=3).tolist()


def test_shares_count_rows_for_one_row_of_the_first_file():
    assert counts(MixSampler(FILES, [1, 0.3, 0], 42), 0) == [60, 18, 0]
    assert counts(MixSampler(FILES, [2, 1, 0], 42), 0) == [60, 30, 0]
    assert counts(MixSampler(FILES, [1, 0, 0.2], 42), 0) == [60, 0, 12]  # 5 rows: two passes and two rows


def test_an_epoch_draws_no_row_twice_unless_it_must():
    drawn = list(MixSampler(FILES, [1, 1, 0.2], 42))
    assert sorted(index for index in drawn if index < 60) == list(range(60))
    assert len({index for index in drawn if 60 <= index < 160}) == 60
    assert set(np.bincount([index - 160 for index in drawn if index >= 160])) == {2, 3}


def test_epochs_differ_and_repeat_exactly():
    first, again = (MixSampler(FILES, [1, 0.3, 0], 42) for _ in range(2))
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(first))
    again.set_epoch(2)
    assert list(again) == epochs[2]
    drawn = [{index for index in epoch if index >= 60} for epoch in epochs]
    assert drawn[0] != drawn[1] != drawn[2]
    assert list(MixSampler(FILES, [1, 0.3, 0], 43)) != epochs[0]


@pytest.mark.parametrize(
    ("mix", "says"),
    [
        ("1", "numbers for 1 files, but the training has 2"),
        ("1,0.3,2", "numbers for 3 files"),
        ("1,viel", "give numbers with commas"),
        ("0,1", "that of the first file is above 0"),
        ("1,-1", "at least 0"),
        ("1,nan", "at least 0"),
    ],
)
def test_a_mix_that_does_not_fit_is_refused(mix, says):
    with pytest.raises(UserError, match=says):
        parse_mix(mix, 2)


def test_a_file_without_rows_is_refused():
    with pytest.raises(UserError, match="a file has no row"):
        MixSampler(np.array([0, 0, 2]), [1, 1, 1], 42)
