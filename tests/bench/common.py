"""What the benchmarks share: the models, the command line, times and tables."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
# The shipped recipe of each model, and what is changed in it.
SHIPPED = {"7b": ("nemo_assets", ["height=704"]), "tiny": ("tiny", [])}
# google-t5/t5-11b, from which the text encoder of the 7B is taken.
T5_11B = {
    "vocab_size": 32128, "d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_layers": 24,
    "num_heads": 128, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def parser(doc: str, out: str, scratch: str = "") -> argparse.ArgumentParser:
    """Return a parser with --model, --out and, given its help, --scratch."""
    made = argparse.ArgumentParser(description=doc.split("\n", maxsplit=1)[0])
    made.add_argument("--model", choices=sorted(SHIPPED), default="7b")
    made.add_argument("--out", type=Path, required=True, help=out)
    if scratch:
        made.add_argument("--scratch", type=Path, required=True, help=scratch)
    return made


def add_parts(made: argparse.ArgumentParser, known: Iterable[str], default: str) -> None:
    def some(text: str) -> list[str]:
        chosen = text.split(",")
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"--parts are some of {','.join(known)}")
        return chosen

    text = f"some of {','.join(known)}; by default %(default)s"
    made.add_argument("--parts", type=some, default=default, help=text)


def device_name(device: str) -> str:
    return platform.machine() if device == "cpu" else torch.cuda.get_device_name()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    """Return the GPU memory, in GiB, at its peak since the last call."""
    if device == "cpu":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def append(path: Path, row: Row) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def markdown(rows: list[Row]) -> str:
    """Return one table of rows that may differ in their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        values = (row.get(column, "") for column in columns)
        lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
