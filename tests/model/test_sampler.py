import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from cosmos_cli.model import edm, sampler
from cosmos_cli.spec import FAST_LOG_SIGMAS, TINY

MEAN, STD = 0.3, 0.5


def ignore(_step):
    pass


def analytic(x, sigma):
    """The best estimate of x0 when x0 is Gaussian."""
    return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)


def exact(noise, start, end):
    """Return the end of the probability-flow ODE from the start state of a Gaussian."""
    x = noise * start
    return MEAN + (x - MEAN) * math.sqrt((STD**2 + end**2) / (STD**2 + start**2))


def test_karras_levels_match_the_formula_to_nine_digits():
    levels = sampler.karras_sigmas(35, 0.0002, 80.0)
    for i, level in enumerate(levels):
        expected = (80 ** (1 / 7) + i / 34 * (0.0002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        assert level == pytest.approx(expected, rel=1e-9)
    assert levels[1] == pytest.approx(67.126, abs=1e-3)
    assert levels[-3:] == pytest.approx([0.001342, 0.000553, 0.0002], abs=1e-6)
    assert sampler.euler_sigmas(35, 0.0002, 80.0)[-1] == 0.0


def test_res_levels_match_the_reference():
    levels = sampler.res_sigmas(35, 80.0)
    assert len(levels) == 36
    assert levels[:2] == pytest.approx([80.0, 68.325], abs=1e-3)
    assert levels[-1] == 0.002


def test_guidance_zero_is_the_conditional_estimate():
    cond, uncond = torch.randn(2, 8).unbind()
    assert torch.equal(sampler.guide(lambda: [cond, uncond], 0.0)(), cond)
    assert torch.equal(sampler.guide(lambda: [cond], 7.0)(), cond)
    guided = sampler.guide(lambda: [cond, uncond], 7.0)()
    torch.testing.assert_close(guided, 8 * cond - 7 * uncond)


@pytest.mark.parametrize("steps", [1, 2, 35])
def test_solvers_call_the_denoiser_once_a_level(steps):
    seen = []

    def denoiser(x, sigma):
        seen.append(sigma)
        return analytic(x, sigma)

    levels = sampler.euler_sigmas(steps, 0.0002, 80.0)
    sampler.euler(denoiser, torch.ones(1), levels, ignore)
    assert seen == levels[:-1]
    seen.clear()
    levels = sampler.res_sigmas(steps, 80.0)
    sampler.res(denoiser, torch.ones(1), levels, ignore)
    assert seen == levels


def _error(solve, start_scale, steps):
    noise = torch.linspace(-1.5, 1.5, 31, dtype=torch.float32)
    levels = sampler.karras_sigmas(steps + 1, 0.02, 80.0)
    got = solve(analytic, noise, levels, ignore)
    want = exact(noise.double(), start_scale, levels[-1])
    return (got.double() - want).abs().max().item()


def test_euler_converges_at_first_order():
    solve = partial(_error, sampler.euler, math.sqrt(80.0**2 + 1))
    coarse, fine = solve(40), solve(80)
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.2)


def test_res_converges_at_second_order():
    """Measured before its last evaluation, which denoises once more."""
    noise = torch.linspace(-1.5, 1.5, 31)

    def error(steps):
        levels = sampler.karras_sigmas(steps + 1, 0.02, 80.0)
        states = []

        def denoiser(x, sigma):
            states.append(x)
            return analytic(x, sigma)

        sampler.res(denoiser, noise, levels, ignore)
        want = exact(noise.double(), 80.0, levels[-1])
        return (states[-1].double() - want).abs().max().item()

    assert math.log2(error(20) / error(40)) == pytest.approx(2.0, abs=0.35)


def test_res_without_extrapolation_takes_the_steps_of_euler():
    levels = sampler.karras_sigmas(9, 0.02, 80.0)
    kept = sampler.res(analytic, torch.ones(3), levels, ignore, extrapolation=0.0)
    # Euler's method starts from sqrt(sigma^2 + 1), and its last step to 0 gives the estimate.
    euler = sampler.euler(analytic, torch.ones(3) / math.hypot(1, 1 / 80), [*levels, 0.0], ignore)
    torch.testing.assert_close(kept, euler)
    assert not torch.allclose(kept, sampler.res(analytic, torch.ones(3), levels, ignore))


def test_fast_evaluates_its_list_and_leaves_guidance_out_at_low_noise():
    settings = SimpleNamespace(spec=TINY, speed="fast", sampler="res", num_steps=9, guidance=2.0)
    seen = []

    def denoise(xt, sigma_B):
        seen.append((sigma_B.log()[0].item(), sampler.is_guided(settings, sigma_B.log() / 4)))
        return analytic(xt, sigma_B[0])

    sampler.sample(denoise, torch.ones(1, 1, 1, 1, 1), settings, ignore)
    assert [level for level, _ in seen] == pytest.approx(FAST_LOG_SIGMAS, abs=1e-5)
    guided = [is_guided for _, is_guided in seen]
    assert guided == sorted(guided, reverse=True)
    assert 0 < guided.index(False) < len(guided)
    settings.speed = "exact"
    assert sampler.is_guided(settings, torch.tensor([-2.0]))


def test_noise_depends_on_the_seed_alone():
    first = sampler.start_noise(7, (1, 16, 2, 4, 4))
    torch.randn(3)
    assert torch.equal(first, sampler.start_noise(7, (1, 16, 2, 4, 4)))
    assert not torch.equal(first, sampler.start_noise(8, (1, 16, 2, 4, 4)))


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="'heun' is neither euler nor res"):
        settings = SimpleNamespace(spec=TINY, sampler="heun", num_steps=2, speed="exact")
        sampler.sample(lambda xt, _: xt, torch.zeros(1), settings, ignore)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_guided_outputs_and_guided_estimates_give_the_same_sample(guidance):
    settings = SimpleNamespace(spec=TINY, sampler="res", num_steps=5, speed="exact")
    noise = sampler.start_noise(3, (2, 4, 2, 4, 4))
    texts = (0.5, -0.25) if guidance else (0.5,)

    def net(x, c_noise_B, text, fps_B):
        return (x + text) * c_noise_B.view(-1, 1, 1, 1, 1)

    def denoise(network, xt, sigma_B, text):
        return edm.denoise(network, xt, sigma_B, text, torch.ones(2), TINY.sigma_data)

    def outputs(x, c_noise_B, text_emb, fps_B):
        return [net(x, c_noise_B, text, fps_B) for text in texts]

    def estimates(xt, sigma_B):
        return [denoise(net, xt, sigma_B, torch.tensor(text)) for text in texts]

    def expected(xt, sigma):
        sigma_B = torch.full((2,), sigma)
        cond, uncond = (denoise(net, xt, sigma_B, torch.tensor(text)) for text in (0.5, -0.25))
        return (1 + guidance) * cond - guidance * uncond

    def of_outputs(xt, sigma_B):
        return denoise(sampler.guide(outputs, guidance), xt, sigma_B, torch.tensor(0.0))

    wanted = sampler.res(expected, noise, sampler.res_sigmas(5, TINY.sigma_max), ignore)
    steps = []
    for guided in (of_outputs, sampler.guide(estimates, guidance)):
        made = sampler.sample(guided, noise, settings, steps.append)
        torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)
    assert steps == [*range(6), *range(6)]
