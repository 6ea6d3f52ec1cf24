"""Videos over several processes: start them, pass on what they report, stop them. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from cosmos_cli import console, jobs, launch, layout, mailbox
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.jobs import Job
from cosmos_cli.keys import Recipe

# What torchrun gives its ranks to end in order.
STOP_SECONDS = 40


def processes_for(todo: list[Job], wanted: int | None) -> int:
    """How many processes make the jobs, at most one per GPU or as many as wanted.

    One a video; or two, one for each side of guidance; or more, which share the tokens of a side.
    """
    most = wanted or max(len(launch.gpu_names()), 1)
    for team in (8, 4, 2):
        if most >= team * len(todo) and all(_divides(job.r, team) for job in todo):
            return team * len(todo)
    return min(most, len(todo))


def _divides(r: Recipe, team: int) -> bool:
    """Whether so many processes can make one video."""
    tokens = r.spec.tokens(r.num_frames, r.height, r.width)
    return r.guidance > 0 and not tokens % (team // 2) and not r.spec.dit.heads % (team // 2)


def run(todo: list[Job], processes: int) -> Iterator[tuple[Job, UserError | None]]:
    """Makes the jobs; yields each one when its files are there, or why not.

    Raises:
        UserError: what ended a process.
    """
    listed = todo[0].path.parent / f".{os.getpid()}.jobs.tmp.json"
    command = [
        sys.executable, "-m", "cosmos_cli.model.elastic", "--nproc-per-node", str(processes),
        "-m", "cosmos_cli.model.spread", str(listed),
    ]  # fmt: skip
    with mailbox.Mailbox() as box:
        process = None
        try:
            layout.write_json(listed, [jobs.to_json(job) for job in todo])
            process = subprocess.Popen(
                command,
                env={**launch.environment(processes), mailbox.ADDRESS: box.address},
                stdout=subprocess.PIPE,
                text=True,
                # Ctrl-C reaches us alone, and is passed on in order.
                start_new_session=True,
            )
            assert process.stdout
            yield from _outcomes(process.stdout, todo)
            process.wait()
        finally:
            if process:
                _stop(process)
            listed.unlink(missing_ok=True)
        verdict = next((message for message in box.read() if "first" in message), None)
    if process.returncode:
        where = f"process {verdict['first']}" if verdict else "torchrun"
        code = verdict["process_code"] if verdict else process.returncode
        raise UserError(
            f"ended with code {code}; what it said stands above", code=ExitCode.BUG, where=where,
            fix="the same command goes on where it stopped",
        )  # fmt: skip


def _outcomes(lines: Iterator[str], todo: list[Job]) -> Iterator[tuple[Job, UserError | None]]:
    for line in lines:
        if not line.startswith('{"job":'):
            console.say(line.rstrip())
            continue
        report = json.loads(line)
        error = None
        if "error" in report:
            error = UserError(report["error"], code=ExitCode(report["code"]))
        if report["job"] is None:
            assert error
            raise error
        yield todo[report["job"]], error


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends what still runs: in order, or after a while not."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    launch.kill_group(process.pid)
