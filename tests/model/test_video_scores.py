"""Scores of patterns whose values follow from the formulas."""

import math

import pytest
import torch

from cosmos_cli.model import video_scores


def waves(speed=0.0, contrast=0.5, period=32, frames=9):
    """Vertical stripes that move to the right, luminance (T, H, W)."""
    x_W = torch.arange(4 * period)
    shift_T = speed * torch.arange(frames)
    phase = 2 * math.pi * (x_W - shift_T[:, None]) / period
    return (0.5 + contrast / 2 * phase.sin())[:, None].expand(-1, 8, -1)


def brightness(values):
    return torch.tensor(values)[:, None, None] + 0.1 * waves(frames=len(values))


def test_a_still_video_is_consistent_and_does_not_move_or_flicker():
    still = waves()
    assert video_scores.frame_consistency(still) == pytest.approx(1)
    assert video_scores.motion_amount(still) == video_scores.flicker(still) == 0


@pytest.mark.parametrize("speed", [0.5, 1.0, 2.0])
def test_motion_amount_is_the_speed_of_stripes_in_pixels(speed):
    for contrast in (0.1, 0.9):
        found = video_scores.motion_amount(waves(speed, contrast))
        assert found == pytest.approx(speed, rel=0.02)


def test_consistency_is_the_cosine_of_the_phase_that_stripes_move_by():
    found = video_scores.frame_consistency(waves(speed=4))
    assert found == pytest.approx(math.cos(2 * math.pi * 4 / 32), abs=1e-4)
    noise = torch.rand(9, 64, 64, generator=torch.Generator().manual_seed(0))
    assert abs(video_scores.frame_consistency(noise)) < 0.02


def test_flicker_is_the_amplitude_of_alternating_brightness():
    alternating = brightness([0.5, 0.6] * 4)
    assert video_scores.flicker(alternating) == pytest.approx(0.05, rel=1e-4)
    fade = brightness([0.1 * i for i in range(8)])
    assert video_scores.flicker(fade) == pytest.approx(0, abs=1e-6)


def test_sharpness_is_the_frequency_of_stripes_at_any_contrast():
    for period in (16, 32):
        for contrast in (0.1, 0.9):
            found = video_scores.sharpness(waves(contrast=contrast, period=period))
            assert found == pytest.approx(2 * math.pi / period, rel=0.03)


def test_uint8_videos_are_measured_and_a_picture_has_only_sharpness():
    video = (255 * waves(1.0)).byte().expand(3, -1, -1, -1)
    found = video_scores.measure_video(video)
    assert found["motion amount"] == pytest.approx(1, rel=0.05)
    assert found.keys() == video_scores.SCORES.keys() == video_scores.MEANINGS.keys()
    assert video_scores.measure_video(video[:, :1]).keys() == {"sharpness"}
    black = video_scores.measure_video(torch.zeros(3, 9, 8, 8, dtype=torch.uint8))
    assert set(black.values()) == {0.0}
