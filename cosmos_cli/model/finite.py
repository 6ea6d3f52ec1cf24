"""Find NaN and infinity in tensors: one NaN among billions of weights makes every video black."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosmos_cli.errors import asset_error


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity.

    Each tensor is read once, on its own device. A GPU is synchronised once, not once per tensor.
    """
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, {})[name] = tensor
    suspects: list[str] = []
    for found in by_device.values():
        # A NaN or infinity makes the sum non-finite. Unlike isfinite(), a sum allocates no mask.
        sums = torch.stack([tensor.sum().float() for tensor in found.values()])
        fine = sums.isfinite().tolist()
        suspects += [name for name, is_fine in zip(found, fine, strict=True) if not is_fine]
    # The sum of large finite numbers may overflow, so check these tensors exactly.
    return [name for name in suspects if not tensors[name].isfinite().all()]


def require_finite(
    tensors: Mapping[str, Tensor],
    where: Path,
    name_in_file: Callable[[str], str] = str,
    fix: str = "download or make the file again",
) -> None:
    """Refuse tensors that hold a NaN or an infinity.

    `where` is the file or folder that they were read from, `name_in_file` gives a tensor's name
    there.

    Raises:
        UserError: (ASSET) a tensor is not finite. The error names the file and the tensor.
    """
    if bad := not_finite(tensors):
        shown = ", ".join(name_in_file(name) for name in bad[:3])
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        what = f"holds numbers that are not finite (NaN or infinity) in {shown}{more}"
        raise asset_error(where, what, fix)
