"""Generate videos for requests: in batches, from a stream, or with two models to compare."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import jobs, processes
from cosmos_cli.generate.jobs import Job, Order, Outcome, Weights, Wish


def base_order(order: Order, base: Weights) -> Order:
    """Return the same settings with the base model's weights, for --compare.

    Raises:
        UserError: there is no second model, or the output is a single file.
    """
    if base.identity == order.weights.identity:
        raise UserError(
            "needs a second model to compare with the base", code=ExitCode.USAGE, where="--compare",
            fix="run `cosmos promote` first, or add `--model FOLDER`",
        )  # fmt: skip
    if order.output.suffix.lower() == ".mp4":
        raise UserError(
            f"writes three videos per prompt, but --output is the file {order.output}",
            code=ExitCode.USAGE, where="--compare", fix="use `--output FOLDER`",
        )  # fmt: skip
    return replace(order, weights=base)


def batch(
    orders: list[Order], wishes: Sequence[Wish | UserError], processes: int | None
) -> Iterator[Outcome]:
    """Yield finished and refused requests first, then each new video, then comparisons."""
    todo, done = [], []
    for order, wish in product(orders, wishes):
        outcome = order.place(wish)
        if outcome.job and not outcome.done:
            todo.append(outcome.job)
        else:
            done.append(outcome)
            yield outcome
    if todo:
        files.require_writable(todo[0].path.parent)
        for job, error in _generate(list(dict.fromkeys(todo)), processes):
            if not error:
                console.say(f"saved {job.path}")
            done.append(Outcome(job.prompt, job, error, done=not error))
            yield done[-1]
    if len(orders) > 1:
        yield from _comparisons(orders, [o.job for o in done if o.job and o.done])


def _generate(todo: list[Job], wanted: int | None) -> Iterator[tuple[Job, UserError | None]]:
    """Yield each job when its video is done or has failed, in this process or in several."""
    count = processes.processes_for(todo, wanted)
    if count > 1:
        yield from processes.run(todo, count)
        return
    from cosmos_cli.generate.phases import generate
    from cosmos_cli.gpus import best_device

    yield from generate(todo, best_device())


def _comparisons(orders: list[Order], made: list[Job]) -> Iterator[Outcome]:
    """Yield a side-by-side video for each job that both models have rendered."""
    from cosmos_cli.generate.comparison import compare

    base, tuned = orders
    both = files.sha256_text(base.weights.identity, tuned.weights.identity)
    of_tuned = {(job.prompt, job.r): job for job in made if job.weights == tuned.weights}
    for job in made:
        other = of_tuned.get((job.prompt, job.r))
        if job.weights != base.weights or other is None:
            continue
        joined = replace(
            tuned,
            r=job.r,
            weights=Weights(tuned.weights.path, both),
            output=tuned.output / "compare",
        )
        outcome = joined.place(Wish(job.prompt))
        if outcome.job and not outcome.done:
            compare(job, other, outcome.job)
            outcome = replace(outcome, done=True)
        yield outcome


def stream(order: Order) -> Iterator[Outcome]:
    """Generate a video for each line of stdin; keep all networks in memory if they fit."""
    files.require_writable(order.output.absolute())
    from cosmos_cli.generate.phases import one_by_one
    from cosmos_cli.gpus import best_device

    make = one_by_one(order.r, order.weights, best_device())
    if isinstance(sys.stdin, io.TextIOWrapper):
        # surrogateescape: a line that is not UTF-8 is refused and does not end the stream.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    for wish in jobs.read_lines(sys.stdin):
        outcome = order.place(wish)
        if outcome.job and not outcome.done:
            error = make(outcome.job)
            outcome = replace(outcome, error=error, done=not error)
        yield outcome
