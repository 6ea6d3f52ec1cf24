import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cosmos_cli.model import video

# Small clips keep a whole run of the six verbs to seconds; all weights are trained unless asked.
SMALL = ("num_frames=9", "height=64", "width=96", "lora_rank=0")


@dataclass
class Cosmos:
    """The real command in a real process, in a folder of its own.

    `cache` is its XDG_CACHE_HOME; the default can neither be read nor written.
    """

    cwd: Path
    cache: str | Path = os.devnull

    def environment(self):
        clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_ROOT", "HF_TOKEN")}
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.cache)}
        return {**clean, **own}

    def start(self, *arguments, **options):
        """Starts the command; its pipes are read by communicate()."""
        return subprocess.Popen(
            [sys.executable, "-m", "cosmos_cli", *map(str, arguments)],
            cwd=self.cwd,
            env=self.environment(),
            stderr=subprocess.PIPE,
            text=True,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options},
        )

    def __call__(self, *arguments, code=0, seconds=300):
        """Runs the command to its end; fails the test when it ends with another code."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, (
            f"{arguments} ended with {process.returncode}\n{out}{err}"
        )
        return subprocess.CompletedProcess(process.args, code, out, err)

    def json(self, *arguments, code=0):
        """Runs the command with --json; stdout must be that one object."""
        done = self(*arguments, "--json", code=code)
        value = json.loads(done.stdout)
        assert value["exit_code"] == code
        return value


def settings(*pairs):
    """--set options for a small run, and more."""
    return [word for pair in (*SMALL, *pairs) for word in ("--set", pair)]


def moving_square(frames, height, width):
    """A uint8 CTHW clip of a bright square that moves right over a colour ramp."""
    clip = torch.zeros(3, frames, height, width, dtype=torch.uint8)
    clip[2] = torch.linspace(20, 120, width).to(torch.uint8)
    edge = height // 3
    for t in range(frames):
        left = t * (width - edge) // max(frames - 1, 1)
        clip[0, t, edge : 2 * edge, left : left + edge] = 230
    return clip


def stand_in_weights(path, content="weights"):
    """Writes a file that is whole, but of no model; its name decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"content": torch.tensor(list(content.encode()))}
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        path.write_text(content)


@pytest.fixture
def cosmos(tmp_path, tmp_path_factory):
    """With a cache that tests share: what one had encoded, another need not."""
    return Cosmos(tmp_path, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder in which prep has run on four small captioned clips of different sizes."""
    root = tmp_path_factory.mktemp("prepared")
    folder = root / "datasets" / "tiny"
    (folder / "videos").mkdir(parents=True)
    (folder / "metas").mkdir()
    for i, (height, width, fps) in enumerate(
        [(64, 96, 12), (96, 160, 24), (128, 96, 30), (80, 80, 12)]
    ):
        clip = moving_square(9 * fps // 12 + 4, height, width)
        video.write_mp4(folder / "videos" / f"clip{i}.mp4", clip, fps, 18)
        (folder / "metas" / f"clip{i}.txt").write_text(f"A square moves right, take {i}.\n")
    Cosmos(root)("prep", "tiny", *settings())
    return root
