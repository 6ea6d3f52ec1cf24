"""Video2World's maths against diffusers and in closed form, in fp32 with small random weights."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CosmosVideoToWorldPipeline, EDMEulerScheduler
from diffusers.pipelines.cosmos import pipeline_cosmos_video2world as peer
from PIL import Image

from cosmos_cli import paths
from cosmos_cli.errors import UserError
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.generate.video_models import sample_latents
from cosmos_cli.model import cond_frames, edm, weights
from cosmos_cli.model.cond_frames import CondFrames
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tensor_names import RELEASED, check_keys, rename
from cosmos_cli.spec import TINY, TINY_VIDEO2WORLD, VIDEO2WORLD_7B, ModelSpec
from tests.helpers.networks import SMALL, diffusers_twin, inputs, network, run_twin

KEYS = Path(__file__).parent / "data" / "dit_7b_keys.txt"
SMALL_V2W = replace(SMALL, cond_channels=1)
SPEC = ModelSpec("small", SMALL_V2W, tokenizer=TINY.tokenizer, sigma_scale=4.0)
FRAMES, SIZE = 4, (8, 12)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given(x0: torch.Tensor, *counts: int) -> CondFrames:
    sigma_B = torch.linspace(0.03, 0.9, len(counts))
    return CondFrames.of(x0, torch.tensor(counts), sigma_B, randn(*x0.shape, seed=9))


@pytest.fixture
def sample():
    x0, noise = randn(3, 16, FRAMES, *SIZE), randn(3, 16, FRAMES, *SIZE, seed=1)
    return (
        x0,
        torch.tensor([0.4, 3.0, 20.0]),
        noise,
        randn(3, 5, 32, seed=2),
        torch.full((3,), 24.0),
    )


def test_keys_and_parameters_are_those_of_the_released_model():
    with torch.device("meta"):
        module = edm.EDMLoss(DiT(VIDEO2WORLD_7B.dit), VIDEO2WORLD_7B)
    shapes = {
        key: ",".join(map(str, value.shape))
        for key, value in rename(module.state_dict(), RELEASED, KEYS).items()
    }
    released = dict(line.split() for line in KEYS.read_text().splitlines())
    del released["net.pos_embedder.seq"]
    released["net.x_embedder.proj.1.weight"] = "4096,72"
    assert shapes == released
    assert sum(p.numel() for p in module.parameters()) == 7_236_208_768
    assert VIDEO2WORLD_7B.dit.parameters == 7_236_208_768 - 128


def test_output_with_both_masks_equals_diffusers(tmp_path):
    net, x, masked = network(SMALL_V2W), inputs(), torch.zeros(2, 1, 3, *SIZE)
    masked[:, :, :1] = 1
    padding = (randn(1, 1, 13, 29, seed=2) > 0).float()
    twin = diffusers_twin(net, tmp_path)
    assert twin.config.in_channels == 17
    with torch.no_grad():
        theirs = run_twin(twin, x | {"x_BCTHW": torch.cat((x["x_BCTHW"], masked), 1)}, padding)
        x["x_BCTHW"] = torch.cat((x["x_BCTHW"], masked), dim=1)
        ours = net(**x, padding_mask_BCHW=padding)
        untold = net(**x | {"x_BCTHW": torch.cat((x["x_BCTHW"][:, :16], 0 * masked), 1)})
    assert (ours - untold).abs().max() > 1e-2
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_loss_equals_that_of_diffusers_network(sample, tmp_path):
    """The reference's formulas, written out in its order around diffusers' network."""
    net = network(SMALL_V2W)
    loss = edm.EDMLoss(net, SPEC)
    torch.nn.init.normal_(loss.logvar.weight, std=0.1)
    x0, sigma_B, noise, text_emb, _ = sample
    frames = given(x0, 0, 1, 2)
    with torch.no_grad():
        value, edm_B = loss(*sample, frames)
    twin = diffusers_twin(net, tmp_path)
    indicator = torch.zeros(3, 1, FRAMES, 1, 1)
    indicator[1, :, :1] = indicator[2, :, :2] = 1
    s, aug = (x.view(-1, 1, 1, 1, 1) for x in (sigma_B, frames.sigma_B))
    c_in, c_in_aug = (1 / (x**2 + 0.25).sqrt() for x in (s, aug))
    xt = x0 + s * noise
    augmented = (x0 + aug * frames.noise) * c_in_aug / c_in
    x = c_in * (indicator * augmented + (1 - indicator) * xt)
    with torch.no_grad():
        net_out = twin(
            hidden_states=x, timestep=sigma_B.log() / 4, encoder_hidden_states=text_emb, fps=24.0,
            condition_mask=indicator.expand(3, 1, FRAMES, *SIZE),
            padding_mask=torch.zeros(1, 1, 4, 4), return_dict=False,
        )[0]  # fmt: skip
    denoised = 0.25 / (s**2 + 0.25) * xt + s * 0.5 / (s**2 + 0.25).sqrt() * net_out
    denoised = indicator * x0 + (1 - indicator) * denoised
    error = (s**2 + 0.25) / (s * 0.5) ** 2 * (x0 - denoised) ** 2
    v = loss.logvar(sigma_B.log() / 4).view(-1, 1, 1, 1, 1).detach()
    torch.testing.assert_close(value, (error * torch.exp(-v) + v).mean(), atol=2e-5, rtol=0)
    whole = error.mean(dim=(1, 2, 3, 4)) * torch.tensor([1, 4 / 3, 4 / 2])
    torch.testing.assert_close(edm_B, whole, atol=2e-5, rtol=1e-5)


class Coder(torch.nn.Module):
    """Stands for diffusers' autoencoder: the latent of any clip is `x0`."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(
        latent_channels=16, latents_mean=None,
        temporal_compression_ratio=8, spatial_compression_ratio=8,
    )  # fmt: skip

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0

    def encode(self, video):
        # The pipeline scales it by sigma_data.
        return SimpleNamespace(latents=self.x0 / 0.5)


