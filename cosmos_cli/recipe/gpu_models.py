"""The kinds of GPUs that the planner knows, and how their names are read. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cosmos_cli.errors import usage_error

# GB/s of copies between pinned CPU memory and a GPU, by PCIe generation: an assumed 70 % of the
# nominal rate of 16 lanes.
PCIE_RATES = {3: 11.0, 4: 22.0, 5: 45.0}


@dataclass(frozen=True)
class GpuModel:
    """A kind of GPU: memory in GB, dense bf16 peak in TFLOP/s, memory and link rates in GB/s.

    `pcie` is the generation of its 16 PCIe lanes, through which CPU memory is read.
    """

    name: str
    memory_gb: float
    tflops: float
    memory_rate: float
    link_rate: float
    pcie: int = 4


# Source: the vendor's data sheets; link rates as NCCL reaches them, over NVLink or PCIe.
GPUS = (
    GpuModel("H100-80GB", 85.0, 989, 3000, 370, 5),
    GpuModel("H200", 150.0, 989, 4300, 370, 5),
    GpuModel("H100-NVL", 100.0, 835, 3500, 240, 5),
    GpuModel("H100-PCIe", 85.0, 756, 1900, 22, 5),
    GpuModel("H800", 85.0, 989, 3000, 160, 5),
    GpuModel("B200", 191.0, 2250, 7000, 740, 5),
    GpuModel("A100-80GB", 85.0, 312, 1800, 230),
    GpuModel("A100-40GB", 42.4, 312, 1400, 230),
    GpuModel("L40S", 47.7, 362, 800, 20),
    GpuModel("A6000", 50.9, 155, 700, 20),
    GpuModel("L4", 23.8, 121, 300, 20),
    GpuModel("RTX-3090", 25.4, 71, 940, 20),
    GpuModel("RTX-4080", 16.9, 97, 720, 20),
    GpuModel("RTX-4090", 25.4, 165, 940, 20),
    GpuModel("RTX-5090", 34.2, 210, 1650, 40, 5),
)


def parse_gpus(text: str) -> tuple[int, GpuModel]:
    """Return the count and kind of "8xH100-80GB", "1xRTX4090-24GB" or "2xNVIDIA H200".

    Raises:
        UserError: the text has another form, or may mean none or several of the known GPUs.
    """
    counted = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?(.*)", text.strip(), re.IGNORECASE)
    count, name = (counted[1] or "1", counted[2]) if counted else ("0", "")
    gpu = None if "," in name else find_gpu(name)
    words = _words(name)
    if int(count[:9]) and gpu:
        sizes = [int(word[:-2]) for word in words if re.fullmatch(r"\d+GB", word)]
        # "24GB" may be in GB or GiB. A slice of a GPU names the memory of the GPU and its own.
        if len(sizes) == 1 and not 0.85 < sizes[0] / gpu.memory_gb < 1.15:
            what = f"{text!r} is not known: a {gpu.name} has {gpu.memory_gb:g} GB"
            raise usage_error("--gpus", what, f"use `--gpus {count}x{gpu.name}`")
        return int(count[:9]), gpu
    alike = [gpu.name for gpu in GPUS if _words(gpu.name)[0] in words] if int(count[:9]) else []
    known = ", ".join(gpu.name for gpu in GPUS)
    ways = " or ".join(f"`--gpus {count}x{name}`" for name in alike)
    what = f"{text!r} may be several GPUs" if alike else f"{text!r} is not a count of known GPUs"
    fix = f"which one? {ways}" if alike else f"write e.g. 8xH100-80GB; known GPUs: {known}"
    raise usage_error("--gpus", what, fix)


def gpu_choices(incomplete: str) -> list[str]:
    """Return the completions of --gpus: each known GPU with the count that was typed."""
    count = re.match(r"\d+", incomplete)
    choices = (f"{count[0] if count else 1}x{gpu.name}" for gpu in GPUS)
    return [choice for choice in choices if choice.startswith(incomplete)]


def _words(name: str) -> list[str]:
    """Return the words of a GPU's name in capitals, such as 4090 and 24GB of "RTX4090-24GB"."""
    parted = re.sub(r"\b(NVIDIA|GEFORCE|RTX)(?=\w)", r"\1 ", name.upper())
    return [
        word for word in re.split(r"[\W_]+", parted) if word not in ("NVIDIA", "GEFORCE", "RTX")
    ]


def find_gpu(name: str) -> GpuModel | None:
    """Return the known GPU whose words all appear in a name such as "NVIDIA H100 80GB HBM3".

    A MIG slice, such as "NVIDIA H100 80GB HBM3 MIG 3g.40gb", has its own memory. Its rates are as
    many sevenths of the whole GPU's as its profile says.
    """
    words = set(_words(name))
    found = (gpu for gpu in GPUS if set(_words(gpu.name)) <= words)
    whole = max(found, key=lambda gpu: len(gpu.name), default=None)
    profile = re.search(r"\bMIG (?:\dc\.)?((\d)g\.(\d+)gb)", name, re.IGNORECASE)
    if whole is None or profile is None:
        return whole
    share = int(profile[2]) / 7
    return replace(
        whole,
        name=f"{whole.name} MIG {profile[1].lower()}",
        memory_gb=float(profile[3]),
        tflops=whole.tflops * share,
        memory_rate=whole.memory_rate * share,
    )
