"""Scores of continued clips in closed form, and the figures of a model."""

import math

import pytest
import torch

from cosmos_cli.evaluate import comparison, continuation, page
from cosmos_cli.evaluate.continuation import REPEATED, ROUND_TRIP, Clip
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.model import rgb
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tiny.trajectory import Trajectory
from cosmos_cli.model.tiny.world import Scene, Thing
from cosmos_cli.recipe import loading
from cosmos_cli.spec import TINY_VIDEO2WORLD

SIZE = (25, 96, 160, 16.0)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).byte()


def test_the_psnr_of_a_constant_difference_is_its_closed_form():
    grey = torch.full((3, 2, 24, 24), 100).byte()
    brighter = grey.clone()
    brighter[:, 1] += 10
    found = rgb.frame_psnr(grey, brighter).tolist()
    assert found == pytest.approx([rgb.MOST_PSNR, 20 * math.log10(255 / 10)], abs=1e-3)


def test_the_ssim_of_constant_frames_is_its_closed_form():
    x, y = (torch.full((3, 1, 16, 16), value).byte() for value in (51, 204))
    # Without variance, only the brightness 2 x y / (x^2 + y^2) is left.
    expected = (2 * 0.2 * 0.8 + 0.01**2) / (0.2**2 + 0.8**2 + 0.01**2)
    assert rgb.frame_ssim(x, y).item() == pytest.approx(expected, abs=1e-4)


def test_the_ssim_is_1_for_equal_frames_and_falls_with_noise():
    frames = noise(3, 2, 32, 32)
    assert rgb.frame_ssim(frames, frames).tolist() == pytest.approx([1, 1], abs=1e-5)
    values = [
        rgb.frame_ssim(frames, (frames.float() * (1 - k) + 128 * k).byte())[0].item()
        for k in (0.1, 0.5, 0.9)
    ]
    assert 1 > values[0] > values[1] > values[2] > 0
    # The mirror image of a pattern around its mean has the opposite covariance.
    assert rgb.frame_ssim(frames, 255 - frames)[0] < -0.8


def glide(speed: float) -> torch.Tensor:
    scene = Scene(Thing("ball", "blue", 0.18, -0.2), Trajectory((speed, 0.0)))
    return world.render(scene, *SIZE)


def test_the_position_error_is_the_distance_in_pixels():
    error_T = continuation.position_error(glide(0.5), glide(0.2), "blue")
    torch.testing.assert_close(error_T, torch.linspace(0, 0.3 * 96, 25), atol=0.1, rtol=0)


def test_a_thing_that_vanishes_is_one_picture_height_away():
    truth, made = glide(0.1), glide(0.1)
    made[:, 20:] = 128
    truth[:, 24:] = 128
    error_T = continuation.position_error(truth, made, "blue")
    assert error_T[:20].max() == 0 and error_T[20:24].tolist() == [96] * 4
    assert error_T[24].isnan()


def test_the_trivial_prediction_repeats_the_last_given_frame():
    clip = Clip(glide(0.4), torch.zeros(0), "")
    repeated = continuation.repeat_last(clip, 9)
    assert torch.equal(repeated[:, :9], clip.pixels[:, :9])
    assert (repeated[:, 9:] == clip.pixels[:, 8:9]).all() and repeated.shape == clip.pixels.shape
    error_T = continuation.position_error(clip.pixels[:, 9:], repeated[:, 9:], "blue")
    assert error_T[-1].item() == pytest.approx(0.4 * 16 / 24 * 96, abs=0.2)


def test_names_of_scores_can_be_typed_without_quotes():
    r = loading.load("tiny", [f"model={TINY_VIDEO2WORLD.name}"]).recipe
    better = continuation.directions(r, 4, held_out=True)
    (name,) = comparison.check_names(["position_error_bounces_9_given"], better)
    assert better[name] == "lower"
    # Nothing in a dataset's clips is tracked.
    assert "PSNR, held-out clips, 1 given" in better
    assert "position error, held-out clips, 1 given" not in better
    assert continuation.directions(r, 0, held_out=True) == {}


@pytest.mark.workflow
def test_a_model_is_measured_over_the_horizon_beside_trivial_predictions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = ("num_frames=17", "height=48", "width=80", "num_steps=2", "guidance=0")
    r = loading.load("tiny", [f"model={TINY_VIDEO2WORLD.name}", *keys]).recipe
    weights = Weights(r.model_files.dit, "")
    figures, shown = continuation.evaluate(r, {"a": weights, "b": weights}, 2, "cpu")
    lines = figures["horizon"]["position error, free motion, 9 given"]
    assert list(lines) == [REPEATED, ROUND_TRIP, "a", "b"]
    assert {len(line) for line in lines.values()} == {8} and lines["a"] == lines["b"]
    # The thing moves away from where it was last seen.
    assert lines[REPEATED] == sorted(lines[REPEATED])
    assert all(0 <= row["p"] <= 1 and row["difference"] == 0 for row in figures["comparisons"])
    assert len(figures["comparisons"]) == len(figures["models"]["a"]["continuation"]) == 12
    assert {name: len(own) for name, own in shown.items()} == {ROUND_TRIP: 4, "a": 4, "b": 4}
    written = page.write_page(tmp_path / "e.html", r, figures, shown)
    text = written[0].read_text()
    assert text.count("<svg") == 12 and "last frame repeated" in text
    assert text.count("<video") == 3
