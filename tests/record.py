"""Record what the commands produce with the tiny model, to prove that moved code does the same.

    python tests/record.py before.json
    python tests/record.py after.json --compare before.json

Run both on one machine: the bits of a sum depend on the processor. It takes about two minutes.
Sentences are not recorded, since rewording is not a change of behaviour; codes, figures, file names
and bytes are. Everything goes through the command line, so the script outlives any move.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import cosmos_cli

SIZES = ("num_frames=9", "height=64", "width=96")
TRAINING = (
    *SIZES, "lora_rank=0", "global_batch_size=2", "micro_batch_size=1", "log_every_steps=1",
    "save_every_steps=6", "max_steps=6", "learning_rate=1e-3", "warmup_steps=2",
    "min_free_disk_gb=0.1", "preview_every_steps=0", "sample_every_saves=0",
)  # fmt: skip
RUNS = {
    "plain": (),
    "two_processes": ("num_processes=2",),
    "lora": ("lora_rank=4",),
    "sequence_parallel": ("num_processes=2", "sequence_parallel=2"),
}
# Figures of a --json object that differ from run to run, or that describe the machine.
VOLATILE = {
    "cosmos", "command", "detail", "elapsed", "eta_seconds", "free", "gpus", "host", "pid",
    "platform", "python", "rate", "samples_per_second", "seconds", "seconds_per_step",
    "sha256", "started", "time", "updated", "version", "versions",
}  # fmt: skip
COMMANDS = (
    "--help", "setup --help", "download --help", "prep --help", "train --help", "promote --help",
    "generate --help", "evaluate --help", "recipes --help", "unknown", "--version",
    "recipes list --json", "recipes show tiny --json", "recipes show unknown --json",
    "recipes keys --json", "recipes schema --json", "recipes check tiny --json",
    "recipes check broken.yaml --json", "recipes copy lora mine.yaml --json",
    "recipes copy lora mine.yaml --json", "recipes new mine --videos unknown --json",
    "setup unknown --json", "download tiny --dry-run --json", "download unknown.yaml --json",
    "prep tiny --dry-run --json", "prep tiny --set dataset_dir=nothing --json",
    "prep tiny --set num_frames=10 --json", "prep tiny --set num_frame=9 --json",
    "train tiny --dry-run --json", "train tiny --status --json",
    "train tiny --set dataset_dir=nothing --json",
    "train nemo_assets --plan --gpus 8xH100-80GB --json",
    "train nemo_assets --plan --gpus 1xRTX4090-24GB --json",
    "train lora --plan --gpus 1xH100 --json",
    "train tiny --set learning_rate=fast --json", "promote tiny --set name=plain --dry-run --json",
    "promote tiny --set name=none --json", "promote tiny --set name=plain --step 5 --json",
    "promote tiny --set name=plain --weights best --json",
    "generate tiny --json", "generate tiny --prompt x --output x.mov --json",
    "generate tiny --batch unknown.jsonl --json", "generate tiny --batch bad.jsonl --json",
    "generate nemo_assets --prompt x --json", "generate --model unknown --prompt x --json",
    "generate tiny --prompt x --lora unknown --json",
    "evaluate tiny --prompts 0 --json", "evaluate nemo_assets --json",
)  # fmt: skip

CHECKOUT = str(Path(cosmos_cli.__file__).parents[1])


class Recorder:
    """Runs commands in a scratch folder and keeps what they produce by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, Any] = {}
        clean = {k: v for k, v in os.environ.items() if k not in ("OUTPUT_ROOT", "HF_TOKEN")}
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80", "NO_COLOR": "1"}
        self.environment = {**clean, **own, "XDG_CACHE_HOME": str(folder / "cache")}

    def run(self, *words: str, settings: tuple[str, ...] = (), code: int | None = 0) -> Any:
        """Run one command; return its exit code and stdout."""
        options = [word for pair in settings for word in ("--set", pair)]
        done = subprocess.run(
            [sys.executable, "-m", "cosmos_cli", *words, *options],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600,
            stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        print(" ".join(words), *settings, f"-> {done.returncode}", file=sys.stderr, flush=True)
        if code is not None and done.returncode != code:
            raise SystemExit(f"ended with {done.returncode}, not {code}:\n{done.stderr}")
        return done.returncode, done.stdout

    def keep_file(self, name: str, path: Path) -> None:
        """Record the hash of a file's bytes."""
        self.found[name] = hashlib.sha256(path.read_bytes()).hexdigest()

    def keep_tensors(self, name: str, path: Path) -> None:
        """Record a hash for each tensor of a `.pt` file, whose archive also holds its own name."""
        for key, tensor in torch.load(path, weights_only=True).items():
            data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
            self.found[f"{name} {key}"] = hashlib.sha256(data).hexdigest()

    def keep_frames(self, name: str, path: Path) -> None:
        """Record the hash of the decoded frames of an mp4."""
        frames = subprocess.run(
            ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"],
            capture_output=True, check=True,
        ).stdout  # fmt: skip
        self.found[name] = [len(frames), hashlib.sha256(frames).hexdigest()]

    def without_words(self, value: Any) -> Any:
        """Return a --json value without sentences, times and facts about the machine."""
        if isinstance(value, dict):
            return {k: self.without_words(v) for k, v in value.items() if k not in VOLATILE}
        if isinstance(value, list):
            return [self.without_words(entry) for entry in value]
        if isinstance(value, str):
            text = value.replace(str(self.folder), "HERE").replace(CHECKOUT, "CHECKOUT")
            return "(words)" if " " in text else text
        return value


def make_videos(folder: Path) -> None:
    """Write four captioned videos of different sizes and rates."""
    (folder / "videos").mkdir(parents=True)
    (folder / "metas").mkdir()
    for number, (size, rate) in enumerate(
        [("96x64", 12), ("160x96", 24), ("96x128", 30), ("80x80", 12)]
    ):
        source = f"testsrc2=s={size}:r={rate}:d=1.5"
        command = ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", source, "-threads", "1"]
        target = folder / "videos" / f"clip{number}.mp4"
        subprocess.run([*command, "-pix_fmt", "yuv420p", target], check=True)
        (folder / "metas" / f"clip{number}.txt").write_text(f"A test picture, take {number}.\n")


def record_prep(recorder: Recorder) -> None:
    """Record the embeddings, latents and manifest of a dataset."""
    dataset = recorder.folder / "datasets" / "tiny"
    make_videos(dataset)
    recorder.run("prep", "tiny", settings=SIZES)
    for path in sorted([*dataset.glob("t5_xxl/*"), *dataset.glob("latents/*")]):
        recorder.keep_file(f"prep {path.name}", path)
    manifest = json.loads((dataset / "manifest.json").read_text())
    hashes = [[row.get("sha256") for row in manifest[part]] for part in ("videos", "clips")]
    recorder.found["prep manifest"] = [recorder.without_words(manifest), hashes]


def record_training(recorder: Recorder) -> None:
    """Record losses and weights of six steps, in one and two processes."""
    for name, settings in RUNS.items():
        recorder.run("train", "tiny", settings=(*TRAINING, *settings, f"name={name}"))
        (run,) = (recorder.folder / "outputs").glob(f"*/*/{name}")
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        kept = ("step", "loss", "edm", "grad_norm", "heldout")
        recorder.found[f"train {name} losses"] = [
            [row.get(key) for key in kept] for row in rows if "loss" in row
        ]
        for path in sorted(run.glob("checkpoints/iter_*_model.pt")):
            recorder.keep_tensors(f"train {name} {path.name}", path)
        for path in sorted(run.glob("checkpoints/iter_*_lora.safetensors")):
            recorder.keep_file(f"train {name} {path.name}", path)


def record_promotion(recorder: Recorder) -> None:
    """Record a promoted model in three formats; the last one stays."""
    for form in ("safetensors", "diffusers", "pt"):
        settings = (*TRAINING, "name=plain")
        recorder.run("promote", "tiny", "--format", form, "--yes", settings=settings)
        (folder,) = (recorder.folder / "checkpoints").glob("*_post-trained")
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".pt")):
            keep = recorder.keep_tensors if path.suffix == ".pt" else recorder.keep_file
            keep(f"promote {form} {path.name}", path)


