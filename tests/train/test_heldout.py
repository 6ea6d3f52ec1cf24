from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_cli.model import edm
from cosmos_cli.prep import holdout
from cosmos_cli.spec import TINY, TINY_VIDEO2WORLD
from cosmos_cli.train.data import Clips
from cosmos_cli.train.heldout import HeldOut

names = st.lists(st.from_regex(r"[a-z0-9]{1,8}\.mp4", fullmatch=True), min_size=1, unique=True)


@given(names=names, share=st.floats(0.001, 0.5))
def test_some_videos_are_held_out_and_never_all(names, share):
    held_out = holdout.choose_held_out({name: name for name in names}, share)
    assert held_out <= set(names)
    assert len(held_out) < len(names)
    assert held_out or len(names) == 1
    assert abs(len(held_out) - share * len(names)) <= 1
    assert held_out == holdout.choose_held_out({name: name for name in names[::-1]}, share)


def test_copies_of_a_video_are_held_out_together_or_not_at_all():
    content = {f"{name}{copy}.mp4": name for name in "abcdefgh" for copy in range(3)}
    for share in (0.1, 0.3, 0.5):
        held_out = holdout.choose_held_out(content, share)
        assert 0 < len(held_out) < len(content)
        left = content.keys() - held_out
        assert {content[name] for name in held_out}.isdisjoint(content[name] for name in left)
    assert holdout.choose_held_out({"a.mp4": "x", "b.mp4": "x"}, 0.5) == set()


def test_a_share_of_zero_holds_nothing_out():
    assert holdout.choose_held_out({"a.mp4": "x", "b.mp4": "y"}, 0.0) == set()


def test_a_video_is_held_out_with_all_of_its_clips():
    manifest = {
        "videos": [{"file": "a.mp4", "split": "train"}, {"file": "b.mp4", "split": "heldout"}],
        "clips": [{"video": v, "latent": f"{v}{i}"} for i in range(3) for v in ("a.mp4", "b.mp4")],
    }
    train, held_out = holdout.split_clips(manifest)
    assert {clip["video"] for clip in train} == {"a.mp4"}
    assert {clip["video"] for clip in held_out} == {"b.mp4"}
    assert len(train) == len(held_out) == 3


@pytest.mark.parametrize(("clips", "most", "chosen"), [(2, 8, [0, 1]), (10, 4, [0, 2, 5, 7])])
def test_measured_clips_are_evenly_spaced_and_have_every_level(clips, most, chosen):
    levels = range(len(edm.FIXED_SIGMAS))
    rows = [{"latent": str(clip)} for clip in range(clips)]
    samples = HeldOut(Clips(Path(), rows, TINY), most).samples
    assert samples == [(clip, level, 0) for clip in chosen for level in levels]
    frames = HeldOut(Clips(Path(), rows, TINY_VIDEO2WORLD), most)
    assert frames.sigmas == tuple(2 * sigma for sigma in edm.FIXED_SIGMAS)
    assert frames.samples == [(clip, lvl, n) for clip in chosen for lvl in levels for n in range(3)]


def test_the_fixed_noise_levels_are_quantiles_of_the_trained_ones():
    drawn = sorted(edm.sample_noise((0, 0, i), (1,), 0.0).sigma for i in range(4000))
    for sigma, share in zip(edm.FIXED_SIGMAS, (0.125, 0.375, 0.625, 0.875), strict=True):
        below = sum(value < sigma for value in drawn) / len(drawn)
        assert below == pytest.approx(share, abs=0.02)


def test_the_key_of_measured_clips_changes_only_with_them():
    def manifest(*hashes, split="heldout"):
        clips = [
            {"video": f"{i}.mp4", "latent": f"{i}.st", "sha256": h, "text": "t"}
            for i, h in enumerate(hashes)
        ]
        videos = [{"file": f"{i}.mp4", "split": split} for i in range(len(hashes))]
        extra = {"video": "z.mp4", "latent": "z.st", "sha256": split, "text": "t"}
        return {"videos": videos, "clips": [*clips, extra]}

    key = holdout.measured_key(manifest("a", "b"), 8)
    assert key == holdout.measured_key(manifest("a", "b"), 9)
    other = manifest("a", "b")
    other["clips"][-1]["sha256"] = "a training clip"
    assert key == holdout.measured_key(other, 8)
    assert key != holdout.measured_key(manifest("a", "c"), 8)
    assert key != holdout.measured_key(manifest("a", "b"), 1)
    assert key != holdout.measured_key(manifest("a", "b", split="train"), 8)
