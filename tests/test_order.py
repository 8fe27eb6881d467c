"""The order of the training rows: files mixed by shares, steps of like length, and draws that a resume repeats."""

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from common.data.order import RowOrder, TokenBatches, parse_mix
from common.data.survey import lengths_of
from common.errors import UserError
from common.training.checkpoints import check_same

FILES = np.repeat([0, 1, 2], [60, 100, 5])


def counts(sampler: RowOrder, epoch: int) -> list[int]:
    sampler.epoch = epoch
    drawn = np.array(list(sampler))
    assert len(drawn) == len(sampler)
    return np.bincount(FILES[drawn], minlength=3).tolist()


def test_shares_count_rows_for_one_row_of_the_first_file():
    assert counts(RowOrder(FILES, [1, 0.3, 0], 42), 0) == [60, 18, 0]
    assert counts(RowOrder(FILES, [2, 1, 0], 42), 0) == [60, 30, 0]
    assert counts(RowOrder(FILES, [1, 0, 0.2], 42), 0) == [60, 0, 12]  # 5 rows: two passes and two rows


def test_an_epoch_draws_no_row_twice_unless_it_must():
    drawn = list(RowOrder(FILES, [1, 1, 0.2], 42))
    assert sorted(index for index in drawn if index < 60) == list(range(60))
    assert len({index for index in drawn if 60 <= index < 160}) == 60
    assert set(np.bincount([index - 160 for index in drawn if index >= 160])) == {2, 3}


def test_epochs_differ_and_repeat_exactly():
    first, again = (RowOrder(FILES, [1, 0.3, 0], 42) for _ in range(2))
    epochs = []
    for epoch in range(3):
        first.epoch = epoch
        epochs.append(list(first))
    again.epoch = 2
    assert list(again) == epochs[2]
    drawn = [{index for index in epoch if index >= 60} for epoch in epochs]
    assert drawn[0] != drawn[1] != drawn[2]
    assert list(RowOrder(FILES, [1, 0.3, 0], 43)) != epochs[0]


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
        RowOrder(np.array([0, 0, 2]), [1, 1, 1], 42)


def test_the_rows_of_a_step_have_like_lengths():
    lengths = np.random.default_rng(0).integers(20, 2000, 1003)
    order = RowOrder(np.zeros(1003), [1], 42, lengths, 16)
    epochs = []
    for epoch in range(2):
        order.epoch = epoch
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(1003))
        steps = lengths[epochs[-1][:992]].reshape(-1, 16)
        assert steps.sum() / (16 * steps.max(1)).sum() > 0.95  # 0.55 at random
        assert not (np.diff(steps.max(1)) > 0).all()  # short steps and long ones take turns
    assert epochs[0][992:] != epochs[1][992:]  # what fills no step
    assert set(map(tuple, np.reshape(epochs[0][:992], (-1, 16)))).isdisjoint(
        map(tuple, np.reshape(epochs[1][:992], (-1, 16)))
    )


def test_mixed_files_are_drawn_before_they_are_grouped():
    lengths = np.arange(len(FILES))[::-1]
    assert counts(RowOrder(FILES, [1, 0.3, 0.2], 42, lengths, 8), 1) == [60, 18, 12]


LENGTHS = np.exp(np.random.default_rng(0).uniform(np.log(20), np.log(2000), 3001)).astype(int)


def ranks(step: int, processes: int, epoch: int, lengths=LENGTHS) -> list[list[list[int]]]:
    """The batches of each process."""
    every = [TokenBatches(lengths, 4096, step, (index, processes), 42) for index in range(processes)]
    for each in every:
        each.epoch = epoch
    found = [list(each) for each in every]
    assert [len(batches) for batches in found] == [len(each) for each in every]
    return found


def test_batches_of_slots_hold_each_row_once_and_few_pads():
    for epoch in range(2):
        [batches] = ranks(1, 1, epoch)
        assert sorted(row for batch in batches for row in batch) == list(range(3001))
        slots = [len(batch) * LENGTHS[batch].max() for batch in batches]
        assert max(slots) <= 4096 < 1.2 * np.mean(slots)
        assert sum(LENGTHS) / sum(slots) > 0.95
        assert max(map(len, batches)) <= 4096 // 32  # more short rows would need the memory for as many prefixes
    assert len({frozenset(batch) for epoch in range(2) for batch in ranks(1, 1, epoch)[0]}) > len(batches)


def test_batches_of_slots_are_the_same_for_any_number_of_processes():
    [alone] = ranks(4, 1, 1)
    first, second = ranks(4, 2, 1)
    assert len(first) == len(second) and len(alone) % 4 == 0
    assert [batch for pair in zip(first, second, strict=True) for batch in pair] == alone


def test_a_few_rows_fill_all_batches_of_a_step():
    """Each process needs one: rows occur twice where there are fewer."""
    first, second = ranks(2, 2, 0, np.array([30]))
    assert first == second == [[0]]
    assert len(ranks(4, 1, 0, LENGTHS[:3])[0]) == 4


def test_lengths_are_those_of_selected_rows():
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in (3, 1, 4, 1, 5)]})
    assert lengths_of(rows).tolist() == [3, 1, 4, 1, 5]
    assert lengths_of(rows.take(3)).tolist() == [3, 1, 4]
    assert lengths_of(rows.select([4, 0, 2])).tolist() == [5, 3, 4]


def test_a_training_whose_order_was_not_recorded_goes_on_at_random():
    """As all trainings took their rows before the order was recorded."""
    now = {"seed": 42, "train_sampling_strategy": "random", "tokens_per_batch": None}
    earlier = {"seed": 42, "training_rows": "0"}
    check_same(Path("out"), earlier, now, "choose another")
    with pytest.raises(UserError, match="train_sampling_strategy was 'random', now 'group_by_length'"):
        check_same(Path("out"), earlier, now | {"train_sampling_strategy": "group_by_length"}, "choose another")
