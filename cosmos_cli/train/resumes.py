"""Check what a run resumes from, and what it would overwrite. Does not import torch."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, files, hashes, paths
from cosmos_cli.errors import UserError, asset_error, usage_error
from cosmos_cli.paths import Run
from cosmos_cli.prep import holdout
from cosmos_cli.recipe import loading
from cosmos_cli.train import status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Return the command line of a verb on the user's recipe, given the verb and `extra` arguments.
CommandLine = Callable[..., str]


def check_resume(r: Recipe, run: Run, ranks: int) -> int:
    """Return the step from which the run resumes, 0 for a new run.

    Raises:
        UserError: the saved run has other base weights, or other values of keys that decide a run.
    """
    steps = run.resumable_steps()
    if not steps:
        return 0
    folder = run.resume_state(steps[-1])
    saved = files.read_json(folder / paths.MANIFEST_FILE)
    changes = _changes(r, saved)
    for key in r.deciding("run"):
        before, now = changes.get(key, (None, None))
        if before != now and not _are_equivalent(key, before, now, "clips" not in changes):
            if key == "base" and ("base" in saved or _is_moved(before, now)):
                continue
            clips = ", whose clips differ" if key == "dataset_dir" else ""
            raise _another_run(folder, f"{key} = {before}, the recipe says {now}{clips}")
    if "base" in saved:
        base = r.model_files.dit
        if hashes.sha256_path(base) != saved["base"]:
            raise _another_run(folder, f"other base weights than those now in {base}")
    if saved["world_size"] != ranks:
        changes["num_processes"] = (saved["world_size"], ranks)
    if "clips" in changes:
        console.warn(
            "the dataset has changed since this run was saved, and so has the order of its clips"
        )
    if changes:
        rows = [(key, str(before), str(now), str(now)) for key, (before, now) in changes.items()]
        console.say(console.table(rows, ("key", "checkpoint", "recipe", "used")))
    return steps[-1]


def _changes(r: Recipe, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ from a saved run, each with its saved and its present value.

    The pseudo-key "clips" stands for the manifest of the dataset.
    """
    changes = {
        key: (value, getattr(r, key))
        for key, value in saved["recipe"].items()
        if hasattr(r, key) and getattr(r, key) != value
    }
    dataset = r.dataset.manifest
    now = hashes.sha256_file(dataset) if dataset.exists() else "is missing"
    if saved["dataset"] != now:
        changes["clips"] = (f"manifest {saved['dataset'][:12]}", f"manifest {now[:12]}")
    return changes


def drop_errors_of_other_clips(r: Recipe, run: Run) -> None:
    """Drop the held-out errors of a run, with a warning, if it resumes with other held-out clips.

    Errors of other clips cannot be compared, and would decide which step is best.
    """
    if not (start := run.last_step):
        return
    saved = files.read_json(run.resume_state(start) / paths.MANIFEST_FILE)
    now = holdout.measured_key(r.dataset.read_manifest(), r.validate_clips)
    # Saves of earlier versions do not say which clips were measured.
    if saved.get("measured", now) == now:
        return
    rows = list(status.rows(run))
    kept = [row for row in rows if status.HELD_OUT not in row]
    if len(kept) < len(rows):
        console.warn(
            f"the held-out clips have changed: their errors before step {start} are dropped, so "
            "the best step is chosen from this step on"
        )
        files.write_text(run.metrics, "".join(f"{json.dumps(row)}\n" for row in kept))


def check_overwrite(r: Recipe, run: Run, start: int, command: CommandLine) -> None:
    """Refuse to replace the weights that an earlier training of this run saved after `start`.

    A resumed run reproduces the weights after its resume state bit for bit. So they are protected
    only if the recipe or the clips changed. Model files of an incomplete save do not count.

    Raises:
        UserError: weights or metrics would be overwritten, and --overwrite was not given.
    """
    newest = status.saved_step(run)
    if newest <= start or start >= r.max_steps:
        return
    later = [step for step in run.weight_files(start) if step <= newest]
    if start:
        saved = files.read_json(run.resume_state(start) / paths.MANIFEST_FILE)
        changed = {*r.deciding("steps"), "clips"} & _changes(r, saved).keys()
        if r.lr_end_factor == 1:
            changed -= {"max_steps"}
        if not later or not changed:
            return
        why = f"would resume at step {start} with another {', '.join(sorted(changed))}"
    elif later or status.rows(run):
        why = "has no complete resume state and would start again at step 0"
    else:
        return
    lost = f"the weights of {_steps(later)}" if later else "the metrics of the earlier training"
    fix = _suggestions(r, run, later, command)
    raise usage_error(run.root, f"this run {why}, overwriting {lost}", fix)


def warn_of_overwriting(r: Recipe, run: Run, command: CommandLine) -> None:
    """Warn in a plan if an earlier run's weights would keep the run from starting."""
    try:
        check_overwrite(r, run, run.last_step, command)
    except UserError as error:
        console.warn(str(error))


