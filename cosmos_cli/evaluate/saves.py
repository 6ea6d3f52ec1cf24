"""Choose among the saves of a run by their scores. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from cosmos_cli import files, hashes
from cosmos_cli.evaluate import comparison
from cosmos_cli.generate.choice import read_weights
from cosmos_cli.generate.jobs import Lora, Weights
from cosmos_cli.paths import Run
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import page as run_page
from cosmos_cli.train import resumes, status

BASE = "base"
# The weights that promote uses by default.
KIND = "ema"


def weights_of(r: Recipe, run: Run, steps: Sequence[int]) -> dict[str, Weights]:
    """Return the base and the saves of some steps, by name.

    Raises:
        UserError: weights are missing or damaged, or the recipe names another base than the run.
    """
    base = read_weights(resumes.trained_recipe(r, run), None)
    resumes.require_base(run, base.path, base.sha256)
    found = {BASE: base}
    for step in steps:
        path = run.lora(step, KIND)
        # The run may have trained a LoRA although the recipe has changed since.
        if path.exists():
            found[_name(step)] = Weights(
                base.path, base.sha256, (Lora(path, 1.0, hashes.sha256_file(path)),)
            )
        else:
            found[_name(step)] = read_weights(r, run.model(step, KIND))
    return found


def _name(step: int) -> str:
    return f"step {step}"


def choose(rows: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> int:
    """Return the step that the scores of videos choose, 0 for the base.

    For each step, count the scores that are better than the base's and subtract those that are
    worse. The highest count wins; then the better mean rank over all scores; then the earlier step.
    If no count is above 0, the base wins.

    `rows` are those of `comparison.compare`, each step against the base; `steps` are ascending.
    """
    judged = [row for row in rows if row["better"] and row["score"] not in comparison.OF_CLIPS]
    votes = dict.fromkeys(steps, 0)
    ranks: dict[int, list[int]] = {step: [] for step in steps}
    by_score: dict[str, dict[int, float]] = {}
    names = {_name(step): step for step in steps}
    for row in judged:
        step = names[row["model"]]
        votes[step] += {comparison.BETTER: 1, comparison.WORSE: -1}.get(row["verdict"], 0)
        sign = 1 if row["better"] == "lower" else -1
        by_score.setdefault(row["score"], {})[step] = sign * row["after"]
    for values in by_score.values():
        for step, value in values.items():
            ranks[step].append(sum(other < value for other in values.values()))
    best = min(steps, key=lambda step: (-votes[step], fmean(ranks[step] or [0]), step))
    return best if votes[best] > 0 else 0


def summarise(run: Run, figures: Mapping[str, Any], steps: Sequence[int]) -> dict[str, Any]:
    """Return the mean scores of each step and the steps that they and the held-out error choose.

    The means are those of the comparisons; step 0 is the base.
    """
    means: dict[str, dict[str, float]] = {"0": {}}
    names = {_name(step): str(step) for step in steps}
    rows = figures["comparisons"]
    for row in rows:
        means["0"][row["score"]] = row["before"]
        means.setdefault(names[row["model"]], {})[row["score"]] = row["after"]
    return {
        "weights": KIND,
        "prompts": figures["prompts"],
        "better": {row["score"]: row["better"] for row in rows},
        "means": means,
        "chosen_step": choose(rows, steps),
        "best_step": status.best_step(run),
    }


def keep_scores(run: Run, found: Mapping[str, Any]) -> None:
    """Keep the scores in the run's folder, and draw them on its page.

    Raises:
        UserError: a file cannot be written.
    """
    files.write_json(run.scores, found)
    if run_page.has_facts(run):
        run_page.write_page(run)


def shown(found: Mapping[str, Any]) -> list[str]:
    """Return the models to show: the base, and the steps that scores and held-out error choose."""
    measured = set(map(int, found["means"])) - {0}
    chosen = [step for step in (found["chosen_step"], found["best_step"]) if step in measured]
    return [BASE, *map(_name, dict.fromkeys(chosen or sorted(measured)[-1:]))]
