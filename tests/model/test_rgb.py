import pytest
import torch

from cosmos_cli.model import rgb


def grey(level):
    return torch.full((3, 2, 16, 16), level, dtype=torch.uint8)


def test_ssim_is_one_for_equal_videos_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (3, 4, 24, 32), dtype=torch.uint8, generator=generator)
    assert rgb.ssim(video, video) == pytest.approx(1)
    part = video.clone()
    part[..., :10] = 0
    assert 0.5 < rgb.ssim(video, part) < 0.95
    assert rgb.ssim(video, video.flip(-1)) < 0.2


def test_ssim_of_flat_frames_compares_their_luminance():
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 150 + c1) / (100**2 + 150**2 + c1)
    assert rgb.ssim(grey(100), grey(150)) == pytest.approx(expected, abs=1e-4)
