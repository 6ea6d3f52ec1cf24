"""A small random denoiser, its twin in diffusers, and a watch on the operators that run."""

import types
from pathlib import Path

import diffusers.models.transformers.transformer_cosmos as peer
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_cli.model import weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.spec import DiTSpec

# Diffusers resizes the padding mask with torchvision, which a CPU build of torch does not have.
if not hasattr(peer, "transforms"):
    peer.transforms = types.SimpleNamespace(
        InterpolationMode=types.SimpleNamespace(NEAREST="nearest"),
        functional=types.SimpleNamespace(
            resize=lambda x, size, interpolation: F.interpolate(x, size=size, mode=interpolation)
        ),
    )

SMALL = DiTSpec(width=64, blocks=2, heads=4, text_channels=32, adaln_rank=8)


def network(spec: DiTSpec = SMALL, seed: int = 0) -> DiT:
    """A network with every weight random, so that no term of the forward pass is zero."""
    net = DiT(spec)
    generator = torch.Generator().manual_seed(seed)
    net.init_weights(generator)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            if ".up" in name:
                weight.normal_(std=0.1, generator=generator)
    return net


def inputs(batch: int = 2, size: tuple[int, int, int] = (3, 8, 12)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x_BCTHW": torch.randn(batch, 16, *size, generator=generator),
        "c_noise_B": torch.linspace(-1.5, 1.0, batch),
        "text_emb_BMD": torch.randn(batch, 5, 32, generator=generator),
        "fps_B": torch.full((batch,), 24.0),
    }


def diffusers_twin(net: DiT, folder: Path) -> torch.nn.Module:
    """Diffusers' network with the same weights, by way of the files on disk."""
    weights.save_diffusers(folder, {f"net.{k}": v for k, v in net.state_dict().items()}, net.spec)
    twin = peer.CosmosTransformer3DModel.from_config(
        peer.CosmosTransformer3DModel.load_config(folder)
    )
    twin.load_state_dict(weights._read_diffusers(folder))
    return twin


def run_twin(
    twin: torch.nn.Module, x: dict[str, torch.Tensor], mask: torch.Tensor | None = None
) -> torch.Tensor:
    return twin(
        hidden_states=x["x_BCTHW"],
        timestep=x["c_noise_B"],
        encoder_hidden_states=x["text_emb_BMD"],
        fps=float(x["fps_B"][0]),
        padding_mask=torch.zeros(1, 1, 4, 4) if mask is None else mask,
        return_dict=False,
    )[0]


class Watch(TorchDispatchMode):
    """Sees which operators run on what, the backward pass included."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append((operator, args))
        return operator(*args, **(kwargs or {}))

    def shapes(self, operator):
        """The shape of the second tensor, at each run of the operator."""
        return [tuple(args[1].shape) for ran, args in self.seen if ran is operator]
