import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_cli.train.data import Share, clip_of


@given(clips=st.integers(1, 50), seed=st.integers(0, 10), epoch=st.integers(0, 5))
def test_every_epoch_visits_every_clip_once(clips, seed, epoch):
    visited = [clip_of(epoch * clips + i, clips, seed) for i in range(clips)]
    assert sorted(visited) == list(range(clips))


def test_epochs_differ_in_order():
    orders = [[clip_of(e * 20 + i, 20, 0) for i in range(20)] for e in range(3)]
    assert orders[0] != orders[1] != orders[2]


@given(micro=st.integers(1, 4), accumulate=st.integers(1, 4), world=st.sampled_from([1, 2, 4, 8]))
def test_ranks_share_the_global_batch_without_overlap(micro, accumulate, world):
    total = micro * accumulate * world
    taken = [
        sample
        for rank in range(world)
        for batch in Share.of(rank, world, total, micro).micro_batches()
        for sample in batch
    ]
    assert taken == list(range(total))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="4"):
        Share.of(0, 3, 4, 1)
