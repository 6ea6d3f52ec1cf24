"""What decides the quality of the tiny model: `python tests/bench/study.py --out FOLDER`.

Sampling settings are compared with the embedded model as it is, on held-out combinations; training
settings with one post-training on the mascot each, through the real commands. Every variant gets
its scores and its time; `study.json` has the figures and `study.html` the plots.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from cosmos_cli import files, html, paths
from cosmos_cli.commands.download import CONCEPT_CLIPS, ORDINARY_CLIPS
from cosmos_cli.evaluate import evaluation, samples
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.generate.video_models import load_denoiser
from cosmos_cli.gpus import best_device
from cosmos_cli.model.device import number_format
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import Recipe

STEPS = (4, 8, 16, 35)
GUIDANCES = (0.0, 1.0, 2.0, 4.0, 7.0)
# What each training study changes, and to which values.
TRAININGS: dict[str, tuple[tuple[str, Any], ...]] = {
    "EMA rate": (("ema_rate", 0.05), ("ema_rate", 0.1), ("ema_rate", 0.25)),
    "LoRA rank, 0 for full": (("lora_rank", 0), ("lora_rank", 4), ("lora_rank", 16)),
    "text dropout": (("text_dropout", 0.0), ("text_dropout", 0.2), ("text_dropout", 0.5)),
    "number of clips": (("clips", 3), ("clips", 6), ("clips", 12), ("clips", 24)),
    "ordinary clips beside": (("ordinary", 0), ("ordinary", 6), ("ordinary", 24)),
}
# Full training has a step size of its own.
FULL_LEARNING_RATE = 2e-4
DATASET = {"clips": CONCEPT_CLIPS, "ordinary": ORDINARY_CLIPS}

Row = dict[str, Any]


def sampling(r: Recipe, prompts: int, device: str) -> Iterator[Row]:
    """Scores of the base model by solver and steps, then by guidance."""
    path = paths.EMBEDDED_DIR / "model.safetensors"
    wanted = [trial for trial in samples.world_trials(prompts) if not trial.of_mascot]
    mascot = samples.world_trials(1)[-1]
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, number_format(device))
    variants = [
        (f"steps with {solver}", steps, {"sampler": solver, "num_steps": steps})
        for solver in ("euler", "res")
        for steps in STEPS
    ] + [("guidance", guidance, {"guidance": guidance}) for guidance in GUIDANCES]
    for study, value, changes in variants:
        began = time.monotonic()
        changed, trials = r.model_copy(update=changes), [*wanted, mascot]
        net = load_denoiser(r, path, device, number_format(device))
        text_embs = samples.read_prompts(changed, trials, device)
        with TemporaryDirectory() as folder:
            store = samples.Store(Path(folder), changed, trials, device)
            samples.sample_trials(store, net, Weights(path, ""), text_embs, len(trials))
            with torch.inference_mode():
                made = samples.read_samples(store, tokenizer, Weights(path, ""))
                scores = evaluation.scores(made)
        del scores["concept"]
        yield {"study": study, "value": value, "seconds": time.monotonic() - began, **scores}


def training(r: Recipe, prompts: int, folder: Path) -> Iterator[Row]:
    """Scores after one post-training for each value of each key."""
    for study, variants in TRAININGS.items():
        for key, value in variants:
            here = folder / f"{key}_{value}"
            drawn = DATASET | {key: value} if key in DATASET else DATASET
            world.write_dataset(here / r.dataset_dir, drawn["clips"], drawn["ordinary"], seed=0)
            options = [] if key in DATASET else ["--set", f"{key}={value}"]
            if (key, value) == ("lora_rank", 0):
                options += ["--set", f"learning_rate={FULL_LEARNING_RATE}"]
            began = time.monotonic()
            for verb in ("prep", "train", "promote"):
                cosmos(here, verb, *options)
            seconds = time.monotonic() - began
            done = cosmos(here, "evaluate", "--model", "promoted", "--prompts", str(prompts))
            scores = done["models"]["promoted"]["scores"]
            yield {"study": study, "value": value, "seconds": seconds, **scores}


def cosmos(folder: Path, verb: str, *options: str) -> Row:
    """The result of a command in a folder of its own."""
    command = [sys.executable, "-m", "cosmos_cli", verb, "tiny", "--json", *options]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: Row = json.loads(done.stdout)
    return result


def page(rows: list[Row]) -> str:
    """A plot of the scores of each study and a table of all figures."""
    sections = []
    for study in dict.fromkeys(row["study"] for row in rows):
        found = [row for row in rows if row["study"] == study]
        names = [key for key in found[0] if key not in ("study", "value", "seconds")]
        scores = {name: [(row["value"], row[name]) for row in found] for name in names}
        seconds = {"seconds": [(row["value"], row["seconds"]) for row in found]}
        table = html.table(
            [
                (
                    f"{row['value']:g}",
                    *(f"{row[name]:.1%}" for name in names),
                    round(row["seconds"]),
                )
                for row in found
            ],
            (study, *names, "seconds"),
        )
        plots = html.row(
            html.chart(scores, study, "share of videos that are right"),
            html.chart(seconds, study, "seconds"),
        )
        sections.append((study, plots + table))
    return html.page("What decides the quality of the tiny model", sections)


def main() -> None:
    """Runs all studies, writing after each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    r = loading.load("tiny").recipe
    rows: list[Row] = []
    for found in (
        sampling(r, options.prompts, best_device()),
        training(r, options.prompts, options.out / "runs"),
    ):
        for row in found:
            rows.append(row)
            print(json.dumps(row), flush=True)
            files.write_json(options.out / "study.json", rows)
            files.write_text(options.out / "study.html", page(rows))


if __name__ == "__main__":
    main()
