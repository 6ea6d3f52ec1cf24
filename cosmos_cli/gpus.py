"""List the GPUs that CUDA shows this process, and choose the device that it computes on.

NVML lists all GPUs without torch and without creating a CUDA context, but it ignores
CUDA_VISIBLE_DEVICES. So the variable is applied here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cosmos_cli import console

VARIABLE, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
# Values that people set to hide all GPUs on purpose.
HIDDEN = ("", "-1", "none", "void", "NoDevFiles")


@dataclass(frozen=True)
class Gpu:
    """A GPU or one of its MIG slices. `index` is the GPU's index in nvidia-smi.

    `ids` are the names that select it in CUDA_VISIBLE_DEVICES. `slices` are its MIG slices. A GPU
    in MIG mode can be used only through its slices.
    """

    index: int
    name: str
    capability: tuple[int, int]
    ids: tuple[str, ...] = ()
    mig: bool = False
    slices: tuple[Gpu, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Selection:
    """The GPUs that CUDA enumerates, in its order, and a remark if that may surprise the user."""

    gpus: tuple[Gpu, ...]
    remark: str = ""


def visible() -> Selection:
    """Return the GPUs that CUDA shows this process, none without a driver."""
    environment = os.environ
    return select(of_machine(), environment.get(VARIABLE), environment.get(ORDER))


def select(machine: Iterable[Gpu], variable: str | None, order: str | None = None) -> Selection:
    """Return the GPUs of a machine that CUDA enumerates for a value of CUDA_VISIBLE_DEVICES.

    Source: CUDA C++ Programming Guide, "CUDA Environment Variables", and the MIG User Guide,
    "CUDA Device Enumeration".

    Args:
        machine: all GPUs in PCI bus order, which is NVML's order.
        variable: CUDA_VISIBLE_DEVICES, or None if it is not set.
        order: CUDA_DEVICE_ORDER, or None if it is not set.
    """
    found = tuple(machine)
    if variable is None or not found:
        return _enumerate(found)
    entries = variable.split(",")
    by_id = variable.startswith(("GPU-", "MIG-"))
    chosen: list[Gpu] = []
    end = None
    for entry in entries:
        gpu = _by_id(found, entry) if by_id else _by_index(found, entry)
        if gpu is None:
            end = entry
            break
        chosen.append(gpu)
    if len({(gpu.index, gpu.ids) for gpu in chosen}) < len(chosen):
        return Selection((), f"{VARIABLE}={variable} names a GPU twice, so CUDA shows none")
    remarks = []
    if end is not None and end.strip() not in HIDDEN:
        count = "only GPU" if len(found) == 1 else f"{len(found)} GPUs"
        what = f"not one of this machine's {count}"
        remarks.append(f"{VARIABLE}={variable}: CUDA stops at {end!r}, {what}")
    kinds = {gpu.name for gpu in found}
    if chosen and len(kinds) > 1 and not by_id and order != "PCI_BUS_ID":
        remarks.append(
            f"{VARIABLE}={variable} counts the fastest GPU as 0, not in nvidia-smi's order as "
            f"assumed here; set {ORDER}=PCI_BUS_ID"
        )
    shown = _enumerate(tuple(chosen))
    return Selection(shown.gpus, "; ".join(filter(None, [*remarks, shown.remark])))


def _by_index(found: tuple[Gpu, ...], entry: str) -> Gpu | None:
    """Return the GPU with an index. Like C's strtoul, CUDA reads only the leading digits."""
    number = re.match(r"\s*\+?(\d+)", entry, re.ASCII)
    return found[int(number[1])] if number and int(number[1]) < len(found) else None


def _by_id(found: tuple[Gpu, ...], entry: str) -> Gpu | None:
    """Return the GPU or slice with an identifier, or with a unique prefix of one."""
    every = [each for gpu in found for each in (gpu, *gpu.slices)]
    exact = [each for each in every if entry in each.ids]
    near = [each for each in every if any(name.startswith(entry) for name in each.ids)]
    matches = exact or (near if entry else [])
    return matches[0] if len(matches) == 1 else None


def _enumerate(chosen: tuple[Gpu, ...]) -> Selection:
    """Return the chosen GPUs that CUDA enumerates: only the first MIG slice if there is any."""
    shown = [each for gpu in chosen for each in (gpu, *gpu.slices)]
    slices = [each for each in shown if any(name.startswith("MIG-") for name in each.ids)]
    if slices:
        remark = f"CUDA shows only one MIG slice: {slices[0].name}" if len(slices) > 1 else ""
        return Selection((slices[0],), remark)
    whole = tuple(gpu for gpu in chosen if not gpu.mig)
    idle = [str(gpu.index) for gpu in chosen if gpu.mig]
    remark = f"MIG is on and has no slices on GPU {', '.join(idle)}" if idle else ""
    return Selection(whole, remark)


# --- NVML -----------------------------------------------------------------------------------------


def of_machine() -> list[Gpu]:
    """Return all GPUs of this machine in nvidia-smi's order, none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlDeviceGetUUID(handle))
    capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    try:
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:
        # This kind of GPU has no MIG.
        mig = False
    slices = [
        Gpu(index, _slice_name(name, slice_), capability, _slice_ids(uuid, slice_))
        for slice_ in (_slice_handles(handle) if mig else ())
    ]
    return Gpu(index, name, capability, (uuid,), mig, tuple(slices))


def _slice_handles(handle: Any) -> list[Any]:
    import pynvml

    handles = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
        except pynvml.NVMLError:
            # There is no slice at this index.
            continue
    return handles


def _slice_ids(uuid: str, handle: Any) -> tuple[str, ...]:
    """Return both names of a slice: its UUID, and the name for drivers before R470."""
    import pynvml

    gpu = pynvml.nvmlDeviceGetGpuInstanceId(handle)
    compute = pynvml.nvmlDeviceGetComputeInstanceId(handle)
    return str(pynvml.nvmlDeviceGetUUID(handle)), f"MIG-{uuid}/{gpu}/{compute}"


def _slice_name(name: str, handle: Any) -> str:
    """Return the GPU name with the slice profile, as in "NVIDIA H100 80GB HBM3 MIG 3g.40gb"."""
    import pynvml

    own = str(pynvml.nvmlDeviceGetName(handle))
    if " MIG " in own:
        return own
    about = pynvml.nvmlDeviceGetAttributes(handle)
    return f"{name} MIG {about.gpuInstanceSliceCount}g.{-(-about.memorySizeMB // 1024)}gb"


def best_device() -> str:
    """Return "cuda" if torch finds a GPU, else "cpu". A rank of a launcher selects its own GPU."""
    import torch

    # Fragmented memory would not hold a pass that the estimate promises. PyTorch reads this when it
    # first allocates.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        return "cuda"
    shown = os.environ.get(VARIABLE, "")
    if torch.version.cuda and shown.strip() not in HIDDEN:
        console.warn(f"CUDA finds no GPU for {VARIABLE}={shown}: this runs on the CPU")
    # transformers imports DeepSpeed if it is installed. Without this variable, DeepSpeed guesses
    # the accelerator and prints to stdout.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "cpu"


def gpu_names() -> list[str]:
    """Return the names of the GPUs that this process may use, none without a driver."""
    return [gpu.name for gpu in visible().gpus]
