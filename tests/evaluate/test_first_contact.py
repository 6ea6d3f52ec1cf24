"""The embedded model passes the first-contact check; damaged copies of it are named and refused."""

import shutil
from dataclasses import replace

import pytest
import torch

from cosmos_cli import paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.evaluate import first_contact
from cosmos_cli.model import weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.recipe import loading
from cosmos_cli.spec import TINY

R = loading.load("tiny").recipe


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the embedded model, in the place of the embedded one."""
    copy = tmp_path / "tiny"
    shutil.copytree(paths.EMBEDDED_DIR, copy, ignore=shutil.ignore_patterns("t5"))
    monkeypatch.setattr(paths, "EMBEDDED_DIR", copy)
    return copy


def exchange(state, a, b):
    state[a], state[b] = state[b], state[a]


def exchange_two_tables(state):
    exchange(state, "net.pos_embedder.h", "net.pos_embedder.w")


def exchange_two_projections(state):
    exchange(state, "net.blocks.0.mlp.up.weight", "net.blocks.5.mlp.up.weight")


def exchange_rotary_axes(state):
    """Gives the channels that turn with the row to the column and the other way round."""
    half, third = TINY.dit.head_width // 2, TINY.dit.head_width // 6
    first = half - 2 * third
    pairs = [*range(first), *range(first + third, half), *range(first, first + third)]
    order = torch.tensor([*pairs, *(half + pair for pair in pairs)])
    for name, weight in state.items():
        if ".self_attn.q" in name or ".self_attn.k" in name:
            heads = weight.unflatten(0, (-1, TINY.dit.head_width))
            state[name] = heads[:, order].reshape(weight.shape)


def transpose_patches(state):
    """Has each patch read column by column."""
    weight = state["net.x_embedder.weight"]
    state["net.x_embedder.weight"] = weight.unflatten(1, (-1, 2, 2)).mT.reshape(weight.shape)


def start_again(state):
    """Replace all weights by random ones."""
    net = DiT(TINY.dit)
    net.init_weights(torch.Generator().manual_seed(0))
    state.update({f"net.{name}": value for name, value in net.state_dict().items()})


def test_correct_weights_pass_and_the_losses_are_printed(folder, capsys):
    figures = first_contact.check_model(R, "cpu")
    assert [row["sigma"] for row in figures["edm"]] == [0.1, 0.5, 2.0]
    for row in figures["edm"]:
        assert row["model"] < row["shuffled"]
        assert row["model"] < row["linear"]
    assert figures["lost"] < first_contact.MAX_LOST
    told = capsys.readouterr().err
    assert f"{figures['edm'][1]['model']:.4g}" in told
    assert "edm_sigma_below_0.5" in told


@pytest.mark.workflow
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (exchange_two_tables, "pos_embedder.h and w"),
        (exchange_two_projections, "the denoiser"),
        (exchange_rotary_axes, "the rotary axes t h w as t w h"),
        (transpose_patches, "x_embedder in the order C t w h"),
        (start_again, "is not trained"),
    ],
)
def test_a_damaged_denoiser_is_an_error_that_names_the_damage(folder, damage, word):
    path = folder / "model.safetensors"
    state = weights.load_dit_state(path)
    damage(state)
    weights.save_dit(path, state, "safetensors")
    with pytest.raises(UserError) as caught:
        first_contact.check_model(R, "cpu")
    assert caught.value.code == ExitCode.ASSET
    assert word in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_loses_the_picture_is_an_error(folder):
    path = folder / "tokenizer.safetensors"
    state = weights.load_tokenizer_state(path)
    exchange(state, "decoder.conv_out.0.conv3d.bias", "decoder.conv_out.1.conv3d.bias")
    state["decoder.conv_out.1.conv3d.weight"] = state["decoder.conv_out.1.conv3d.weight"].flip(0)
    weights.write_safetensors(path, state)
    with pytest.raises(UserError, match="the tokenizer loses the picture") as caught:
        first_contact.check_model(R, "cpu")
    assert caught.value.code == ExitCode.ASSET


def test_exchanged_mean_and_std_are_an_error(folder):
    path = folder / "tokenizer.safetensors"
    state = weights.load_tokenizer_state(path)
    exchange(state, "mean", "std")
    weights.write_safetensors(path, state)
    with pytest.raises(UserError, match="mean and std") as caught:
        first_contact.check_model(R, "cpu")
    assert caught.value.code == ExitCode.ASSET


def test_linear_loss_is_the_error_of_the_linear_estimate():
    generator = torch.Generator().manual_seed(0)
    x0 = (
        torch.randn(1, 2, 4, 200, 200, generator=generator)
        * torch.tensor([0.3, 2.0]).view(1, 2, 1, 1, 1)
        + 0.7
    )
    sigma = 0.5
    xt = x0 + sigma * torch.randn(x0.shape, generator=generator)
    var = x0.var(dim=(0, 2, 3, 4), keepdim=True)
    mean = x0.mean(dim=(0, 2, 3, 4), keepdim=True)
    error = (mean + var / (var + sigma**2) * (xt - mean) - x0).square().mean().item()
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert first_contact.linear_loss([x0], sigma, 0.5) == pytest.approx(weight * error, rel=0.01)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model": 0.9}, "worse than the linear estimate at sigma 0.5"),
        ({"model": float("nan")}, "worse than the linear estimate at sigma 0.5"),
        ({"shuffled": 0.1}, "better on shuffled frames at sigma 0.5"),
        ({}, ""),
    ],
)
def test_a_failure_at_one_noise_level_is_reported(changed, words):
    rows = [
        first_contact.Losses(**{"sigma": sigma, "model": 0.2, "linear": 0.8, "shuffled": 0.3})
        for sigma in (0.1, 0.5, 2.0)
    ]
    rows[1] = replace(rows[1], **changed)
    found = first_contact.fault_of(rows, {"": rows[1].model, "two keys": rows[1].model * 0.9})
    assert words in found if words else found == ""


@pytest.mark.workflow
def test_download_check_tries_the_weights(cosmos):
    result = cosmos.json("download", "tiny", "--check")
    assert [row["sigma"] for row in result["edm"]] == [0.1, 0.5, 2.0]
    assert not (cosmos.cwd / "datasets").exists()
    bad = weights.load_dit_state(paths.EMBEDDED_DIR / "model.safetensors")
    start_again(bad)
    weights.save_dit(cosmos.cwd / "bad.pt", bad, "pt")
    refused = cosmos("download", "tiny", "--check", "--set", "base=bad.pt", code=4)
    assert "bad.pt: the denoiser is not trained" in refused.stderr
    assert "Traceback" not in refused.stderr