def record_videos(recorder: Recorder) -> None:
    """Record the frames of a video made alone, of two made in a batch, and of one by two."""
    settings = ("num_steps=4", "sampling_seed=3")
    lines = [{"prompt": "A red ball moves left."}, {"prompt": "A blue cube.", "seed": 5}]
    (recorder.folder / "batch.jsonl").write_text("\n".join(map(json.dumps, lines)))
    ways = {
        "alone": ("--prompt", "A red ball moves left.", "-o", "alone"),
        "batch": ("--batch", "batch.jsonl", "-o", "batch"),
        "two": ("--prompt", "A red ball moves left.", "--num-processes", "2", "-o", "two"),
    }
    for name, words in ways.items():
        recorder.run("generate", *words, settings=settings)
        for number, path in enumerate(sorted((recorder.folder / name).glob("*.mp4"))):
            recorder.keep_frames(f"generate {name} {number}", path)


def record_commands(recorder: Recorder) -> None:
    """Record exit codes and --json objects of many short commands."""
    (recorder.folder / "broken.yaml").write_text("model: Cosmos-Tiny-Text2World\nnum_frame: 9\n")
    (recorder.folder / "bad.jsonl").write_text('{"promt": "x"}\n')
    for command in COMMANDS:
        code, out = recorder.run(*command.split(), code=None)
        value = recorder.without_words(json.loads(out)) if command.endswith("--json") else None
        recorder.found.setdefault(f"cosmos {command}", []).append([code, value])


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yield one line for each place in which two records differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if key not in before or key not in now:
                yield f"{where}/{key}: only {'now' if key in now else 'before'}"
            else:
                yield from differences(before[key], now[key], f"{where}/{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from differences(old, new, f"{where}[{number}]")
    elif before != now:
        yield f"{where}: {json.dumps(before)[:100]} -> {json.dumps(now)[:100]}"


def main() -> int:
    """Write the record; with --compare return 1 when it differs from an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--compare", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="record-") as scratch:
        recorder = Recorder(Path(scratch).resolve())
        record_prep(recorder)
        record_training(recorder)
        record_promotion(recorder)
        record_videos(recorder)
        record_commands(recorder)
    found = json.loads(json.dumps(recorder.found))
    options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} entries in {options.file}")
    if not options.compare:
        return 0
    lines = list(differences(json.loads(options.compare.read_text()), found))
    print("\n".join([*lines, f"{len(lines)} differences from {options.compare}"]))
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
