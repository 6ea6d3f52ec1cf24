"""`cosmos evaluate`: measure models before and after post-training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from cosmos_cli import console, files
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.generate import promoted
from cosmos_cli.generate.choice import choose_model, find_weights

EMBEDDED_PROMPTS = 24


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
    set_: options.SetOption = None,
    print_recipe: options.PrintRecipeOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Measure models by the content of their videos and their error on held-out clips.

    Example: cosmos evaluate tiny --prompts 200
    """
    r = options.open_recipe(recipe, set_, print_recipe, json_, trains=False).recipe
    there = not model and promoted.found(r.checkpoints_dir, r.spec)
    names = model or (["base", "promoted"] if there else ["base"])
    # Models in different checkpoints_dirs may have folders of the same name.
    short = len({Path(name).name for name in names}) == len(names)
    weights = {
        Path(name).name if short else name.strip("/").replace("/", "_"): find_weights(
            r, choose_model(recipe, name, set_ or []).weights
        )
        for name in names
    }
    output = (output / "evaluation.html" if output.is_dir() else output).absolute()
    count = prompts if prompts is not None else EMBEDDED_PROMPTS if r.spec.embedded else 0
    files.require_writable(output.parent)

    from cosmos_cli.evaluate import evaluation as measure
    from cosmos_cli.gpus import best_device

    figures, samples = measure.evaluate(r, weights, count, best_device())
    measure.keep_larger(output, figures)
    written = measure.write_page(output, r, figures, samples)
    console.emit(
        Result(
            console.table(measure.figure_rows(figures), ("", "chance", *weights)),
            written,
            figures,
            f"xdg-open {shlex.quote(str(output))}",
        ),
        as_json=json_,
    )
