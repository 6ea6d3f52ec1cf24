"""A closed SSH window ends every long verb as SIGTERM does, unless nohup had it ignored."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time

import psutil
import pytest

from cosmos_cli.files import read_json
from cosmos_cli.model import mp4, video
from tests.helpers.command import Cosmos, settings
from tests.helpers.runs import find_run, options
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow

ALONE = ("save_every_steps=500", "max_steps=500")
QUICK = settings("num_steps=2", "guardrails=off")


@pytest.fixture
def cosmos(prepared):
    return Cosmos(prepared)


class Window:
    """A terminal in which a command runs; closing it sends SIGHUP, and writing to it fails."""

    def __init__(self, cosmos, *arguments, hangup=signal.SIG_DFL, module="cosmos_cli"):
        self.pid, self.master = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGHUP, hangup)
            os.chdir(cosmos.cwd)
            words = [sys.executable, "-m", module, *map(str, arguments)]
            os.execve(sys.executable, words, cosmos.environment())
        self.text = b""

    def wait_for(self, condition, seconds=120):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text.decode()
            if select.select([self.master], [], [], 0.02)[0]:
                try:
                    self.text += os.read(self.master, 4096)
                except OSError:
                    pytest.fail(f"it ended too early: {self.text.decode()}")

    def close(self, seconds=120):
        """Closes the window; the exit code of the command, which must leave no process behind."""
        everyone = psutil.Process(self.pid).children(recursive=True)
        os.close(self.master)
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        _, alive = psutil.wait_procs(everyone, timeout=10)
        assert not alive, alive
        return os.waitstatus_to_exitcode(ended[1])


def steps(cosmos, name):
    paths = cosmos.cwd.glob(f"outputs/*/*/{name}/metrics.jsonl")
    return sum(path.read_text().count('"loss"') for path in paths)


# Two ranks are stopped in commands/test_train.py.
def test_a_closed_window_saves_the_step_and_the_same_command_resumes(cosmos):
    words = options("closed", *ALONE, "tracker=tensorboard")
    window = Window(cosmos, "train", "tiny", *words)
    window.wait_for(lambda: steps(cosmos, "closed") >= 2)
    assert window.close() == 143
    run = find_run(cosmos, "closed")
    (step,) = run.resumable_steps()
    result = read_json(run.result)
    assert (result["step"], result["exit_code"]) == (step, 143)
    assert not list(run.checkpoints.glob(".*"))
    assert cosmos.json("train", "tiny", *words, "--dry-run")["from"] == step


def test_a_closed_window_does_not_end_what_nohup_started(cosmos):
    pairs = ("num_processes=1", "save_every_steps=500", "max_steps=10")
    window = Window(cosmos, "train", "tiny", *options("nohup", *pairs), hangup=signal.SIG_IGN)
    window.wait_for(lambda: steps(cosmos, "nohup") >= 2)
    assert window.close() == 0
    assert find_run(cosmos, "nohup").resumable_steps() == [10]


def test_the_signals_of_one_closed_window_count_once(cosmos):
    process = cosmos.start("train", "tiny", *options("several", *ALONE))
    while steps(cosmos, "several") < 2 and process.poll() is None:
        time.sleep(0.05)
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert len(find_run(cosmos, "several").resumable_steps()) == 1


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "datasets" / "tiny" / "videos"
    folder.mkdir(parents=True)
    for i in range(15):
        mp4.write_mp4(folder / f"{i:02d}.mp4", moving_square(60, 64, 96), 12, 18)
    return Cosmos(tmp_path)


@pytest.mark.parametrize(("hangup", "code"), [(signal.SIG_DFL, 143), (signal.SIG_IGN, 0)])
def test_prep_ends_in_order_or_under_nohup_goes_on(videos, hangup, code):
    dataset = videos.cwd / "datasets" / "tiny"
    window = Window(videos, "prep", "tiny", *settings("prompt=A square."), hangup=hangup)
    window.wait_for(lambda: len(list(dataset.glob("latents/*.safetensors"))) >= 3)
    assert window.close() == code
    assert not list(dataset.rglob("*.tmp*"))
    assert (dataset / "manifest.json").exists() == (code == 0)


@pytest.mark.parametrize(
    ("processes", "hangup", "code"),
    [
        (1, signal.SIG_IGN, 0),
        (1, signal.SIG_DFL, 143),
        (2, signal.SIG_IGN, 0),
        # SIGTERM ends two processes in commands/test_generate.py.
        pytest.param(2, signal.SIG_DFL, 143, marks=pytest.mark.slow),
    ],
)
def test_generate_ends_in_order_or_under_nohup_goes_on(tmp_path, processes, hangup, code):
    cosmos = Cosmos(tmp_path)
    count = 12 if code == 0 else 200
    lines = [json.dumps({"prompt": "A ball.", "seed": seed}) for seed in range(count)]
    (cosmos.cwd / "batch.jsonl").write_text("\n".join(lines))
    words = ("--batch", "batch.jsonl", "--num-processes", processes, *QUICK)
    window = Window(cosmos, "generate", *words, hangup=hangup)

    def made():
        return list(cosmos.cwd.glob("outputs/[!.]*.mp4"))

    window.wait_for(lambda: len(made()) >= 2)
    assert window.close() == code
    assert code or len(made()) == count
    assert all(video.probe(path).frames == 9 for path in made())
    assert not list(cosmos.cwd.glob("outputs/.*"))


@pytest.mark.parametrize("hangup", [signal.SIG_DFL, signal.SIG_IGN])
@pytest.mark.slow
def test_under_torchrun_a_closed_window_saves_the_step(cosmos, hangup):
    """Under nohup too: torchrun then ends its ranks in spite of it, and kills those that stay."""
    name = f"torchrun{int(hangup)}"
    launcher = ("--standalone", "--nproc-per-node", "2", "-m", "cosmos_cli")
    words = (*launcher, "train", "tiny", *options(name, "micro_batch_size=1", *ALONE))
    window = Window(cosmos, *words, hangup=hangup, module="torch.distributed.run")
    window.wait_for(lambda: steps(cosmos, name) >= 2)
    assert window.close() != 0
    assert len(find_run(cosmos, name).resumable_steps()) == 1


def test_a_result_is_not_lost_to_an_error_of_the_window(cosmos):
    """--json to a terminal that is gone ends with the code of the command, not with a bug."""
    window = Window(cosmos, "train", "tiny", *options("json", *ALONE), "--json")
    window.wait_for(lambda: steps(cosmos, "json") >= 1)
    assert window.close() == 143


@pytest.mark.parametrize("victim", ["cosmos_cli.generate.worker", "cosmos_cli.ranks"])
def test_generate_says_what_was_killed_and_leaves_no_process(cosmos, victim):
    ask = ("--prompt", "A teal robot.", "--prompt", "A red ball.", "--num-processes", "2")
    target = cosmos.cwd / victim
    words = (*ask, *settings("num_steps=900", "guardrails=off"), "-o", target)
    process = cosmos.start("generate", "tiny", *words)
    everyone = []
    while sum("cosmos_cli.generate.worker" in one.cmdline() for one in everyone) < 3:
        assert process.poll() is None
        time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            everyone = psutil.Process(process.pid).children(recursive=True)
    # The launcher's command line names the workers' module, too.
    own = [one for one in everyone if f"-m {victim}" in " ".join(one.cmdline())]
    own[-1 if victim.endswith("worker") else 0].kill()
    _, err = process.communicate(timeout=120)
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert not alive, alive
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    if victim.endswith("worker"):
        assert process.returncode == 3, err
        assert "was killed" in line
    else:
        assert "torchrun" in line
    assert "Traceback" not in err
    assert not list(target.glob("*.mp4"))