def deleted_by_overwriting(run: Run, start: int) -> tuple[Path, ...]:
    """Return and report the weight files that --overwrite deletes."""
    if start:
        console.say(f"--overwrite: the run resumes at step {start}, nothing up to it is deleted")
    written = tuple(path for written in run.weight_files(start).values() for path in written)
    if written:
        console.say(f"--overwrite deletes {len(written)} model files of steps after {start}")
    return written


def _steps(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} saves, steps {steps[0]} to {steps[-1]}"


def free_name(run: Run) -> str:
    """Return a name for another run next to this one."""
    names = (f"{run.root.name[:90]}-{number}" for number in itertools.count(2))
    return next(name for name in names if not run.root.with_name(name).exists())


def _suggestions(r: Recipe, run: Run, later: list[int], command: CommandLine) -> str:
    """Return the commands to choose from: a new run, a run from these weights, or --overwrite."""
    another = command("train", extra=f"--set name={free_name(run)}")
    ways = [f"another run: `{another}`"]
    if later:
        newest = run.weight_files()[later[-1]][0]
        base, first = newest, ""
        loras = {run.lora(later[-1], kind): kind for kind in ("ema", "reg")}
        if kind := loras.get(newest):
            # A LoRA is not a base by itself: promote merges it into the weights it was trained on.
            first = command("promote", extra=f"--step {later[-1]} --weights {kind} --name {r.name}")
            first += " && "
            base = paths.promoted_dir(r.spec, r.checkpoints_dir, r.name) / paths.MODEL_FILE
        ways.append(f"one that starts from them: `{first}{another} --set {quote(f'base={base}')}`")
    ways.append(f"delete them and start again: `{command('train', extra='--overwrite')}`")
    return "; ".join(ways)


def _are_equivalent(key: str, before: Any, now: Any, same_clips: bool) -> bool:
    """True if two values of a key mean the same. A dataset with the same clips is the same."""
    if key == "optimizer":
        return {before, now} == {"auto", "torch"}
    if key != "dataset_dir":
        return False
    return same_clips or os.path.abspath(before) == os.path.abspath(now)  # noqa: PTH100


def _is_moved(before: str | None, now: str | None) -> bool:
    """True if base weights, of which the run saved no hash, may be the same file at a new path.

    A resumed run of all weights takes nothing from its base, so the file need not be known.
    """
    if not before or not now:
        return False
    old, new = (paths.weights_in(Path(path).absolute()) for path in (before, now))
    if old.exists():
        return hashes.sha256_path(old) == hashes.sha256_path(new)
    console.warn(f"base was {before}, which is not there: the run continues from its own weights")
    return True


def _another_run(folder: Path, with_what: str) -> UserError:
    fix = f"start another: `cosmos train RECIPE --set name={free_name(Run(folder.parents[1]))}`"
    return usage_error(folder, f"this run was started with {with_what}", fix)


def require_model(r: Recipe, run: Run) -> None:
    """Refuse a recipe of another model than the one that the run trained.

    Raises:
        UserError: the models differ.
    """
    trained = loading.load(run.resolved).recipe.model if run.resolved.exists() else r.model
    if trained != r.model:
        what = f"this run trained {trained}, the recipe says {r.model}"
        raise usage_error(run.root, what, f"use `--set model={trained}`, or another `name`")


def trained_recipe(r: Recipe, run: Run) -> Recipe:
    """Return the recipe that a run was trained with, with the base weights that it was trained on.

    Its base may have been moved since, or replaced by other weights. Then the base of `r` counts.
    """
    if not run.resolved.exists():
        return r
    trained = loading.load(run.resolved).recipe
    trained = trained.model_copy(update={"checkpoints_dir": r.checkpoints_dir})
    if r.base != trained.base and not _has_base(run, trained.model_files.dit):
        return trained.model_copy(update={"base": r.base})
    return trained


def _has_base(run: Run, base: Path) -> bool:
    """True if a file holds the base of a run, as far as the run recorded its hash."""
    if not base.exists():
        return False
    try:
        require_base(run, base, hashes.sha256_path(base))
    except UserError:
        return False
    return True


def require_base(run: Run, base: Path, sha256: str) -> None:
    """Refuse a base other than the one that a LoRA was trained on; resume states hold its hash.

    Raises:
        UserError: it is another file.
    """
    for step in run.resumable_steps()[-1:]:
        known = files.read_json(run.resume_state(step) / paths.MANIFEST_FILE).get("base", sha256)
        if sha256 and known != sha256:
            what = (
                f"is not the base that the run was trained on: its sha256 is {sha256[:12]}, the "
                f"run says {known[:12]}"
            )
            raise asset_error(base, what, "name that file with `--set base=FILE`")
