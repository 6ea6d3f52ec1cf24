"""The Slurm script with real ranks; a stand-in for srun starts them as on two nodes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.helpers.command import Cosmos
from tests.helpers.runs import find_run, options, wait_for_step

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sh"
STAND_INS = {
    "srun": """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=0 "$@" & ranks+=($!); done
for pid in "${ranks[@]}"; do wait "$pid"; code=$?; ((code > highest)) && highest=$code; done
exit "${highest:-0}"
""",
    "scontrol": '#!/usr/bin/env bash\necho "$@" >> scontrol.log\n',
}


@pytest.mark.workflow
@pytest.mark.slow
def test_slurm_requeues_only_a_job_that_its_signal_stopped(prepared):
    for name, text in STAND_INS.items():
        (prepared / name).write_text(text)
        (prepared / name).chmod(0o755)
    cosmos, job_id = Cosmos(prepared), str(os.getpid())
    environment = cosmos.environment() | {
        "PATH": f"{prepared}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": job_id, "SLURMD_NODENAME": "localhost", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
    }  # fmt: skip

    def start_job(*pairs):
        same = ("num_processes=auto", "micro_batch_size=1", "save_every_steps=500")
        return subprocess.Popen(
            ["bash", SCRIPT, "tiny", *options("job", *same, *pairs)], cwd=prepared,
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    job = start_job("max_steps=500", "tracker=tensorboard")
    wait_for_step(cosmos, "job", job)
    (srun,) = psutil.Process(job.pid).children()
    # Slurm signals the tracker, too.
    for process in srun.children(recursive=True):
        process.send_signal(signal.SIGTERM)
    _, err = job.communicate(timeout=120)
    assert job.returncode == 143, err
    assert "does not show all of the run" not in err
    run = find_run(cosmos, "job")
    (step,) = run.resumable_steps()

    job = start_job(f"max_steps={step + 1}")
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert f"resumed at step {step}" in err
    assert out.startswith(f"{run.root}\n")

    job = start_job("global_batch_size=3")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2, err
    assert (prepared / "scontrol.log").read_text() == f"requeue {job_id}\n"
