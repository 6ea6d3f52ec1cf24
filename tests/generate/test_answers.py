"""Cached embeddings and upsampled prompts never change the generated videos."""

import hashlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import cosmos_cli
from cosmos_cli import files, hashes
from cosmos_cli.generate import answers
from tests.helpers.chat_model import chat_folder
from tests.helpers.command import Cosmos, settings

QUICK = settings("num_steps=2", "guidance=2", "negative_prompt=w7", "upsampler=chat")


class Asker:
    """Stands for a class that runs a model."""


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Make the `Answers` of a model of one file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1234")
    return lambda *settings: answers.Answers(tmp_path / "model", Asker, *settings)


def ask(cached, words, answer):
    return cached.get(words, lambda: answer)


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "cosmos" / "answers").iterdir())


def test_an_answer_is_reused_for_the_same_text_files_and_settings(cached, tmp_path):
    assert ask(cached(), "a", b"1") == b"1"
    assert ask(cached(), "a", b"2") == b"1"
    assert ask(cached(), "b", b"") == b""
    assert ask(cached(), "b", b"3") == b""
    assert ask(cached("bf16"), "a", b"4") == b"4"
    notes = tmp_path / "model" / files.CACHE_DIR / "cosmos" / "lock"
    notes.parent.mkdir(parents=True)
    notes.touch()
    assert ask(cached(), "a", b"5") == b"1"
    (tmp_path / "model" / "config.json").touch()
    assert ask(cached(), "a", b"6") == b"6"
    os.utime(tmp_path / "model" / "weights", (1, 1))
    assert ask(cached(), "a", b"7") == b"7"


def test_a_model_without_files_is_asked_every_time(cached, tmp_path):
    shutil.rmtree(tmp_path / "model")
    assert [ask(cached(), "a", made) for made in (b"1", b"2")] == [b"1", b"2"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "a folder"])
def test_a_damaged_answer_is_made_again(cached, tmp_path, damage):
    ask(cached(), "a", b"first")
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1], "flipped": whole[:-1] + b"u"}.get(damage, b""))
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    assert ask(cached(), "a", b"again") == b"again"
    # A folder cannot be replaced, so the answer is made every time.
    assert ask(cached(), "a", b"more") == (b"more" if damage == "a folder" else b"again")


def test_the_least_recently_used_answers_are_removed(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "MOST_ANSWERS", 3)
    for i, words in enumerate("abc"):
        ask(cached(), words, words.encode())
        os.utime(next(p for p in entries(tmp_path) if p.stat().st_mtime > 9), (i, i))
    (tmp_path / "cache" / "cosmos" / "answers" / ".99999999.x.tmp").touch()
    ask(cached(), "a", b"used")
    ask(cached(), "d", b"d")
    assert len(entries(tmp_path)) == 3
    assert [ask(cached(), words, b"new") for words in "acdb"] == [b"a", b"c", b"d", b"new"]


def test_a_user_without_a_home_folder_gets_answers_without_a_cache(cached, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert answers.cache_dir().parent == Path("/dev/null/.cache")
    assert [ask(cached(), "a", made) for made in (b"1", b"2")] == [b"1", b"2"]


# --- in real processes ----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """Run a copy of the package whose text encoder a test can replace, with a chat model."""
    package = Path(cosmos_cli.__file__).parent
    for folder in (package, package.parent / "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, tmp_path / folder.name, ignore=ignored)
    chat_folder(tmp_path / "chat")
    return Cosmos(tmp_path, tmp_path / "cache")


def make(cosmos, folder, *words, code=0):
    """Return the mp4's sha256, the encoded text and stderr."""
    done = cosmos("generate", "--prompt", *words, "-o", folder, *QUICK, code=code)
    (mp4,) = (cosmos.cwd / folder).glob("*.mp4")
    return hashes.sha256_file(mp4), mp4.with_suffix(".txt").read_text(), done.stderr


def replace_weights(path, content):
    """Write other weights of the same size and modification time."""
    stamp, size = path.stat(), path.stat().st_size
    path.write_bytes(content.ljust(size)[:size])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


@pytest.mark.workflow
def test_cached_answers_give_the_same_files_without_loading_a_model(own):
    plain = make(Cosmos(own.cwd), "plain", "w5 w6")
    assert not own.cache.exists()
    assert make(own, "first", "w5 w6")[:2] == plain[:2]
    # The upsampled prompt, its embedding and that of the negative prompt.
    assert len(kept := entries(own.cwd)) == 3
    t5 = own.cwd / "cosmos_cli" / "model" / "tiny" / "t5" / "model.safetensors"
    chat = own.cwd / "chat" / "model.safetensors"
    whole = {path: path.read_bytes() for path in (t5, chat)}
    for path in whole:
        replace_weights(path, b"no weights")
    second = make(own, "second", "w5 w6")
    assert second[:2] == plain[:2]
    assert f"upsampled: {plain[1].strip()}" in second[2]
    # A model with other files is run again.
    chat.write_bytes(whole[chat])
    save_file({name: 2 * weight for name, weight in load_file(chat).items()}, chat)
    t5.write_bytes(whole[t5])
    other = make(own, "third", "w5 w6")
    assert other[0] != plain[0]
    assert other[1] != plain[1]
    # The guardrails also check cached answers.
    assert set(kept) < set(entries(own.cwd))
    for path in entries(own.cwd):
        path.write_bytes(hashlib.sha256(b"A nude statue.").digest() + b"A nude statue.")
    blocked = own("generate", "--prompt", "w5 w6", "-o", "fourth", *QUICK, code=8)
    assert "A nude statue." in blocked.stderr


@pytest.mark.workflow
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_while_caching_answers_changes_no_video(own, kills):
    (own.cwd / "b.jsonl").write_text("".join(f'{{"prompt": "w{i} w6"}}\n' for i in range(3, 9)))
    ask = ["generate", "--batch", "b.jsonl", *QUICK]
    Cosmos(own.cwd)(*ask, "-o", "plain")
    answers = own.cache / "cosmos" / "answers"
    for kill in range(kills):
        before = len(list(answers.glob("*")))
        process = own.start(*ask, "-o", f"killed{kill}")
        while len(list(answers.glob("*"))) == before and process.poll() is None and before < 13:
            time.sleep(0.001)
        time.sleep(0.003 * kill)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    own(*ask, "-o", "last")
    assert not [path for path in entries(own.cwd) if path.name.startswith(".")]
    plain, last = (
        {path.name: hashes.sha256_file(path) for path in (own.cwd / folder).glob("*.mp4")}
        for folder in ("plain", "last")
    )
    assert len(plain) == 6
    assert plain == last
