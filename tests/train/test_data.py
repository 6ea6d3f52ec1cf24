import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cosmos_cli import hashes
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import cond_frames
from cosmos_cli.prep import embedding_files
from cosmos_cli.spec import TINY, TINY_VIDEO2WORLD
from cosmos_cli.train.data import BatchSettings, Clips, Share, clip_of
from cosmos_cli.train.heldout import HeldOut


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


@pytest.fixture
def rows(tmp_path):
    """The rows of a manifest of three clips, whose files are in `tmp_path`."""
    empty = torch.zeros(3, TINY.text.channels)
    embedding_files.write_embedding(tmp_path / "text.pickle", empty)
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        latent = torch.randn(16, 4, 4, 6, generator=generator)
        save_file({"latent": latent}, tmp_path / f"{i}.safetensors")
    return [{"latent": f"{i}.safetensors", "text": "text.pickle", "fps": 16.0} for i in range(3)]


def test_a_latent_that_changed_since_prep_is_refused(tmp_path, rows):
    hashed = [{**row, "sha256": hashes.sha256_file(tmp_path / row["latent"])} for row in rows]
    clips = Clips(tmp_path, hashed, TINY)
    assert clips.latent(0).shape == (16, 4, 4, 6)
    shutil.copy(tmp_path / "1.safetensors", tmp_path / "0.safetensors")
    with pytest.raises(UserError, match=r"0\.safetensors: is not the latent") as caught:
        clips.latent(0)
    assert caught.value.code == ExitCode.DATASET


def test_an_embedding_that_changed_since_prep_is_refused(tmp_path, rows):
    file = tmp_path / "text.pickle"
    hashed = [{**row, "text_sha256": hashes.sha256_file(file)} for row in rows]
    clips = Clips(tmp_path, hashed, TINY)
    _, text_emb, _ = clips.read(0)
    assert not text_emb.any()
    embedding_files.write_embedding(file, torch.ones(3, TINY.text.channels))
    with pytest.raises(UserError, match=r"text\.pickle: is not the embedding") as caught:
        clips.read(0)
    assert caught.value.code == ExitCode.DATASET


def test_given_frames_are_drawn_beside_the_other_values_of_a_sample(tmp_path, rows):
    settings, samples = BatchSettings(seed=3, global_batch=4, text_dropout=0.2), range(1, 4)
    text = Clips(tmp_path, rows, TINY).batch(7, samples, settings)
    frames = Clips(tmp_path, rows, TINY_VIDEO2WORLD).batch(7, samples, settings)
    for name in ("x0", "noise", "text_emb", "fps_B"):
        assert torch.equal(getattr(text, name), getattr(frames, name)), name
    assert torch.equal(frames.sigma_B, 2 * text.sigma_B)
    assert text.given is None
    assert len(text.to(torch.device("cpu"))) == 5
    *_, given = frames.to(torch.device("cpu"))
    for i, sample in enumerate(samples):
        count, sigma, noise = cond_frames.sample_given((3, 7, sample), (16, 4, 4, 6))
        assert given.mask[i].flatten().tolist() == [frame < count for frame in range(4)]
        assert given.sigma_B[i].item() == pytest.approx(sigma)
        assert torch.equal(given.noise[i], noise)


def test_held_out_samples_differ_in_the_given_frames_only(tmp_path, rows):
    measured = HeldOut(Clips(tmp_path, rows, TINY_VIDEO2WORLD), 1)
    batches = [measured.batch(i) for i in range(3)]
    assert [int(batch.given[0]) for batch in batches] == [0, 1, 2]
    for batch in batches[1:]:
        assert torch.equal(batch.noise, batches[0].noise)
        assert torch.equal(batch.given[2], batches[0].given[2])
    errors = torch.arange(12, dtype=torch.float64).view(4, 3)
    figures = measured.figures(errors)
    assert figures["heldout"] == 5.5
    assert [figures[f"heldout_given_{count}"] for count in range(3)] == [4.5, 5.5, 6.5]
    assert sum(name.startswith("heldout_sigma_") for name in figures) == 4
