"""`cosmos evaluate`: measure models before and after post-training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, files, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import ExitCode, usage_error

if TYPE_CHECKING:
    from cosmos_cli.generate.jobs import Weights
    from cosmos_cli.recipe.keys import Recipe

EMBEDDED_PROMPTS = 24

# The endings of files that a report may be expected in, and that this one is not.
OTHER_PAGES = (".pdf", ".png", ".json", ".md", ".csv", ".mp4")


def evaluate(
    recipe: options.RecipeArgument = "tiny",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="base, promoted, the name of a model in checkpoints_dir, or a folder or file of "
            "weights; may be repeated. Default: base, and promoted if there is one."
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Videos per model. The tiny model gets prompts of its synthetic world "
            f"(default {EMBEDDED_PROMPTS}), other models the dataset's captions (default 0).",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML page.")] = Path(
        "outputs/evaluation.html"
    ),
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="better, or the name of a score such as concept or edm_error: exit with code 6 "
            "unless each model is better than the first. better needs one score that is better "
            "and none that is worse. May be repeated."
        ),
    ] = None,
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    dry_run: options.DryRunOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Measure models by the content of their videos and their error on held-out clips.

    Example: cosmos evaluate tiny --prompts 200
    """
    from cosmos_cli.generate import promoted
    from cosmos_cli.generate.choice import choose_model, find_weights

    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    there = not model and promoted.found(r.checkpoints_dir, r.spec)
    names = model or (["base", "promoted"] if there or require else ["base"])
    # Models in different checkpoints_dirs may have folders of the same name.
    short = len({Path(name).name for name in names}) == len(names)
    weights = {
        Path(name).name if short else name.strip("/").replace("/", "_"): find_weights(
            r, choose_model(recipe, name, set_ or []).weights
        )
        for name in names
    }
    if require and len(weights) < 2:
        what = "there is no second model to compare"
        raise usage_error("--require", what, "use `--model base --model promoted`")
    output = _page(files.expand(output))
    count = prompts if prompts is not None else EMBEDDED_PROMPTS if r.spec.embedded else 0
    held_out = _check_dataset(r)
    required = _check_required(require, r, count, held_out) if require else []
    if dry_run:
        console.emit(_preview(r, weights, count, output), as_json=json_)
        return
    files.require_writable(output.parent)

    from cosmos_cli.evaluate import comparison
    from cosmos_cli.evaluate import evaluation as measure
    from cosmos_cli.gpus import best_device

    figures, samples = measure.evaluate(r, weights, count, best_device())
    measure.keep_larger(output, figures)
    written = measure.write_page(output, r, figures, samples)
    tables = [console.table(measure.figure_rows(figures), ("", "chance", *weights))]
    tables += [console.table(*rows) for _, rows in comparison.tables(figures["comparisons"])]
    result = Result("\n\n".join(tables), written, figures, f"xdg-open {shlex.quote(str(output))}")
    if lines := comparison.unmet(required, figures["comparisons"]):
        result.code, result.error = ExitCode.TRAINING, "\n".join(lines)
    console.emit(result, as_json=json_)
    raise typer.Exit(result.code)


def _check_required(require: list[str], r: Recipe, count: int, held_out: bool) -> list[str]:
    """Return the names of the required scores.

    Raises:
        UserError: the evaluation has no such score.
    """
    from cosmos_cli.evaluate import comparison, evaluation

    return comparison.check_names(require, evaluation.directions(r, count, held_out))


def _check_dataset(r: Recipe) -> bool:
    """Check the dataset that models are measured on; the tiny model can do without.

    Return True if the dataset has held-out clips.

    Raises:
        UserError: prep has not run, or its manifest is damaged.
    """
    from cosmos_cli.prep import holdout

    dataset = paths.Dataset.at(r.dataset_dir, r.videos_dir)
    if dataset.manifest.exists() or not r.spec.embedded:
        return bool(holdout.split_clips(dataset.read_manifest())[1])
    return False


def _page(output: Path) -> Path:
    """Return the path of the page that --output names: a file, or evaluation.html in a folder.

    Raises:
        UserError: the file has the ending of another format.
    """
    if output.is_dir():
        return (output / "evaluation.html").absolute()
    if output.suffix.lower() in OTHER_PAGES:
        raise usage_error(
            f"--output {output}", f"{output.suffix} files are not written",
            f"name an .html file: `--output {shlex.quote(str(output.with_suffix('.html')))}`",
        )  # fmt: skip
    return output.absolute()


def _preview(r: Recipe, weights: dict[str, Weights], count: int, output: Path) -> Result:
    """Return what would be measured.

    Raises:
        UserError: a network is missing.
    """
    if count:
        from cosmos_cli.generate import batch

        batch.require_networks(r)
    for name, own in weights.items():
        console.say(f"would measure {name} with {count} videos: {own.path}")
    models = {name: {"path": str(own.path), "sha256": own.sha256} for name, own in weights.items()}
    return Result(str(output), figures={"dry_run": True, "prompts": count, "models": models})
