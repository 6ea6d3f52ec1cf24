"""Generate videos for requests: in batches, from a stream, or with two models to compare."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import choice, jobs, processes
from cosmos_cli.generate.jobs import Job, Request, Result, Settings, Weights


def base_settings(settings: Settings) -> Settings:
    """Return the same settings with the base model's weights, for --compare.

    Raises:
        UserError: the base is missing, there is no second model, or the output is a single file.
    """
    base = choice.base_of(settings.r, settings.weights)
    if base.identity == settings.weights.identity:
        raise UserError(
            "needs a second model to compare with the base", code=ExitCode.USAGE, where="--compare",
            fix="run `cosmos promote` first, or add `--model FOLDER`",
        )  # fmt: skip
    if settings.output.suffix.lower() == ".mp4":
        raise UserError(
            f"writes three videos per prompt, but --output is the file {settings.output}",
            code=ExitCode.USAGE, where="--compare", fix="use `--output FOLDER`",
        )  # fmt: skip
    return replace(settings, weights=base)


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


def batch(
    settings: Sequence[Settings], requests: Sequence[Request], processes: int | None
) -> Iterator[Result]:
    """Yield videos that exist and refused requests first, then new videos, then comparisons."""
    todo: list[Job] = []
    made: list[Job] = []
    for own, request in product(settings, requests):
        result = plan_request(request, own)
        if result.job and not result.made:
            todo.append(result.job)
            continue
        if result.job:
            made.append(result.job)
        yield result
    if todo:
        files.require_writable(todo[0].path.parent)
        files.remove_own_stale(todo[0].path.parent)
        for result in _generate(list(dict.fromkeys(todo)), processes):
            if result.job and result.made:
                console.say(f"saved {result.job.path}")
                made.append(result.job)
            yield result
    if len(settings) > 1:
        base, tuned = settings
        yield from _comparisons(base, tuned, made)


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
    of_tuned = {(job.prompt, job.r): job for job in made if job.weights == tuned.weights}
    for job in made:
        other = of_tuned.get((job.prompt, job.r))
        if job.weights != base.weights or other is None:
            continue
        result = plan_request(Request(job.prompt), replace(joined, r=job.r))
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
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    for request in jobs.read_lines(sys.stdin):
        result = plan_request(request, settings)
        yield make(result.job) if result.job and not result.made else result
