import itertools

import pytest
import torch

from cosmos_cli.train import reshard


def shares(parameters, ranks, group_ends):
    """The flat groups of every rank as ZeRO-3 lays them out, and how much of each it holds."""
    counts = [-(-len(p) // ranks) for p in parameters]
    padded = [
        torch.cat((p, p.new_zeros(c * ranks - len(p))))
        for p, c in zip(parameters, counts, strict=True)
    ]
    parts = [
        [p[rank * c : (rank + 1) * c] for p, c in zip(padded, counts, strict=True)]
        for rank in range(ranks)
    ]
    edges = [0, *group_ends, len(parameters)]
    spans = list(itertools.pairwise(edges))
    flat = [[torch.cat(own[low:high]) for low, high in spans] for own in parts]
    return flat, [counts[low:high] for low, high in spans]


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (3, 7), (7, 3), (1, 5), (4, 4)])
def test_shards_of_any_ranks_become_those_of_another_number(before, after):
    # Shorter than the ranks are many, and odd; the sub-groups end elsewhere.
    parameters = [torch.arange(1.0, n + 1) + 100 * n for n in (10, 1, 3, 64, 7)]
    old, counts = shares(parameters, before, [2])
    new, held = shares(parameters, after, [1, 4])
    saved = [count for group in counts for count in group]
    for rank in range(after):
        for group, expected in zip(reshard.cut(old, saved, held, rank), new[rank], strict=True):
            assert torch.equal(group, expected)


def test_a_last_part_without_padding_is_padded():
    whole = torch.arange(1.0, 11)
    old = [[whole[:4]], [whole[4:8]], [whole[8:]]]
    (last,) = reshard.cut(old, [4], [[6]], rank=1)
    assert torch.equal(last, torch.cat((whole[6:], torch.zeros(2))))
