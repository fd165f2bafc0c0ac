"""The order of examples is a function of (seed, epoch), the same however many processes share it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning import LoRAError
from lora_lightning.data.loading.sampler import EpochSampler

sizes = st.integers(1, 300)


def order_of(n, epoch=0, *, replicas=1, rank=0, batch=4, lengths=None, shuffle=True, seed=3):
    sampler = EpochSampler(
        range(n), batch_size=batch, lengths=lengths, shuffle=shuffle, seed=seed, num_replicas=replicas, rank=rank
    )
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert len(sampler) == len(order)
    return order


@given(n=sizes, epoch=st.integers(0, 5), grouped=st.booleans())
@settings(max_examples=40, deadline=None)
def test_each_example_comes_once_an_epoch_in_the_same_order_again(n, epoch, grouped):
    lengths = [(7 * i) % 23 for i in range(n)] if grouped else None
    order = order_of(n, epoch, lengths=lengths)
    assert sorted(order) == list(range(n))
    assert order == order_of(n, epoch, lengths=lengths)


@given(n=st.integers(4, 300), replicas=st.integers(2, 4), grouped=st.booleans())
@settings(max_examples=40, deadline=None)
def test_processes_together_see_the_batches_of_one_with_as_many_times_the_batch(n, replicas, grouped):
    lengths = [(5 * i) % 31 for i in range(n)] if grouped else None
    one = order_of(n, 1, batch=4 * replicas, lengths=lengths)
    ranks = [order_of(n, 1, batch=4, replicas=replicas, rank=r, lengths=lengths) for r in range(replicas)]
    assert len({-(-len(rank) // 4) for rank in ranks}) == 1, "a process with fewer batches would hang the others"
    for start in range(0, n - n % (4 * replicas), 4 * replicas):
        mine = {i for rank in ranks for i in rank[start // replicas : start // replicas + 4]}
        assert mine == set(one[start : start + 4 * replicas])


@given(n=st.integers(4, 100), replicas=st.integers(1, 4), batch=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_all_examples_count_once_in_training_and_padding_for_nothing(n, replicas, batch):
    counted, batches = [], set()
    for rank in range(replicas):
        sampler = EpochSampler(range(n), batch_size=batch, num_replicas=replicas, rank=rank)
        order = list(sampler)
        mine = [order[start : start + batch] for start in range(0, len(order), batch)]
        counted += [i for number, rows in enumerate(mine) if not sampler.is_padding(number) for i in rows]
        batches.add(len(mine))
    assert sorted(counted) == list(range(n))
    assert len(batches) == 1


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_evaluation_sees_each_example_once_in_order_and_training_in_another_by_epoch_and_seed(replicas):
    parts = [order_of(10, replicas=replicas, rank=r, shuffle=False) for r in range(replicas)]
    assert sorted(i for part in parts for i in part) == list(range(10))
    assert all(part == sorted(part) for part in parts)
    assert order_of(50, 2) != order_of(50, 1) != order_of(50, 1, seed=4)
    with pytest.raises(LoRAError, match="1 examples are fewer than the 2 processes"):
        order_of(1, replicas=2)


def test_grouping_by_length_pads_less_and_puts_the_longest_first():
    lengths = [(37 * i) % 101 + 1 for i in range(400)]

    def padded(order):
        return sum(8 * max(lengths[i] for i in order[s : s + 8]) for s in range(0, 400, 8))

    grouped, random = order_of(400, batch=8, lengths=lengths), order_of(400, batch=8)
    assert padded(grouped) < 0.7 * padded(random)
    assert max(lengths[i] for i in grouped[:8]) == max(lengths)
