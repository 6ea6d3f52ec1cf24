import math

import pytest
import torch

from cosmos_cli.model import edm
from cosmos_cli.spec import TINY

SIGMAS = torch.tensor([2e-4, 0.1, 0.5, 2.0, 80.0], dtype=torch.float64)


class Oracle(torch.nn.Module):
    """A network that makes the denoised estimate `x0 + off` at every noise level."""

    def __init__(self, x0, noise, sigma_B, off=0.0):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        c_skip, c_out, _, _ = edm.precondition(sigma, 0.5)
        self.net_out = (x0 + off - c_skip * (x0 + sigma * noise)) / c_out

    def forward(self, x, c_noise, text_emb, fps):
        return self.net_out


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(3)
    x0, noise = (torch.randn(3, 16, 2, 4, 4, generator=generator) for _ in range(2))
    return x0, noise, torch.tensor([0.05, 0.7, 9.0]), torch.zeros(3, 4, 8), torch.full((3,), 24.0)


def test_preconditioners_match_the_formulas():
    c_skip, c_out, c_in, c_noise = edm.precondition(SIGMAS, 0.5)
    for i, s in enumerate(SIGMAS.tolist()):
        assert c_skip[i].item() == pytest.approx(0.25 / (s * s + 0.25), rel=1e-12)
        assert c_out[i].item() == pytest.approx(s * 0.5 / math.sqrt(s * s + 0.25), rel=1e-12)
        assert c_in[i].item() == pytest.approx(1 / math.sqrt(s * s + 0.25), rel=1e-12)
        assert c_noise[i].item() == pytest.approx(math.log(s) / 4, rel=1e-12)


def test_weight_is_the_inverse_square_of_c_out():
    _, c_out, _, _ = edm.precondition(SIGMAS, 0.5)
    torch.testing.assert_close(edm.loss_weight(SIGMAS, 0.5) * c_out**2, torch.ones_like(SIGMAS))


def test_loss_is_zero_for_a_perfect_denoiser(sample):
    x0, noise, sigma_B, text_emb, fps_B = sample
    loss = edm.EDMLoss(Oracle(x0, noise, sigma_B), TINY)
    value, edm_B = loss(x0, sigma_B, noise, text_emb, fps_B)
    assert edm_B.max().item() < 1e-8
    assert value.item() == pytest.approx(0.0, abs=1e-8)


def test_loss_adds_the_log_variance(sample):
    x0, noise, sigma_B, text_emb, fps_B = sample
    loss = edm.EDMLoss(Oracle(x0, noise, sigma_B, off=0.1), TINY)
    torch.nn.init.normal_(loss.logvar.weight, std=0.1)
    value, edm_B = loss(x0, sigma_B, noise, text_emb, fps_B)
    v_B = loss.logvar(sigma_B.log() / 4)
    # The estimate is off by 0.1 everywhere.
    expected_B = 0.01 * (sigma_B**2 + 0.25) / (sigma_B * 0.5) ** 2
    torch.testing.assert_close(edm_B, expected_B, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        value, (expected_B * torch.exp(-v_B) + v_B).mean(), rtol=1e-3, atol=1e-5
    )


def test_draw_depends_on_its_key_alone():
    first = edm.sample_noise((0, 5, 2), (16, 2, 4, 4), 0.2)
    torch.manual_seed(99)
    again = edm.sample_noise((0, 5, 2), (16, 2, 4, 4), 0.2)
    assert first.sigma == again.sigma
    assert torch.equal(first.noise, again.noise)
    for key in ((1, 5, 2), (0, 6, 2), (0, 5, 3)):
        assert edm.sample_noise(key, (16, 2, 4, 4), 0.2).sigma != first.sigma


def test_draws_follow_the_training_distribution():
    draws = [edm.sample_noise((0, step, 0), (1,), 0.2) for step in range(4000)]
    ln_sigma = torch.tensor([math.log(d.sigma) for d in draws])
    assert ln_sigma.mean().item() == pytest.approx(0.0, abs=0.06)
    assert ln_sigma.std().item() == pytest.approx(1.0, abs=0.05)
    dropped = sum(not d.keep_text for d in draws) / len(draws)
    assert dropped == pytest.approx(0.2, abs=0.025)
