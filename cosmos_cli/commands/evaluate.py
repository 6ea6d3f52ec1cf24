"""`cosmos evaluate`: measure models before and after post-training."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cosmos_cli import console, files
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, asset_error, dataset_error, usage_error
from cosmos_cli.paths import Run

if TYPE_CHECKING:
    from cosmos_cli.generate.jobs import Weights
    from cosmos_cli.recipe.keys import Recipe

EMBEDDED_PROMPTS = 24
# The folder next to the page that keeps the latents of all videos.
LATENTS = "evaluation_latents"

# The endings of files that a report may be expected in, and that this one is not.
OTHER_PAGES = (".pdf", ".png", ".json", ".md", ".csv", ".mp4")


ModelOption = Annotated[
    list[str] | None,
    typer.Option(
        help="base, promoted, the name of a model in checkpoints_dir, or a folder or file of "
        "weights; may be repeated. Default: base, and promoted if there is one."
    ),
]
PromptsOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Prompts per model. The tiny model gets prompts of its synthetic world, and half as "
        f"many more of its mascot (default {EMBEDDED_PROMPTS}), other models the dataset's "
        "captions (default 0). A Video2World model continues N clips of each kind, from 1 and "
        "from 9 frames.",
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="The HTML page.")]
RequireOption = Annotated[
    list[str] | None,
    typer.Option(
        help="better, or the name of a score such as concept or edm_error: exit with code 6 "
        "unless each model is better than the first. better needs one score that is better "
        "and none that is worse. May be repeated."
    ),
]
StepsOption = Annotated[
    str | None,
    typer.Option(
        help="all, or saved steps such as 200,400: measure the base and these saves of the "
        "recipe's run, draw their scores as curves, and name the step that they choose."
    ),
]


def evaluate(
    recipe: options.RecipeArgument = "tiny",
    model: ModelOption = None,
    prompts: PromptsOption = None,
    output: OutputOption = Path("outputs/evaluation.html"),
    require: RequireOption = None,
    steps: StepsOption = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Measure models by the content of their videos and their error on held-out clips.

    Example: cosmos evaluate tiny --prompts 200
    """
    from cosmos_cli.train import preflight, resumes

    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    output = _page(files.expand(output))
    count = prompts if prompts is not None else EMBEDDED_PROMPTS if r.spec.embedded else 0
    run = Run(r.run_dir)
    if steps is not None:
        resumes.require_model(r, run)
    saved = _steps(run, steps, count, model or require) if steps is not None else []
    # The tiny model can do without a prepared dataset.
    if r.dataset.manifest.exists() or not r.spec.embedded:
        _check_settings(r, preflight.other_setting(r, r.dataset.read_manifest()))
    from cosmos_cli.evaluate import saves

    weights = (
        saves.weights_of(r, run, saved) if saved else _models(recipe, r, model, set_, bool(require))
    )
    from cosmos_cli.evaluate import comparison, page

    if not saved:
        _warn_of_other_clips(r, weights)
    better, cost, measure = _prepare(r, weights, count, output.parent / LATENTS)
    required = comparison.check_names(require, better) if require else []
    if dry_run:
        console.emit(_preview(r, weights, cost, output), as_json=json_)
        return
    for folder in (output.parent, *([run.root] if saved else [])):
        files.require_writable(folder)
    figures, samples = measure()
    names = list(weights)
    if saved:
        figures["steps"] = found = saves.summarise(run, figures, saved)
        names = saves.shown(found)
        saves.keep_scores(run, found)
    page.keep_larger(output, figures)
    # The truth, if any, is shown next to the models.
    shown = {n: own for n, own in samples.items() if n in names or n not in weights}
    written = page.write_page(output, r, figures, shown)
    result = Result(_text(figures, names), written, figures, f"xdg-open {shlex.quote(str(output))}")
    if lines := comparison.unmet(required, figures["comparisons"]):
        result.code, result.error = ExitCode.TRAINING, "\n".join(lines)
    console.emit(result, as_json=json_)
    raise typer.Exit(result.code)


Measure = Callable[[], tuple[dict[str, Any], dict[str, list[Any]]]]


def _prepare(
    r: Recipe, weights: dict[str, Weights], count: int, latents: Path
) -> tuple[dict[str, str], dict[str, Any], Measure]:
    """Return the better direction of each score, what measuring costs, and what measures.

    Raises:
        UserError: there is nothing to measure.
    """
    from cosmos_cli.evaluate import continuation, evaluation
    from cosmos_cli.gpus import best_device

    dataset, device = evaluation.PreparedClips.of(r), best_device()
    if r.spec.takes_frames:
        better = continuation.directions(r, count, bool(dataset and len(dataset.heldout)))
        if not better:
            what = "a Video2World model is measured on clips that it continues, and there are none"
            fix = "add `--prompts 24`"
            if count:
                fix = "set holdout_share to 0.1 in the recipe, then run prep and train again"
            raise usage_error("--prompts", what, fix)
        return better, {"prompts": count}, partial(continuation.evaluate, r, weights, count, device)
    store = evaluation.open_store(r, count, device, latents)
    better = evaluation.directions(r, dataset, len(store.wanted))
    cost = {"prompts": count, **evaluation.announce(r, weights, store)}
    return better, cost, partial(evaluation.evaluate, r, weights, store, count)