class Unchecked(torch.nn.Module):
    device = torch.device("cpu")

    def check_text_safety(self, prompt):
        return True


def diffusers_latent(net, folder, count, x0, texts, monkeypatch):
    """The latent of an 8-step run of diffusers' pipeline, with our noise."""
    noise = cond_frames.for_sampling(x0[:, :, :count], FRAMES, [5]).noise
    monkeypatch.setattr(peer, "randn_tensor", lambda *_, **__: noise)
    scheduler = EDMEulerScheduler(
        sigma_min=0.0002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="zero"
    )
    pipeline = CosmosVideoToWorldPipeline(
        text_encoder=None, tokenizer=None, transformer=diffusers_twin(net, folder),
        vae=Coder(x0), scheduler=scheduler, safety_checker=Unchecked(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    start = torch.randn((1, 16, FRAMES, *SIZE), generator=torch.Generator().manual_seed(5))
    pictures = [Image.new("RGB", (96, 64))] * (1 if count == 1 else 9)
    shown = {"image": pictures[0]} if count == 1 else {"video": pictures}
    return pipeline(
        **shown, height=64, width=96, num_frames=25, num_inference_steps=8, guidance_scale=7.0,
        fps=24, prompt_embeds=texts[0][None], negative_prompt_embeds=texts[1][None],
        latents=start * math.sqrt(80.0**2 + 1) / 80.0, output_type="latent",
    ).frames  # fmt: skip


def our_latent(net, x0, count, texts, steps=8):
    r = SimpleNamespace(
        spec=SPEC, num_frames=25, height=64, width=96, fps=24.0, guidance=7.0, sampler="euler",
        num_steps=steps, speed="exact", evaluations=steps,
        latent_shape=SPEC.latent_shape(25, 64, 96),
    )  # fmt: skip
    prompt = Conditioning("", *texts, frames=x0[0, :, :count] if count else None)
    with torch.no_grad():
        return sample_latents(r, net, [prompt], [5], "test")


@pytest.mark.parametrize("count", [1, 2])
def test_sampling_equals_diffusers_pipeline(tmp_path, monkeypatch, count):
    net, x0 = network(SMALL_V2W), 0.5 * randn(1, 16, FRAMES, *SIZE, seed=4)
    texts = randn(2, 5, 32, seed=6)
    ours = our_latent(net, x0, count, texts)
    theirs = diffusers_latent(net, tmp_path, count, x0, texts, monkeypatch)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours[:, :, :count], x0[:, :, :count], atol=0.01, rtol=0)
    assert (ours[:, :, count:] - x0[:, :, count:]).abs().mean() > 0.1


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_perfect_denoiser_has_no_error(sample, count):
    x0, sigma_B, noise, *_ = sample
    c_skip, c_out, _, _ = edm.precondition(sigma_B.view(-1, 1, 1, 1, 1), 0.5)
    net_out = (x0 - c_skip * (x0 + sigma_B.view(-1, 1, 1, 1, 1) * noise)) / c_out
    net = torch.nn.Linear(1, 1)
    net.forward = lambda x, *_: net_out
    value, edm_B = edm.EDMLoss(net, SPEC)(*sample, given(x0, count, count, count))
    assert edm_B.max().item() < 1e-8
    assert value.item() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_frames_zero_columns_give_text2world_to_the_bit(sample, dtype):
    net = network()
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    assert "given start at zero" in cond_frames.add_mask_columns(state, SMALL_V2W)
    assert cond_frames.add_mask_columns(state, SMALL_V2W) == ""
    assert cond_frames.add_mask_columns(dict(state), SMALL) == ""
    wider = DiT(SMALL_V2W)
    weights.load_strict(wider, {k.removeprefix("net."): v for k, v in state.items()}, Path("x"))
    before = net.x_embedder.weight
    assert torch.equal(wider.x_embedder.weight[:, :64], before[:, :64])
    assert not wider.x_embedder.weight[:, 64:68].any()
    assert torch.equal(wider.x_embedder.weight[:, 68:], before[:, 64:])
    losses = [edm.EDMLoss(one.to(dtype), SPEC) for one in (net, wider)]
    with torch.no_grad():
        _, text_edm = losses[0](*sample)
        _, frame_edm = losses[1](*sample, given(sample[0], 0, 0, 0))
    assert torch.equal(text_edm, frame_edm)


def test_a_padding_mask_keeps_its_columns():
    net, x = network(), inputs()
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    cond_frames.add_mask_columns(state, SMALL_V2W)
    wider = DiT(SMALL_V2W)
    weights.load_strict(wider, {k.removeprefix("net."): v for k, v in state.items()}, Path("x"))
    padding = (randn(1, 1, 13, 29, seed=2) > 0).float()
    told = torch.cat((x["x_BCTHW"], torch.ones(2, 1, 3, *SIZE)), dim=1)
    with torch.no_grad():
        expected = net(**x, padding_mask_BCHW=padding)
        assert torch.equal(wider(**x | {"x_BCTHW": told}, padding_mask_BCHW=padding), expected)


def test_weights_of_the_other_kind_are_named():
    path = paths.EMBEDDED_DIR / "model.safetensors"
    state = {k: v for k, v in weights.load_dit_state(path).items() if k.startswith("net.")}
    shapes = {name: tensor.shape for name, tensor in state.items()}
    assert cond_frames.add_mask_columns(state, TINY_VIDEO2WORLD.dit)
    with pytest.raises(UserError, match=f"has the shapes of {TINY_VIDEO2WORLD.name}; use a recipe"):
        check_keys(shapes, state, path)


@pytest.mark.parametrize("form", ["model.pt", "model.safetensors", "transformer"])
def test_weights_survive_each_format(tmp_path, form):
    module = edm.EDMLoss(network(SMALL_V2W), SPEC)
    state, path = module.state_dict(), tmp_path / form
    if form == "transformer":
        state = {name: tensor for name, tensor in state.items() if name.startswith("net.")}
        weights.save_diffusers(path, state, SMALL_V2W)
    else:
        weights.save_dit(path, state, "pt" if form.endswith("pt") else "safetensors")
    read = weights.load_dit_state(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in state.items())


def test_draws_depend_on_their_key_and_leave_the_others_alone():
    first = cond_frames.sample_given((0, 5, 2), (2, 3))
    again = cond_frames.sample_given((0, 5, 2), (2, 3))
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    assert not torch.equal(first[2], edm.sample_noise((0, 5, 2), (2, 3), 0.2).noise)
    drawn = [cond_frames.sample_given((0, step, 0), (1,)) for step in range(3000)]
    for count in cond_frames.COUNTS:
        share = sum(one[0] == count for one in drawn) / len(drawn)
        assert share == pytest.approx(1 / 3, abs=0.03)
    ln_sigma = torch.tensor([math.log(one[1]) for one in drawn])
    assert ln_sigma.mean().item() == pytest.approx(-3.0, abs=0.12)
    assert ln_sigma.std().item() == pytest.approx(2.0, abs=0.1)
