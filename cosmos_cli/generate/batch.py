"""Generate videos for requests: in batches, from a stream, or with two models to compare."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_cli import console, files, hashes, locks
from cosmos_cli.download import assets
from cosmos_cli.errors import UserError, usage_error
from cosmos_cli.generate import choice, jobs, precision, processes
from cosmos_cli.generate.jobs import Job, Result, Settings, Weights
from cosmos_cli.generate.requests import Request, read_lines

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


# What makes a video exact.
EXACT = ("speed=exact", "sampling_precision=bf16")


def compared(
    settings: Settings, compare: str, recipe: str, overrides: Sequence[str]
) -> list[Settings]:
    """Return the two settings of --compare: those of the base or of exact sampling, and their own.

    `recipe` and `overrides` are those that `settings` was loaded from.

    Raises:
        UserError: the base is missing, both are the same, or the output is a single file.
    """
    from cosmos_cli.recipe import loading

    own = settings
    if compare == "exact":
        exact = loading.load(recipe, [*overrides, *EXACT]).recipe
        if exact == own.r:
            what = "needs a faster mode to compare with the exact one"
            fix = "add `--set speed=fast` or `--set sampling_precision=fp8`"
            raise usage_error("--compare exact", what, fix)
        side = "fast" if own.r.speed == "fast" else own.r.sampling_precision
        both = [replace(own, r=exact, side="exact"), replace(own, side=side)]
    else:
        base = choice.base_of(own.r, own.weights)
        if base.identity == own.weights.identity:
            fix = "run `cosmos promote RECIPE` first, or add `--model FOLDER`"
            raise usage_error("--compare", "needs a second model to compare with the base", fix)
        both = [replace(own, weights=base, side="base"), replace(own, side="post-trained")]
    if own.output.suffix.lower() == ".mp4":
        what = f"writes three videos per prompt, but --output is the file {own.output}"
        raise usage_error("--compare", what, "use `--output FOLDER`")
    return both


def require_other_networks(r: Recipe) -> None:
    """Check that the networks around the denoiser exist, without loading them, and that fp8 works.

    Raises:
        UserError: one is missing, or a GPU cannot compute in fp8.
    """
    precision.fp8_parts(r)
    if r.upsampler != "off":
        assets.require_upsampler(Path(r.upsampler))
    if not r.spec.embedded:
        assets.require_networks(r, r.model_files.text_encoder / "config.json")
    _require_guards_and_tokenizer(r)


def _require_guards_and_tokenizer(r: Recipe) -> None:
    """Check the files of the later phases first, because loading the text encoder takes minutes.

    Raises:
        UserError: a guard or the tokenizer is missing.
    """
    if r.spec.embedded:
        return
    if r.guardrails == "on":
        from cosmos_cli.generate.guards import guardrail

        guardrail.require_guards(r)
    assets.require_networks(r, r.model_files.tokenizer)


def plan_request(request: Request, settings: Settings) -> Result:
    """Return the job of a request, made if its video exists already, or its error."""
    try:
        job = jobs.resolve(request, settings)
        with files.disk_errors(job.path):
            made = not settings.overwrite and jobs.is_made(job)
    except UserError as error:
        return Result(request.prompt, error=error)
    if made:
        console.say(f"kept, not generated again: {job.path} (`--overwrite` replaces it)")
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
    """Yield videos that exist and refused requests first, then new videos, then comparisons.

    Raises:
        UserError: the output is a file that another command is writing.
    """
    output = settings[0].output.absolute()
    planned = list(plan_all(settings, requests))
    if output.suffix.lower() != ".mp4" or not any(one.job and not one.made for one in planned):
        yield from _batch(settings, requests, planned, processes)
        return
    with locks.writing(output, f".{output.stem}.lock", "cosmos generate"):
        # Another command may have written the file before the lock was free.
        planned = list(plan_all(settings, requests))
        yield from _batch(settings, requests, planned, processes)


def _batch(
    settings: Sequence[Settings],
    requests: Sequence[Request],
    planned: list[Result],
    processes: int | None,
) -> Iterator[Result]:
    todo: list[Job] = []
    made: set[Job] = set()
    # A comparison needs both sides, so a request that one side refuses is not generated.
    refused = {i % len(requests) for i, result in enumerate(planned) if result.error}
    sides = {
        result.job: own.side
        for result, (own, _) in zip(planned, product(settings, requests), strict=True)
        if result.job
    }
    for i, result in enumerate(planned):
        if result.job and not result.made:
            if i % len(requests) not in refused:
                todo.append(result.job)
            continue
        if result.job:
            _say_side(sides[result.job], result.job)
            made.add(result.job)
        yield result
    if todo:
        _require_guards_and_tokenizer(todo[0].r)
        for folder in dict.fromkeys(job.path.parent for job in todo):
            files.require_writable(folder)
            files.remove_own_stale(folder)
        for result in _generate(list(dict.fromkeys(todo)), processes):
            if result.job and result.made:
                console.say(f"saved {result.job.path}")
                _say_drift(result.job)
                _say_side(sides[result.job], result.job)
                made.add(result.job)
            yield result
    if len(settings) > 1:
        wanted = [result.job for result in planned]
        pairs = zip(wanted[: len(requests)], wanted[len(requests) :], strict=True)
        finished = [(one, two) for one, two in pairs if one in made and two in made]
        yield from _comparisons(settings, list(dict.fromkeys(finished)))


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


def _say_side(side: str, job: Job) -> None:
    """Say with --compare which of the two settings made a video."""
    if side:
        console.say(f"{side}: {job.path}")


def _generate(todo: list[Job], wanted: int | None) -> Iterator[Result]:
    """Yield the result of each job, from this process or from several."""
    count = processes.processes_for(todo, wanted)
    if count > 1:
        yield from processes.run(todo, count)
        return
    from cosmos_cli.generate.phases import generate
    from cosmos_cli.gpus import best_device

    yield from generate(todo, best_device())


def _comparisons(settings: Sequence[Settings], pairs: list[tuple[Job, Job]]) -> Iterator[Result]:
    """Yield a side-by-side video for each pair of jobs that both settings have rendered."""
    from cosmos_cli.generate.comparison import in_words, write_comparison

    first, second = settings
    folder = second.output / "compare"
    files.remove_own_stale(folder.absolute())
    for one, two in pairs:
        parts = [one.weights.identity, two.weights.identity]
        parts += [one.key] if one.weights == two.weights else []
        both = Weights(two.weights.path, hashes.sha256_text(*parts))
        joined = replace(second, r=two.r, weights=both, output=folder, given=two.given)
        result = plan_request(Request(two.prompt), joined)
        if result.job and not result.made:
            write_comparison({first.side: one, second.side: two}, result.job)
            result = replace(result, made=True)
        if result.job and (found := files.read_json(result.job.files[0]).get("difference")):
            console.say(f"{second.side} against exact: {in_words(found)}")
        yield result


def stdin_requests() -> Iterator[Request]:
    """Return the requests of standard input, one per line, as they arrive."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        # surrogateescape: a line that is not UTF-8 is refused and does not end the stream.
        start = sys.stdin.buffer.peek(2)[:2]
        sys.stdin.reconfigure(encoding=files.encoding_of(start), errors="surrogateescape")
    return read_lines(sys.stdin)


def stream(settings: Settings) -> Iterator[Result]:
    """Generate a video for each line of stdin; keep all networks in memory if they fit."""
    _require_guards_and_tokenizer(settings.r)
    files.require_writable(settings.output.absolute())
    files.remove_own_stale(settings.output.absolute())
    from cosmos_cli.generate.phases import one_by_one
    from cosmos_cli.gpus import best_device

    make = one_by_one(settings.r, settings.weights, best_device())
    # Reading waits for the first line, so the networks are loaded before.
    for request in stdin_requests():
        result = plan_request(request, settings)
        yield make(result.job) if result.job and not result.made else result
