import os
import signal
import subprocess
import sys

import pytest

from cosmos_cli.ranks import ADDRESS, RankErrors

POST = "from cosmos_cli import ranks; ranks.post({'rank': 1, 'error': 'ünï'})"


def run(environment):
    command = [sys.executable, "-c", POST]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_messages_of_other_processes_arrive_once():
    with RankErrors() as box:
        assert box.read() == []
        run({**os.environ, ADDRESS: box.address})
        run({**os.environ, ADDRESS: box.address})
        assert box.read() == [{"rank": 1, "error": "ünï"}] * 2
        assert box.read() == []


def test_without_a_receiver_the_message_is_printed():
    clean = {key: value for key, value in os.environ.items() if key != ADDRESS}
    assert '"rank": 1' in run(clean).stderr
    assert '"rank": 1' in run({**clean, ADDRESS: "nobody"}).stderr


RANK = """
import os, signal, sys, time
from pathlib import Path
told = Path(sys.argv[1])
if os.environ["RANK"] == "1":
    told.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)
while not (told.exists() and told.read_text()) or " Z " not in Path(
    "/proc", told.read_text(), "stat"
).read_text():
    time.sleep(0.001)
os._exit(6)
"""


def test_a_killed_rank_is_named_though_another_failed_because_of_it(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    command = ["-m", "cosmos_cli.ranks", "--nproc-per-node", "2", script, tmp_path / "told"]
    with RankErrors() as box:
        environment = {**os.environ, ADDRESS: box.address}
        done = subprocess.run([sys.executable, *command], env=environment, check=False)
        assert box.read() == [{"first": 1, "process_code": -signal.SIGKILL}]
    assert done.returncode == 6


HANGS = """
import os, signal, sys, time
if os.environ["RANK"] == "0":
    sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_rank_that_torchrun_killed_is_not_named(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(HANGS)
    command = ["-m", "cosmos_cli.ranks", "--nproc-per-node", "2", script]
    with RankErrors() as box:
        environment = {**os.environ, ADDRESS: box.address}
        subprocess.run([sys.executable, *command], env=environment, check=False)
        assert box.read() == [{"first": 0, "process_code": 3}]
