"""Splits are the same each time, cover every row once, and keep groups together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning import LoRAError
from lora_lightning.data.io.splits import SplitConfig, split_rows


@given(groups=st.lists(st.integers(0, 30), min_size=80, max_size=200), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_every_row_is_in_one_split_and_no_group_is_in_two(groups, seed):
    config = SplitConfig(validation=0.2, test=0.2, seed=seed)
    if len(set(groups)) < 8:
        return
    rows = split_rows(groups, config)
    assert sorted(r for numbers in rows.values() for r in numbers) == list(range(len(groups)))
    held = [{groups[r] for r in numbers} for numbers in rows.values()]
    assert sum(map(len, held)) == len(set(groups))
    assert rows == split_rows(groups, config)


def test_shares_are_of_the_groups_and_leave_something_to_train_on():
    rows = split_rows(range(100), SplitConfig(validation=0.1, test=0.3))
    assert [len(rows[name]) for name in ("train", "validation", "test")] == [60, 10, 30]
    with pytest.raises(LoRAError, match="2 rows are too few to split"):
        split_rows([1, 2], SplitConfig())
    with pytest.raises(LoRAError, match="below 1 together"):
        SplitConfig(validation=0.5, test=0.5)
