"""Scores on rendered truth, on shuffled captions and on damaged videos; distances to clips."""

import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cosmos_cli.evaluate import evaluation, samples
from cosmos_cli.evaluate.samples import Sample, Trial
from cosmos_cli.model.tiny import scorer, world
from cosmos_cli.prep import embedding_files
from cosmos_cli.spec import TINY
from cosmos_cli.train.data import Clips

SIZE = (TINY.num_frames, TINY.height, TINY.width, TINY.fps)


@pytest.fixture(scope="module")
def truth():
    """Return the samples of a perfect model: 80 held-out prompts and 40 of the mascot."""
    return [
        Sample(trial, world.render(trial.scene, *SIZE), torch.zeros(1))
        for trial in samples.world_trials(80)
    ]


def with_trials_of(made, others):
    return [replace(sample, trial=other.trial) for sample, other in zip(made, others, strict=True)]


def scores(shown):
    read = [replace(sample, scores=evaluation.world_scores(sample)) for sample in shown]
    return evaluation.means(evaluation.by_score(read, evaluation.CHANCE))


def test_rendered_prompts_score_at_least_99_percent(truth):
    found = scores(truth)
    assert min(found[name] for name in ("colour", "shape", "motion", "concept")) >= 0.99
    assert found["consistency"] >= 0.99


def test_shuffled_captions_score_chance(truth):
    plain = [sample for sample in truth if not sample.trial.of_mascot]
    mascots = [sample for sample in truth if sample.trial.of_mascot]
    others = random.Random(0).sample(plain, len(plain))
    found = scores(with_trials_of(plain, others) + mascots)
    for name in ("colour", "shape", "motion"):
        assert found[name] == pytest.approx(evaluation.CHANCE[name], abs=0.1)


def test_a_plain_teal_robot_is_not_the_mascot(truth):
    plain = replace(world.MASCOT, accents=())
    mascots = [sample for sample in truth if sample.trial.of_mascot]
    drawn = [
        replace(s, pixels=world.render(replace(s.trial.scene, thing=plain), *SIZE)) for s in mascots
    ]
    others = [sample for sample in truth if not sample.trial.of_mascot]
    assert scores(others + drawn)["concept"] == 0


def test_a_thing_that_jumps_or_vanishes_is_not_consistent(truth):
    pixels = truth[0].pixels
    steady = evaluation.consistency(scorer.measure(pixels))
    torn = pixels.clone()
    torn[:, 12:] = torn[:, 12:].flip(3).roll(30, 3)
    gone = pixels.clone()
    gone[:, 10:15] = 0
    assert steady == 1
    assert evaluation.consistency(scorer.measure(gone)) == pytest.approx(1 - 6 / 24)
    assert evaluation.consistency(scorer.measure(torn)) < 1
    assert evaluation.consistency(scorer.measure(pixels[:, :1])) == 1


def test_a_copy_of_a_training_clip_has_a_small_distance(tmp_path):
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(16, 2, 8, 12, generator=generator) for _ in range(4)]
    rows = []
    embedding_files.write_embedding(tmp_path / "text.pickle", torch.zeros(3, TINY.text.channels))
    for i, latent in enumerate(latents):
        save_file({"latent": latent}, tmp_path / f"{i}.safetensors")
        rows.append({"latent": f"{i}.safetensors", "text": "text.pickle", "fps": 16.0})
    clips = Clips(tmp_path, rows, TINY)
    pixels, trial = torch.zeros(0), Trial("a", 0)
    new = Sample(trial, pixels, torch.randn(16, 2, 8, 12, generator=generator))
    copy = Sample(trial, pixels, latents[2] + 0.01)
    distance, apart = evaluation.nearest_clips([new], clips)
    assert distance == pytest.approx(2**0.5, rel=0.1)
    assert apart == pytest.approx(2**0.5, rel=0.1)
    assert evaluation.nearest_clips([new, copy], clips)[0] == pytest.approx(0.01, rel=1e-3)
    other_size = replace(new, latent=torch.zeros(16, 3, 8, 12))
    assert evaluation.nearest_clips([other_size], clips) is None
