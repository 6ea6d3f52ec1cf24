import os
import subprocess
import sys

from cosmos_cli.ranks import ADDRESS, Mailbox

POST = "from cosmos_cli import ranks; ranks.post({'rank': 1, 'error': 'ünï'})"


def run(environment):
    command = [sys.executable, "-c", POST]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def test_messages_of_other_processes_arrive_once():
    with Mailbox() as box:
        assert box.read() == []
        run({**os.environ, ADDRESS: box.address})
        run({**os.environ, ADDRESS: box.address})
        assert box.read() == [{"rank": 1, "error": "ünï"}] * 2
        assert box.read() == []


def test_without_a_receiver_the_message_is_printed():
    clean = {key: value for key, value in os.environ.items() if key != ADDRESS}
    assert '"rank": 1' in run(clean).stderr
    assert '"rank": 1' in run({**clean, ADDRESS: "nobody"}).stderr
