"""`cosmos recipes`: find, read, check and write recipes."""

from __future__ import annotations

import json
import re
import shlex
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cosmos_cli import console, files, paths
from cosmos_cli.commands import options
from cosmos_cli.console import Result
from cosmos_cli.errors import UserError, dataset_error, usage_error

if TYPE_CHECKING:
    from cosmos_cli.model.video import VideoInfo
    from cosmos_cli.recipe.training_plan import Machine

app = typer.Typer(no_args_is_help=True, help="Find, read, check and write recipes.")

NameArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="A shipped recipe; `cosmos recipes list` shows them.",
        autocompletion=options.shipped_names,
    ),
]


@app.command("list")
def list_(json_: options.JsonOption = False) -> None:
    """List the shipped recipes.

    Example: cosmos recipes list
    """
    from cosmos_cli.recipe import loading

    rows: list[tuple[str, ...]] = [
        (name, loading.load(path).recipe.model, _title(path))
        for name, path in loading.shipped().items()
    ]
    figures = {"recipes": [dict(zip(("name", "model", "title"), row, strict=True)) for row in rows]}
    text = console.table(rows, ("recipe", "model", "what it is"))
    console.emit(Result(text, figures=figures), as_json=json_)


def _title(path: Path) -> str:
    return files.read_text(path, files.RECIPE).partition("\n")[0].removeprefix("# ")


@app.command()
def show(name: NameArgument, json_: options.JsonOption = False) -> None:
    """Print a recipe file, with its comments.

    Example: cosmos recipes show nemo_assets
    """
    from cosmos_cli.recipe import loading

    loaded = loading.load(name)
    text = files.read_text(loaded.path, files.RECIPE)
    figures = {"path": str(loaded.path.absolute()), "recipe": loaded.recipe.model_dump()}
    console.emit(Result(text.rstrip("\n"), figures=figures), as_json=json_)


@app.command()
def copy(
    name: NameArgument,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="File or folder. Default: NAME.yaml.")
    ] = None,
    yes: options.YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Copy a shipped recipe to a file that you can edit.

    Example: cosmos recipes copy my_videos robot.yaml
    """
    from cosmos_cli.recipe import loading

    source = loading.find_recipe(name)
    target = files.expand(destination or "")
    with files.disk_errors(target):
        target = target / source.name if target.is_dir() else target
    _check_free(target, yes)
    files.write_text(target, files.read_text(source, files.RECIPE))
    console.say(f"edit {target}, its lines with CHANGE first")
    following = f"cosmos recipes check {shlex.quote(str(target))}"
    console.emit(Result(str(target.absolute()), [target.absolute()], next=following), as_json=json_)


def _check_free(target: Path, yes: bool) -> None:
    with files.disk_errors(target):
        taken = target.exists()
    if taken and not yes:
        fix = "choose another name, or replace it with `--yes`"
        raise usage_error(target, "exists already", fix)


@app.command()
def check(
    name: options.RecipeArgument, set_: options.SetOption = None, json_: options.JsonOption = False
) -> None:
    """Check a recipe: print all errors at once, or warnings and ok.

    Example: cosmos recipes check my_videos.yaml --set max_steps=400
    """
    from cosmos_cli.recipe import loading

    loaded = loading.load(name, set_ or ())
    # `cosmos recipes new` wrote the reason next to each value.
    warnings = loaded.unexpected if loading.is_written_by_us(loaded.path) else loaded.warnings
    for warning in warnings:
        console.warn(warning)
    figures = {"path": str(loaded.path.absolute()), "warnings": list(warnings)}
    console.emit(Result("ok", figures=figures), as_json=json_)


@app.command()
def keys(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Keys to explain. Default: all.",
            autocompletion=options.key_names,
        ),
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Explain the keys of a recipe.

    Example: cosmos recipes keys offload lora_rank
    """
    from cosmos_cli.recipe import loading

    rows = loading.key_reference(names or ())
    lines = []
    for group, members in groupby(rows, key=lambda row: row.group):
        lines += [f"{group}:", ""]
        for row in members:
            default = row.default if row.default == "required" else f"default {row.default}"
            lines += [f"  {row.name} ({default})", f"      {row.description}"]
            lines += [f"      Takes {row.takes}.", ""]
    figures = {"keys": [row._asdict() for row in rows]}
    text = console.fold("\n".join(lines).rstrip(), sys.stdout)
    console.emit(Result(text, figures=figures), as_json=json_)


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the schema to this file instead.")
    ] = None,
    yes: options.YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors and other programs.

    Example: cosmos recipes schema --output recipe.schema.json
    """
    from cosmos_cli.recipe import loading

    content = loading.json_schema()
    text = json.dumps(content, indent=2)
    if output is None:
        console.emit(Result(text, figures={"schema": content}), as_json=json_)
        return
    output = files.expand(output)
    _check_free(output, yes)
    files.write_text(output, text + "\n")
    console.emit(Result(str(output.absolute()), [output.absolute()]), as_json=json_)


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Writes NAME.yaml.")],
    videos: Annotated[Path, typer.Option("--videos", help="The folder with the videos.")],
    gpus: options.GpusOption = None,
    yes: options.YesOption = False,
    json_: options.JsonOption = False,
) -> None:
    """Write a recipe for a folder of videos, with the reason for every choice.

    Example: cosmos recipes new robot --videos ~/robot_videos
    """
    from cosmos_cli import new_recipe
    from cosmos_cli.recipe import keys, loading

    name, videos = name.removesuffix(".yaml"), files.expand(videos)
    target = Path(f"{name}.yaml")
    if not re.fullmatch(keys.NAME, name):
        raise usage_error(f"NAME {name}", f"must be {keys.PATTERNS[keys.NAME]}")
    dataset = new_recipe.dataset_of(name, videos)
    _check_free(target, yes)
    machine = _machine(gpus)
    usable, bad = _probe(dataset)
    captioned = _captioned(dataset, list(usable))
    found = list(usable.values())
    choices, needs = new_recipe.propose(name, videos, found, captioned, machine)
    header = [
        f"Written by `cosmos recipes new {name}` from {len(usable)} videos of "
        f"{console.duration(sum(info.seconds for info in usable.values()))} in all.",
        *(f"Left out: {line}" for line in bad),
        *needs,
        "",
        f"Run: cosmos setup {target}, then download, prep, train, promote and generate.",
    ]
    files.write_text(target, new_recipe.to_yaml(choices, header))
    loaded = loading.load(target)
    for line in needs:
        console.say(line)
    for warning in (*bad, *loaded.unexpected):
        console.warn(warning)
    written = [row._asdict() for row in choices]
    figures = {"videos": len(usable), "left_out": bad, "needs": needs, "choices": written}
    following = f"cosmos setup {shlex.quote(str(target))}"
    result = Result(str(target.absolute()), [target.absolute()], figures, following)
    console.emit(result, as_json=json_)


def _machine(gpus: str | None) -> Machine:
    """Return the GPUs that --gpus names, or this machine's, or one H100 if there are none."""
    from cosmos_cli.gpus import gpu_names
    from cosmos_cli.recipe import gpu_models
    from cosmos_cli.recipe.training_plan import Machine
    from cosmos_cli.train.preflight import smallest_gpu

    if gpus is not None:
        return Machine(*gpu_models.parse_gpus(gpus), "--gpus says so")
    names, gpu = gpu_names(), smallest_gpu()
    if gpu:
        return Machine(len(names), gpu, f"this machine has {len(names)} x {names[0]}")
    why = f"{names[0]} is not a known GPU" if names else "no GPU was found on this machine"
    console.say(f"{why}: choosing for 1xH100-80GB; name other GPUs with `--gpus 1xRTX-4090`")
    return Machine(1, *gpu_models.parse_gpus("1xH100-80GB")[1:], f"{why}; planned for 1xH100-80GB")


