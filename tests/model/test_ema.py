import pytest
import torch

from cosmos_cli.model.ema import PowerEMA, power_beta, power_gamma


@pytest.mark.parametrize(("rate", "gamma"), [(0.1, 6.937204), (0.05, 16.972), (0.025, 36.987)])
def test_gamma_matches_the_published_exponents(rate, gamma):
    assert power_gamma(rate) == pytest.approx(gamma, abs=1e-3)


def test_gamma_gives_the_profile_the_requested_width():
    gamma = power_gamma(0.1)
    # Standard deviation of the density proportional to t^gamma on [0, 1].
    width = ((gamma + 1) ** 0.5) / ((gamma + 2) * (gamma + 3) ** 0.5)
    assert width == pytest.approx(0.1, rel=1e-9)


def test_average_follows_the_closed_form_for_a_hundred_updates():
    gamma = power_gamma(0.1)
    values = torch.randn(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ema = PowerEMA([torch.zeros(5)], 0.1)
    expected = torch.zeros(5, dtype=torch.float64)
    for i, value in enumerate(values):
        ema.update([value.float()], i)
        beta = (1 - 1 / (i + 1)) ** (gamma + 1) if i else 0.0
        assert power_beta(i, gamma) == pytest.approx(beta, abs=1e-12)
        expected = beta * expected + (1 - beta) * value
    torch.testing.assert_close(ema.shards[0].double(), expected, atol=1e-6, rtol=0)


def test_first_update_discards_the_loaded_average():
    ema = PowerEMA([torch.full((3,), 7.0)], 0.1)
    ema.update([torch.ones(3)], 0)
    assert torch.equal(ema.shards[0], torch.ones(3))


@pytest.mark.gpu
def test_an_average_in_cpu_memory_equals_one_on_the_gpu():
    generator = torch.Generator("cuda").manual_seed(0)

    def weights():
        shapes = (1000, 1000), (7,), (300, 5), (2000, 700)
        drawn = [torch.randn(s, generator=generator, device="cuda") for s in shapes]
        return [x.bfloat16() if x.ndim == 2 else x for x in drawn]

    first = weights()
    there, here = PowerEMA(first, 0.1), PowerEMA(first, 0.1, "cpu")
    for step in range(5):
        now = weights()
        there.update(now, step)
        here.update(now, step)
    for ours, theirs in zip(here.shards, there.shards, strict=True):
        assert not ours.is_cuda
        torch.testing.assert_close(ours, theirs.cpu(), atol=1e-6, rtol=1e-6)
