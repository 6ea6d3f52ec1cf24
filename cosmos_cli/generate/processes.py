"""Generate videos in several processes: start them, report their results, stop them. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from cosmos_cli import console, files, gpus, ranks
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import jobs
from cosmos_cli.generate.jobs import Job, Result

# Longer than the 30 s that torchrun allows its ranks to end after SIGTERM.
STOP_SECONDS = 40


def processes_for(todo: list[Job], wanted: int | None) -> int:
    """Return the number of processes for the jobs: at most one per GPU, or `wanted`.

    One process per video, if there are not enough for more. Two split the conditional and the
    unconditional pass of classifier-free guidance. With four or eight, the processes of each pass
    also split its tokens.
    """
    limit = wanted or max(len(gpus.gpu_names()), 1)
    for per_video in (8, 4, 2):
        if limit >= per_video * len(todo) and all(_can_split(job, per_video) for job in todo):
            return per_video * len(todo)
    return min(limit, len(todo))


def _can_split(job: Job, processes: int) -> bool:
    """True if `processes` processes can generate one video together.

    A rollout cannot be split: one process decodes the frames that its next segment continues.
    """
    r = job.r
    if job.segments > 1:
        return False
    tokens, per_pass = r.tokens, processes // 2
    return r.guidance > 0 and not tokens % per_pass and not r.spec.dit.heads % per_pass


def run(todo: list[Job], processes: int) -> Iterator[Result]:
    """Run the jobs; yield the result of each when its files are written or it has failed.

    Raises:
        UserError: a process ended with an error.
    """
    listed = files.temporary_next_to(todo[0].path.with_name("jobs.json"))
    # Memory for streamed weights, empty until a process fills it.
    memory = [os.memfd_create("cosmos-weights") for _ in {job.denoiser for job in todo}]
    command = [
        sys.executable, "-m", "cosmos_cli.ranks", "--nproc-per-node", str(processes),
        "-m", "cosmos_cli.generate.worker", str(listed),
        *(f"/proc/{os.getpid()}/fd/{file}" for file in memory),
    ]  # fmt: skip
    with ranks.RankErrors() as box:
        process = None
        try:
            files.write_json(listed, [jobs.to_json(job) for job in todo])
            process = subprocess.Popen(
                command,
                env={**ranks.environment(processes), ranks.ADDRESS: box.address},
                stdout=subprocess.PIPE,
                text=True,
                # Ctrl-C must reach only this process, which then stops the others cleanly.
                start_new_session=True,
            )
            assert process.stdout
            yield from _results(process.stdout, todo)
            process.wait()
        finally:
            if process:
                _stop(process)
            listed.unlink(missing_ok=True)
            for file in memory:
                os.close(file)
        failed = next((message for message in box.read() if "first" in message), None)
    if process.returncode:
        where = f"process {failed['first']}" if failed else "torchrun"
        code = failed["process_code"] if failed else process.returncode
        what, kind = f"ended with code {code}; its output is above", ExitCode.BUG
        # A full memory ends a process with SIGKILL, or with SIGBUS while it fills shared weights.
        if code in (-signal.SIGKILL, -signal.SIGBUS):
            what = ranks.KILLED
            kind = ExitCode.ENVIRONMENT
        fix = "run the same command again to make the remaining videos"
        raise UserError(what, code=kind, where=where, fix=fix)


def _results(lines: Iterator[str], todo: list[Job]) -> Iterator[Result]:
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
        job = todo[report["job"]]
        yield Result(job.prompt, job, error, made=not error)


def _stop(process: subprocess.Popen[str]) -> None:
    """Terminate the processes, and kill those that do not end within `STOP_SECONDS`."""
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    ranks.kill_group(process.pid)