def _probe(dataset: paths.Dataset) -> tuple[dict[Path, VideoInfo], list[str]]:
    """Return the properties of every usable video, and an error line for every other video."""
    try:
        listed = dataset.video_files()
    except UserError as error:
        error.fix = "name a folder of mp4 files: `--videos FOLDER`"
        raise
    from cosmos_cli.model import video
    from cosmos_cli.prep import lerobot
    from cosmos_cli.prep.sources import MOST_LINES

    usable, bad = {}, []
    with console.progress("probing", len(listed), "videos") as progress:
        for path in listed:
            try:
                usable[path] = video.probe(path)
            except video.VideoError as error:
                bad.append(f"{path.relative_to(dataset.videos).as_posix()!r}: {error}")
            progress.advance()
    if len(bad) > MOST_LINES:
        bad = [*bad[:MOST_LINES], f"and {len(bad) - MOST_LINES} more"]
    if not usable:
        found = f"none of {len(listed)} videos can be used" if listed else "no videos"
        robot = next(filter(lerobot.is_lerobot, (dataset.root, dataset.videos)), None)
        what = f"{found} ({'; '.join(bad[:3])})" if bad else found
        fix = (
            f"a LeRobot dataset needs a recipe by hand: set videos_dir to {robot}"
            if robot
            else "name a folder of mp4 files"
        )
        raise dataset_error(dataset.videos, what, fix)
    return usable, bad


def _captioned(dataset: paths.Dataset, videos: list[Path]) -> int:
    """Return the number of videos that have a caption."""
    from cosmos_cli.prep import captions

    named = {dataset.name_of(path): path for path in videos}
    texts = captions.files_in(dataset.metas, captions.SUFFIX)
    table = captions.table_in(dataset.videos, dataset.root)
    listed = captions.read(table, list(named))[0] if table else {}
    own = captions.owners(texts, list(named)).files
    return len({*own, *captions.sidecars(named).files, *listed})