def _text(figures: dict[str, Any], names: list[str]) -> str:
    """Return the figures and comparisons of some models as tables."""
    from cosmos_cli.evaluate import comparison, page

    own = {**figures, "models": {name: figures["models"][name] for name in names}}
    rows = [row for row in figures["comparisons"] if row["model"] in names]
    parts = [console.table(page.figure_rows(own), ("", "by chance", *names))]
    parts += [console.table(*table) for _, table in comparison.tables(rows)]
    if found := figures.get("steps"):
        chosen, best = found["chosen_step"], found["best_step"]
        by_error = "was not measured" if best is None else f"chooses step {best}"
        by_scores = f"step {chosen}" if chosen else "the base"
        parts.append(f"the scores choose {by_scores}, the held-out error {by_error}")
    return "\n\n".join(parts)


def _steps(run: Run, text: str, count: int, others: list[str] | None) -> list[int]:
    """Return the saved steps that --steps names.

    Raises:
        UserError: they are not saved, or other options do not go with --steps.
    """
    from cosmos_cli.train import status

    if others:
        what = "compares the saves of the run, so it takes neither --model nor --require"
        fix = "promote the step that it chooses, then evaluate with --require"
        raise usage_error("--steps", what, fix)
    if not count:
        what = "compares saves by their videos, and none are to be made"
        raise usage_error("--steps", what, "add `--prompts 24`")
    saved = status.require_saved(run, "ema")
    listed = ",".join(map(str, saved))
    wanted = text.split(",")
    if text == "all":
        return saved
    if not all(word.strip().isdecimal() for word in wanted):
        what = f"{text!r} is neither all nor a list of steps"
        raise usage_error("--steps", what, f"use `--steps {listed}`")
    steps = sorted({int(word) for word in wanted})
    if lacking := sorted({*steps} - {*saved}):
        fix = f"use `--steps {listed}`"
        raise asset_error(run.checkpoints, f"step {lacking[0]} is not saved", fix)
    return steps


def _models(
    recipe: str, r: Recipe, model: list[str] | None, set_: list[str] | None, compares: bool
) -> dict[str, Weights]:
    """Return the weights to measure, by the name that the page gives them.

    Raises:
        UserError: a model does not exist, or one is to be compared with no other.
    """
    from cosmos_cli.generate import promoted
    from cosmos_cli.generate.choice import choose_model, find_weights

    there = not model and promoted.found(r.checkpoints_dir, r.spec)
    names = model or (["base", "promoted"] if there or compares else ["base"])
    # Models in different checkpoints_dirs may have folders of the same name.
    short = len({Path(name).name for name in names}) == len(names)
    label = {n: Path(n).name if short else n.strip("/").replace("/", "_") for n in names}
    # A file of the page has the name of its model, with "_" for spaces.
    if len({own.replace(" ", "_") for own in label.values()}) < len(label):
        what = f"two of {', '.join(label)} would have the same name on the page"
        raise usage_error("--model", what, "rename one of them")
    weights = {
        label[n]: find_weights(r, choose_model(recipe, n, set_ or []).weights) for n in label
    }
    if compares and len(weights) < 2:
        what = "there is no second model to compare"
        raise usage_error("--require", what, "use `--model base --model promoted`")
    return weights


def _page(output: Path) -> Path:
    """Return the path of the page that --output names: a file, or evaluation.html in a folder.

    Raises:
        UserError: the file has the ending of another format.
    """
    if output.is_dir():
        return (output / "evaluation.html").absolute()
    if output.suffix.lower() in OTHER_PAGES:
        page = shlex.quote(str(output.with_suffix(".html")))
        fix = f"name an .html file: `--output {page}`"
        raise usage_error(f"--output {output}", f"{output.suffix} files are not written", fix)
    return output.absolute()


def _check_settings(r: Recipe, other: str) -> None:
    """Warn of a dataset that was prepared with another setting than the recipe's.

    Raises:
        UserError: the model continues frames, and the clips do not have the size of its videos.
    """
    if other and r.spec.takes_frames:
        raise dataset_error(r.dataset.manifest, other, "run `cosmos prep RECIPE` again")
    if other:
        where = r.dataset.manifest
        console.warn(f"{where}: {other}; the EDM error is measured on the clips as prep wrote them")


def _warn_of_other_clips(r: Recipe, weights: dict[str, Weights]) -> None:
    """Warn of models trained on another state of the dataset, when other clips were held out."""
    from cosmos_cli import hashes
    from cosmos_cli.generate import promoted

    manifest = r.dataset.manifest
    now = hashes.sha256_file(manifest) if manifest.exists() else None
    for name, own in weights.items():
        file = own.loras[0].path if own.loras else own.path
        trained = promoted.manifest_of(file.parent).get("dataset_manifest_sha256")
        if now and trained and trained != now:
            console.warn(
                f"{name} was trained on another dataset than {r.dataset.root} as it is now; if "
                "clips that are held out now were among its training clips, its errors are too low"
            )


def _preview(r: Recipe, weights: dict[str, Weights], cost: dict[str, Any], output: Path) -> Result:
    """Return what would be measured.

    Raises:
        UserError: a network is missing.
    """
    if cost["prompts"]:
        from cosmos_cli.generate import batch

        batch.require_other_networks(r)
    what = f"{cost.get('videos', 0) // len(weights)} videos"
    if r.spec.takes_frames:
        what = f"at most {cost['prompts']} clips of each kind, from 1 and from 9 frames"
    for name, own in weights.items():
        loras = "".join(f" with the LoRA {lora.path}" for lora in own.loras)
        console.say(f"would measure {name} with {what}: {own.path}{loras}")
    models = {name: {"path": str(own.path), "sha256": own.sha256} for name, own in weights.items()}
    return Result(str(output), figures={"dry_run": True, **cost, "models": models})
