"""Generate videos for requests: in batches, from a stream, or with two models to compare."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_cli import console, files
from cosmos_cli.download import assets
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import choice, jobs, processes
from cosmos_cli.generate.jobs import Job, Request, Result, Settings, Weights

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


def base_settings(settings: Settings) -> Settings:
    """Return the same settings with the base model's weights, for --compare.

    Raises:
        UserError: the base is missing, there is no second model, or the output is a single file.
    """
    base = choice.base_of(settings.r, settings.weights)
    if base.identity == settings.weights.identity:
        raise UserError(
            "needs a second model to compare with the base", code=ExitCode.USAGE, where="--compare",
            fix="run `cosmos promote RECIPE` first, or add `--model FOLDER`",
        )  # fmt: skip
    if settings.output.suffix.lower() == ".mp4":
        raise UserError(
            f"writes three videos per prompt, but --output is the file {settings.output}",
            code=ExitCode.USAGE, where="--compare", fix="use `--output FOLDER`",
        )  # fmt: skip
    return replace(settings, weights=base)


def require_networks(r: Recipe) -> None:
    """Check that the networks around the denoiser exist, without loading them.

    Raises:
        UserError: one is missing.
    """
    if r.upsampler != "off":
        assets.require_networks(r, Path(r.upsampler))
    if not r.spec.embedded:
        networks = r.model_files
        assets.require_networks(r, networks.text_encoder / "config.json", networks.tokenizer)
        if r.guardrails == "on":
            from cosmos_cli.generate.guards import guardrail

            guardrail.block_list(r)


def plan_request(request: Request, settings: Settings) -> Result:
    """Return the job of a request, made if its video exists already, or its error."""
    try:
        job = jobs.resolve(request, settings)
        with files.disk_errors(job.path):
            made = not settings.overwrite and jobs.is_made(job)
    except UserError as error:
        return Result(request.prompt, error=error)
    if made:
        console.say(f"generated before, not again: {job.path}")
    return Result(job.prompt, job, made=made)


def plan_all(settings: Sequence[Settings], requests: Sequence[Request]) -> Iterator[Result]:
    """Yield the result of `plan_request` of each request; two videos cannot share a file."""
    taken: dict[Path, Job] = {}
    for own, request in product(settings, requests):
        result = plan_request(request, own)
        if result.job and taken.setdefault(result.job.path, result.job) != result.job:
            error = request.error(
                f"another video of this command has the output {result.job.path.name}",
                "give each line its own output, and none with --compare",
            )
            result = Result(request.prompt, error=error)
        yield result


def batch(
    settings: Sequence[Settings], requests: Sequence[Request], processes: int | None
) -> Iterator[Result]:
    """Yield videos that exist and refused requests first, then new videos, then comparisons."""
    todo: list[Job] = []
    made: list[Job] = []
    for result in plan_all(settings, requests):
        if result.job and not result.made:
            todo.append(result.job)
            continue
        if result.job:
            _name_model(settings, result.job)
            made.append(result.job)
        yield result
    if todo:
        for folder in dict.fromkeys(job.path.parent for job in todo):
            files.require_writable(folder)
            files.remove_own_stale(folder)
        for result in _generate(list(dict.fromkeys(todo)), processes):
            if result.job and result.made:
                console.say(f"saved {result.job.path}")
                _say_drift(result.job)
                _name_model(settings, result.job)
                made.append(result.job)
            yield result
    if len(settings) > 1:
        base, tuned = settings
        yield from _comparisons(base, tuned, made)


def _say_drift(job: Job) -> None:
    """Say how the picture changes over the segments of a rollout."""
    if job.segments == 1:
        return
    rows = files.read_json(job.files[0])["segments"]
    names = ("sharpness", "brightness", "saturation")
    table, frames = [], 0
    for number, row in enumerate(rows, start=1):
        begin, frames = frames, frames + row["frames"]
        changes = (row[name] / max(rows[0][name], 1e-9) - 1 for name in names)
        cells = (f"{row[name]:.3f} ({c:+.0%})" for name, c in zip(names, changes, strict=True))
        seconds = f"{begin / job.r.fps:.1f} to {frames / job.r.fps:.1f} s"
        table.append((str(number), seconds, *cells))
    console.say(console.table(table, ("segment", "time", *names)))


def _name_model(settings: Sequence[Settings], job: Job) -> None:
    """Say with --compare which of the two models made a video."""
    if len(settings) > 1:
        whose = "base" if job.weights == settings[0].weights else "post-trained"
        console.say(f"{whose} model: {job.path}")


def _generate(todo: list[Job], wanted: int | None) -> Iterator[Result]:
    """Yield the result of each job, from this process or from several."""
    count = processes.processes_for(todo, wanted)
    if count > 1:
        yield from processes.run(todo, count)
        return
    from cosmos_cli.generate.phases import generate
    from cosmos_cli.gpus import best_device

    yield from generate(todo, best_device())


def _comparisons(base: Settings, tuned: Settings, made: list[Job]) -> Iterator[Result]:
    """Yield a side-by-side video for each job that both models have rendered."""
    from cosmos_cli.generate.comparison import compare

    both = files.sha256_text(base.weights.identity, tuned.weights.identity)
    joined = replace(
        tuned, weights=Weights(tuned.weights.path, both), output=tuned.output / "compare"
    )
    files.remove_own_stale(joined.output.absolute())
    of_tuned = {(job.prompt, job.r, job.given): job for job in made if job.weights == tuned.weights}
    for job in made:
        other = of_tuned.get((job.prompt, job.r, job.given))
        if job.weights != base.weights or other is None:
            continue
        own = replace(joined, r=job.r, given=job.given)
        result = plan_request(Request(job.prompt), own)
        if result.job and not result.made:
            compare(job, other, result.job)
            result = replace(result, made=True)
        yield result


def stream(settings: Settings) -> Iterator[Result]:
    """Generate a video for each line of stdin; keep all networks in memory if they fit."""
    files.require_writable(settings.output.absolute())
    files.remove_own_stale(settings.output.absolute())
    from cosmos_cli.generate.phases import one_by_one
    from cosmos_cli.gpus import best_device

    make = one_by_one(settings.r, settings.weights, best_device())
    if isinstance(sys.stdin, io.TextIOWrapper):
        # surrogateescape: a line that is not UTF-8 is refused and does not end the stream.
        start = sys.stdin.buffer.peek(2)[:2]
        sys.stdin.reconfigure(encoding=files.encoding_of(start), errors="surrogateescape")
    for request in jobs.read_lines(sys.stdin):
        result = plan_request(request, settings)
        yield make(result.job) if result.job and not result.made else result
