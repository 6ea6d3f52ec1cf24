"""Load the video tokenizer, and read the latents that it made."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_cli import archives, files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import weights
from cosmos_cli.model.finite import require_finite
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.recipe.keys import Recipe


def load_tokenizer(r: Recipe, device: str, dtype: torch.dtype) -> Tokenizer:
    """Load the video tokenizer of the recipe's model, ready to encode and decode.

    Raises:
        UserError: its file is missing or damaged, or has weights that are not finite.
    """
    path = r.model_files.tokenizer
    tokenizer = Tokenizer(r.spec.tokenizer, r.spec.sigma_data)
    weights.load_strict(tokenizer, weights.load_tokenizer_state(path), path)
    tokenizer = tokenizer.to(device=device, dtype=dtype).eval()
    require_finite(tokenizer.state_dict(), path)
    return tokenizer


def read_latent(path: Path) -> Tensor:
    """Read the cached latent x0 (C, T, H, W) as fp32.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        archives.check_safetensors(path)
        with safe_open(path, framework="pt") as stream:
            latent: Tensor = stream.get_tensor("latent")
    except (files.BadFile, OSError, SafetensorError) as error:
        raise UserError(
            f"is not a cached latent: {getattr(error, 'what', error)}",
            code=ExitCode.ASSET,
            where=str(path),
            fix="run `cosmos prep RECIPE` again",
        ) from error
    return latent.float()


def latent_bytes(r: Recipe) -> int:
    """Return the size of one cached latent on disk in bytes."""
    channels, t, h, w = r.spec.latent_shape(r.num_frames, r.height, r.width)
    return channels * t * h * w * 2
