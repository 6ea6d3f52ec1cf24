"""Requests become jobs, whose hash names the video."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cosmos_cli import hashes
from cosmos_cli.errors import UserError
from cosmos_cli.generate import jobs
from cosmos_cli.generate.jobs import Settings, Weights
from cosmos_cli.generate.requests import Given, Request
from cosmos_cli.recipe import loading


def settings(*overrides):
    return Settings(
        loading.load("tiny", overrides).recipe, Weights(Path("a.pt"), "1"), Path(), True
    )


def test_an_exact_video_keeps_the_hash_that_it_had_before_the_key_speed():
    job = jobs.resolve(Request("A ball."), settings())
    names = [name for name in job.r.deciding("video") if name not in jobs.LATER_KEYS]
    values = json.dumps([getattr(job.r, name) for name in names])
    assert job.key == hashes.sha256_text("A ball.", "1", values)


def test_a_fast_video_is_another_than_an_exact_one_with_the_same_steps():
    fast = jobs.resolve(Request("A ball."), settings("speed=fast"))
    exact = replace(fast, r=fast.r.model_copy(update={"speed": "exact"}))
    assert fast.key != exact.key


def test_a_picture_that_is_read_as_a_video_is_another_input():
    def key(path, is_video):
        r, weights = settings().r, Weights(Path("a.pt"), "1")
        return jobs.Job("A ball.", r, weights, Path(), Given(Path(path), is_video, 1, "0")).key

    assert key("a.png", False) != key("a.png", True)
    # The usual ones keep the hash that they had.
    assert key("a.png", False) == key("a.jpg", False) == key("a.mp4", True)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"prompt": "a", "prompt": "b"}', "has the key 'prompt' twice"),
        ('{"prompt": "a", "output": "./"}', "is not a file inside --output"),
        ('{"prompt": "a", "output": ".mp4"}', "is not a file inside --output"),
    ],
)
def test_a_line_that_says_two_things_or_names_nothing_is_refused(text, word):
    with pytest.raises(UserError, match=word):
        Request(text, "b.jsonl:1", is_object=True).read()


def test_a_line_of_a_batch_cannot_change_what_speed_fast_sets():
    line = Request('{"prompt": "A ball.", "num_steps": 20}', "b.jsonl:1", is_object=True)
    assert jobs.resolve(line, settings()).r.num_steps == 20
    with pytest.raises(UserError, match="num_steps 20 has no effect with speed fast"):
        jobs.resolve(line, settings("speed=fast"))
