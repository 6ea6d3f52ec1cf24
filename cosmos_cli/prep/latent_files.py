"""Read cached latents and what their files say about them."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


def read_about(path: Path) -> dict[str, Any]:
    """Return the metadata in a file of latents, {} if the file is missing or damaged."""
    try:
        archives.check_safetensors(path)
        with safe_open(path, framework="pt") as stream:
            about = json.loads((stream.metadata() or {}).get("about", "{}"))
    except (files.BadFile, OSError, SafetensorError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def latent_bytes(r: Recipe) -> int:
    """Return the size of one cached latent on disk in bytes."""
    return 2 * prod(r.latent_shape)
