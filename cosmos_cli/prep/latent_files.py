"""Read cached latents."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cosmos_cli import archives, files
from cosmos_cli.errors import asset_error

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


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
        what = f"is not a cached latent: {getattr(error, 'what', error)}"
        raise asset_error(path, what, "run `cosmos prep RECIPE` again") from error
    return latent.float()


def latent_bytes(r: Recipe) -> int:
    """Return the size of one cached latent on disk in bytes."""
    return 2 * prod(r.latent_shape)
