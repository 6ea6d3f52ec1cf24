"""What a terminal and a pipe get to see."""

import io

import pytest

from cosmos_cli import console


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")


def test_a_long_line_is_broken_between_words_and_a_command_stays_whole():
    command = "`cosmos download robots.yaml --set name=robots --for train`"
    line = f"error: {'word ' * 12}run {command}, or not"
    folded = console.fold(line, Terminal())
    assert " ".join(folded.split()) == " ".join(line.split())
    assert command in folded
    assert all(len(row) <= 60 or command in row for row in folded.splitlines())
    assert console.fold(line, io.StringIO()) == line
    following = f"next: {'word ' * 20}"
    assert console.fold(following, Terminal()) == following


def test_the_last_column_of_a_table_keeps_its_place():
    row = "name      Cosmos-Predict1    " + "word " * 12
    first, *more = console.fold(row.strip(), Terminal()).splitlines()
    assert first.index("word") == 29
    assert more
    assert all(line.startswith(" " * 29 + "word") for line in more)


def test_control_characters_of_captions_cannot_steer_the_terminal(capsys):
    console.say("caption \x1b[2J\x07 \x9b31m ünï\tend")
    assert capsys.readouterr().err == "caption \\x1b[2J\\x07 \\x9b31m ünï\tend\n"
    assert "\x1b" not in console.table([("a\x1b[31m",)], ("b",))


def test_a_rate_below_one_is_told_as_seconds():
    assert console.rate(1.25, "clips") == "1.25 clips/s"
    assert console.rate(0.07, "steps") == "14.29 s a step"
    assert console.rate(0, "steps") == "0.00 steps/s"
