"""What decides the quality of the tiny model: `python tests/bench/study.py --out FOLDER`.

sampling  scores of the embedded model by solver and steps, then by guidance.
training  scores after one post-training on the mascot for each value of each key, through the real
          commands.
clips     scores by steps for 3, 12, 24 and 200 clips, of a LoRA and of all weights, on three seeds;
          FOLDER keeps the scores of each training, so a study with the same `--prompts` continues
          where it was stopped.
search    finds the levels of `speed: fast`: distance of its latents from those of 100 steps of res,
          by number, spacing and lowest of the levels, and by what is kept between them.
fast      scores of `speed: fast`, of fp8 and of 35 Euler steps in pairs, after one post-training.

The sampling and training studies give every variant its scores and its time. `study.json` has the
figures and `study.html` the plots.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import common
import torch
from torch import Tensor

from cosmos_cli import files, html, paths
from cosmos_cli.commands.download import CONCEPT_CLIPS, ORDINARY_CLIPS
from cosmos_cli.evaluate import evaluation, samples
from cosmos_cli.evaluate.statistics import paired
from cosmos_cli.generate.jobs import Weights
from cosmos_cli.generate.video_models import load_denoiser, sample_latents
from cosmos_cli.gpus import best_device
from cosmos_cli.model import sampler
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.tiny import dataset
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import SET_BY_FAST, Recipe
from cosmos_cli.spec import TINY

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
# Numbers of levels for which `search` finds the best schedule.
COUNTS = (6, 7, 8, 9, 10, 11, 12, 14, 16)
# Steps of res that stand for the exact solution of the sampling equation.
REFERENCE_STEPS = 100
# The datasets of `clips`: mascot clips, with as many of other things; and the steps that are saved.
CLIPS, CLIP_STEPS, SEEDS = (3, 12, 24, 200), range(50, 301, 50), 3
DATASET = {"clips": CONCEPT_CLIPS, "ordinary": ORDINARY_CLIPS}

Row = dict[str, Any]


def sampling(r: Recipe, prompts: int, _folder: Path) -> Iterator[Row]:
    """Scores of the base model by solver and steps, then by guidance."""
    path, device = paths.EMBEDDED_DIR / "model.safetensors", best_device()
    wanted = [trial for trial in samples.world_trials(prompts) if not trial.of_mascot]
    mascot = samples.world_trials(1)[-1]
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, default_dtype(device))
    variants = [
        (f"steps with {solver}", steps, {"sampler": solver, "num_steps": steps})
        for solver in ("euler", "res")
        for steps in STEPS
    ] + [("guidance", guidance, {"guidance": guidance}) for guidance in GUIDANCES]
    for study, value, changes in variants:
        began = time.monotonic()
        changed, trials = r.model_copy(update=changes), [*wanted, mascot]
        net = load_denoiser(r, path, device)
        text_embs = samples.read_prompts(changed, trials, device)
        with TemporaryDirectory() as folder:
            store = samples.Store(Path(folder), changed, trials, device)
            samples.sample_trials(store, net, Weights(path, ""), text_embs, len(trials))
            with torch.inference_mode():
                made = samples.read_samples(store, tokenizer, Weights(path, ""))
                read = [replace(s, scores=evaluation.world_scores(s)) for s in made]
        scores = evaluation.means(evaluation.by_score(read, evaluation.CHANCE))
        del scores["concept"]
        yield {"study": study, "value": value, "seconds": time.monotonic() - began, **scores}


def training(r: Recipe, prompts: int, folder: Path) -> Iterator[Row]:
    """Scores after one post-training for each value of each key."""
    for study, variants in TRAININGS.items():
        for key, value in variants:
            here = folder / f"{key}_{value}"
            drawn = DATASET | {key: value} if key in DATASET else DATASET
            dataset.write_mascots(here / r.dataset_dir, drawn["clips"], drawn["ordinary"], seed=0)
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


def clips(r: Recipe, prompts: int, folder: Path) -> Iterator[Row]:
    """Scores by steps for each number of clips, of a LoRA and of all weights, on three seeds."""
    kinds = {"LoRA": [], "full": ["lora_rank=0", f"learning_rate={FULL_LEARNING_RATE}"]}
    steps = [f"max_steps={CLIP_STEPS[-1]}", f"save_every_steps={CLIP_STEPS[0]}", "keep_last=1"]
    drawn = [*product(CLIPS, kinds, range(SEEDS))]

    def run(count: int, kind: str, seed: int) -> Row:
        here = folder / f"{count}_{kind}_{seed}"
        kept = folder / f"{here.name}_{prompts}.json"
        if kept.exists():
            found: Row = files.read_json(kept)
            return found
        dataset.write_mascots(here / r.dataset_dir, count, count, seed=seed)
        keys = [*kinds[kind], *steps, f"seed={seed}", "preview_every_steps=0", "num_processes=1"]
        options = [word for key in keys for word in ("--set", key)]
        for verb in ("prep", "train"):
            cosmos(here, verb, *options)
        own = ["--steps", "all", "--prompts", str(prompts)]
        found = cosmos(here, "evaluate", *options, *own)["steps"]["means"]
        files.write_json(kept, found)
        print(f"{here.name}: {json.dumps(found)}", flush=True)
        return found

    with ThreadPoolExecutor(min(os.cpu_count() // 2, len(drawn))) as pool:
        made = dict(zip(drawn, pool.map(lambda one: run(*one), drawn), strict=True))
    for count, kind in product(CLIPS, kinds):
        of_seeds = [made[count, kind, seed] for seed in range(SEEDS)]
        for step in of_seeds[0]:
            means = {
                name: statistics.fmean(found[step][name] for found in of_seeds)
                for name in evaluation.CHANCE
            }
            yield {"study": f"{count} clips, {kind}", "value": int(step), **means}


# --- speed: fast ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Levels of `speed: fast` as a formula, and what is kept or extrapolated between them.

    Args:
        count: the number of levels, from sigma_max down.
        rho: the exponent of their spacing; levels of a large rho are even in log sigma.
        lowest: the last sigma.
        extrapolation: 0 keeps the last estimate, 1 extrapolates the last two in log sigma.
        kept: the estimate of x0, or the output of the network.
        guided: the log sigma between which guidance is used.
    """

    count: int
    rho: float = sampler.RHO
    lowest: float = 0.2
    extrapolation: float = 0.5
    kept: str = "x0"
    guided: tuple[float, float] = (-math.inf, math.inf)

    @property
    def levels(self) -> list[float]:
        """The levels in log sigma."""
        high, low = (sigma ** (1 / self.rho) for sigma in (TINY.sigma_max, self.lowest))
        steps = [i / (self.count - 1) for i in range(self.count)]
        return [self.rho * math.log(high + step * (low - high)) for step in steps]

    def is_guided(self, settings: Recipe, c_noise_B: Tensor) -> bool:
        """True if a step needs the unconditional pass, in the place of `sampler.is_guided`."""
        return self.guided[0] < 4 * c_noise_B[0].item() <= self.guided[1]

    @property
    def passes(self) -> int:
        return sum(1 + (self.guided[0] < level <= self.guided[1]) for level in self.levels)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Put this schedule in the place of that of `speed: fast`."""
        changes = {
            "FAST_LOG_SIGMAS": tuple(self.levels), "FAST_EXTRAPOLATION": self.extrapolation,
            "is_guided": self.is_guided,
        }  # fmt: skip
        if self.kept == "output":
            changes["res"] = keep_output
        with mock.patch.multiple(sampler, **changes):
            yield


def keep_output(
    denoiser: sampler.Denoiser, noise: Tensor, sigmas: list[float], on_step: Any, share: float
) -> Tensor:
    """Solve for x0 like `sampler.res`, but keep or extrapolate the network's output between levels.

    With t = atan(sigma / sigma_data), z = c_in xt turns at the rate dz/dt = -net_out.
    Source: Lu and Song 2024, Simplifying, Stabilizing and Scaling Continuous-Time Consistency
    Models, section 3.
    """
    data = TINY.sigma_data
    x, before = noise.float() * sigmas[0], None
    for i, (sigma, following) in enumerate(pairwise([*sigmas, 0.0])):
        t, t_next = math.atan2(sigma, data), math.atan2(following, data)
        z = x / math.hypot(sigma, data)
        net_out = (denoiser(x, sigma) / data - math.cos(t) * z) / math.sin(t)
        step = net_out
        if before:
            step = net_out + share * (t - t_next) / 2 / (before[0] - t) * (net_out - before[1])
        x = math.hypot(following, data) * (z + (t - t_next) * step)
        before = t, net_out
        on_step(i)
    return x


def search(r: Recipe, prompts: int, _folder: Path) -> Iterator[Row]:
    """Distance of fast latents from the reference, for the best schedules and alternatives."""
    trials = [trial for trial in samples.world_trials(prompts) if not trial.of_mascot]
    path, device = paths.EMBEDDED_DIR / "model.safetensors", best_device()
    # In bf16, rounding alone moves the latents.
    net = load_denoiser(r, path, device).float()
    texts = samples.read_prompts(r, trials, device)
    fast = r.model_copy(update={"speed": "fast", "sampler": "res"})

    @torch.inference_mode()
    def latents(settings: Recipe) -> Tensor:
        return sample_latents(settings, net, texts, [trial.seed for trial in trials], "")

    reference = latents(r.model_copy(update={"sampler": "res", "num_steps": REFERENCE_STEPS}))

    def far(made: Tensor) -> float:
        apart = (made - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        return statistics.fmean(apart.tolist())

    seen: dict[Schedule, float] = {}

    def measure(schedule: Schedule) -> float:
        if schedule not in seen:
            with schedule.used():
                seen[schedule] = far(latents(fast))
        return seen[schedule]

    def row(study: str, value: float, schedule: Schedule) -> Row:
        about = {"rho": schedule.rho, "lowest": schedule.lowest}
        about |= {"extrapolation": schedule.extrapolation, "passes": schedule.passes}
        return {"study": study, "value": value, **about, "distance": measure(schedule)}

    for steps in (*COUNTS, 20, 35):
        made = latents(r.model_copy(update={"sampler": "euler", "num_steps": steps}))
        yield {"study": "Euler", "value": steps, "passes": 2 * steps, "distance": far(made)}
    best = Schedule(COUNTS[0])
    for count in COUNTS:
        best = descend(replace(best, count=count), measure)
        yield row("best schedule", count, best)
        yield row("keep x0", count, replace(best, extrapolation=0.0))
        yield row("extrapolate x0", count, replace(best, extrapolation=1.0))
        yield row("keep the output", count, replace(best, extrapolation=0.0, kept="output"))
        yield row("extrapolate the output", count, replace(best, extrapolation=1.0, kept="output"))
        if count in (8, 9, 10):
            for left_out in range(1, 5):
                at_end = best.levels[-left_out] + 1e-3, math.inf
                at_start = -math.inf, best.levels[left_out - 1] - 1e-3
                for where, guided in (("low", at_end), ("high", at_start)):
                    study = f"{count} levels, unguided at {where} sigma"
                    yield row(study, left_out, replace(best, guided=guided))


def descend(start: Schedule, measure: Callable[[Schedule], float]) -> Schedule:
    """Return the best schedule near `start` by coordinate descent with shrinking steps."""
    best = start
    for size in (1.0, 0.5, 0.25):
        for _ in range(2):
            near = [
                replace(best, rho=best.rho * 1.5**size), replace(best, rho=best.rho / 1.5**size),
                replace(best, lowest=best.lowest * 2**size),
                replace(best, lowest=best.lowest / 2**size),
                replace(best, extrapolation=best.extrapolation + 0.3 * size),
                replace(best, extrapolation=max(0.0, best.extrapolation - 0.3 * size)),
            ]  # fmt: skip
            best = min([best, *near], key=measure)
    return best


def fast(r: Recipe, prompts: int, folder: Path) -> Iterator[Row]:
    """Loss of each score by `speed: fast` and by fp8, in pairs with 35 Euler steps.

    The model is post-trained first. As many prompts ask for the mascot as for other things.
    """
    dataset.write_mascots(folder / r.dataset_dir, *DATASET.values(), seed=0)
    for verb in ("prep", "train", "promote"):
        done = cosmos(folder, verb)
    device, own = best_device(), Weights(Path(folder, done["artifacts"][0]), "")
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, default_dtype(device))
    trials = samples.world_trials(2 * prompts)
    trials = [t for t in trials if not t.of_mascot][:prompts] + [t for t in trials if t.of_mascot]
    texts = samples.read_prompts(r, trials, device)
    exact = {"speed": "exact", "sampler": "euler", "num_steps": 35}
    settings = {
        "exact": exact,
        "fast": {"speed": "fast", **SET_BY_FAST},
        "fp8": {**exact, "sampling_precision": "fp8"},
        "fast, fp8": {"speed": "fast", **SET_BY_FAST, "sampling_precision": "fp8"},
    }
    values = {}
    for name, changes in settings.items():
        began, changed = time.monotonic(), r.model_copy(update=changes)
        net = load_denoiser(changed, own.path, device)
        store = samples.Store(folder / "latents", changed, trials, device)
        samples.sample_trials(store, net, own, texts, len(trials))
        measured = [
            replace(sample, pixels=None, scores=evaluation.world_scores(sample))
            for sample in samples.read_samples(store, tokenizer, own)
        ]
        values[name] = evaluation.by_score(measured, evaluation.CHANCE)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        for score in evaluation.CHANCE if name != "exact" else ():
            found = paired(values["exact"][score], values[name][score])
            yield {
                "study": name, "value": score, "pairs": found.count, "exact": found.before,
                "changed": found.after, "loss": -found.difference, "loss_at_most": -found.low,
            }  # fmt: skip


def cosmos(folder: Path, verb: str, *options: str) -> Row:
    """The result of a command in a folder of its own."""
    command = [sys.executable, "-m", "cosmos_cli", verb, "tiny", "--json", *options]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    result: Row = json.loads(done.stdout)
    return result


def page(rows: list[Row]) -> str:
    """A plot of the scores of each study and a table of all figures."""
    distances = [row for row in rows if "distance" in row]
    losses = [row for row in rows if "loss" in row]
    rows = [row for row in rows if row not in distances and row not in losses]
    sections = [
        *([("Distance from the exact solution", distance_plot(distances))] if distances else []),
        *([("Loss of speed: fast in pairs", plain_table(losses))] if losses else []),
    ]
    for study in dict.fromkeys(row["study"] for row in rows):
        found = [row for row in rows if row["study"] == study]
        names = [key for key in found[0] if key not in ("study", "value", "seconds")]
        timed = "seconds" in found[0]
        scores = {name: [(row["value"], row[name]) for row in found] for name in names}
        lines = [
            (
                f"{row['value']:g}",
                *(f"{row[name]:.1%}" for name in names),
                *([round(row["seconds"])] if timed else []),
            )
            for row in found
        ]
        table = html.table(lines, (study, *names, *(["seconds"] if timed else [])))
        plots = [html.chart(scores, study, "share of videos that are right")]
        if timed:
            seconds = {"seconds": [(row["value"], row["seconds"]) for row in found]}
            plots.append(html.chart(seconds, study, "seconds"))
        sections.append((study, html.row(*plots) + table))
    return html.page("What decides the quality of the tiny model", sections)


def distance_plot(rows: list[Row]) -> str:
    """A plot of the distance by passes, of the studies that vary the number of levels; a table."""
    by_passes = [row for row in rows if "unguided" not in row["study"]]
    lines = {
        study: [(row["passes"], row["distance"]) for row in by_passes if row["study"] == study]
        for study in dict.fromkeys(row["study"] for row in by_passes)
    }
    name = "mean relative L2 distance of the latents"
    # Extrapolating the output of the network ends far above all others.
    kept = {study: line for study, line in lines.items() if "output" not in study}
    plots = html.row(html.chart(lines, "passes", name), html.chart(kept, "passes", name))
    return plots + plain_table(rows)


def plain_table(rows: list[Row]) -> str:
    """A table of rows that may differ in their columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = ((row.get(column, "") for column in columns) for row in rows)
    shown = ([f"{v:.4g}" if isinstance(v, float) else v for v in line] for line in values)
    return html.table(shown, columns)


PARTS = {"sampling": sampling, "training": training, "clips": clips, "search": search, "fast": fast}


def main() -> None:
    """Runs the chosen studies, writing after each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    common.add_parts(parser, PARTS, ",".join(PARTS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    r = loading.load("tiny").recipe
    rows: list[Row] = []
    for part in options.parts:
        for row in PARTS[part](r, options.prompts, options.out / "runs"):
            rows.append(row)
            print(json.dumps(row), flush=True)
            files.write_json(options.out / "study.json", rows)
            files.write_text(options.out / "study.html", page(rows))


if __name__ == "__main__":
    main()
