"""Decide what of the denoiser samples in fp8, or refuse a GPU that cannot. No torch."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from cosmos_cli import gpus
from cosmos_cli.errors import UserError, environment_error

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Compute capabilities whose tensor cores multiply in fp8 (Ada and newer), and those for which
# cuDNN has fp8 attention with a head width of 128 (Hopper and data-center Blackwell).
FP8_LINEARS = (8, 9)
FP8_ATTENTION = ((9, 0), (10, 0), (10, 3))


def fp8_parts(r: Recipe) -> tuple[str, ...]:
    """Return the parts that sample in fp8: none, or linears, or linears and attention.

    On a CPU all parts are emulated.

    Raises:
        UserError: (ENVIRONMENT) a GPU cannot multiply in fp8, or cuDNN's frontend is not installed.
    """
    if r.sampling_precision != "fp8":
        return ()
    shown = gpus.visible().gpus
    if old := [gpu for gpu in shown if gpu.capability < FP8_LINEARS]:
        what = f"GPU {old[0].index}, {old[0].name}, does not compute in fp8"
        raise _refusal(what, "use a GPU of compute capability 8.9 or above")
    if not all(gpu.capability in FP8_ATTENTION for gpu in shown):
        return ("linears",)
    if shown and importlib.util.find_spec("cudnn") is None:
        what = "fp8 attention needs the package nvidia-cudnn-frontend, which is not installed"
        raise _refusal(what, 'run `pip install -e ".[fp8]"` in the clone')
    return ("linears", "attention")


def _refusal(what: str, fix: str) -> UserError:
    key = "sampling_precision"
    return environment_error(key, what, f"{fix}, or add `--set {key}=bf16`")
