"""A LoRA trained, and a video generated, with weights that stay in CPU memory."""

import pytest

from cosmos_cli import files
from tests.helpers.runs import copy_of, find_run, losses, train

pytestmark = pytest.mark.workflow

LORA = ("lora_rank=4", "lora_targets=attention_mlp", "num_processes=1", "zero_stage=1")
STREAMED = ("offload=weights", "activation_checkpointing=all")


@pytest.fixture(scope="module")
def cosmos(prepared, tmp_path_factory):
    return copy_of(prepared, tmp_path_factory.mktemp("streaming"))


@pytest.fixture(scope="module")
def resident(cosmos):
    train(cosmos, "resident", *LORA, "max_steps=4")
    return find_run(cosmos, "resident")


@pytest.mark.parametrize(("first", "then"), [(STREAMED, ()), ((), STREAMED)])
def test_a_run_may_be_resumed_with_and_without_streaming(cosmos, resident, first, then):
    name = "there" if first else "back"
    train(cosmos, name, *LORA, *first, "max_steps=2")
    done = train(cosmos, name, *LORA, *then, "max_steps=4")
    streamed = "the weights of 6 of 6 blocks, the stored activations of 6" in done.stderr
    assert streamed == bool(then)
    run = find_run(cosmos, name)
    assert losses(run) == losses(resident)
    for kind in ("reg", "ema"):
        assert run.lora(4, kind).read_bytes() == resident.lora(4, kind).read_bytes()


@pytest.mark.slow
def test_twenty_streamed_steps_equal_resident_ones(cosmos):
    for name, pairs in {"long": (), "long_streamed": STREAMED}.items():
        train(cosmos, name, *LORA, *pairs, "max_steps=20")
    long, streamed = (find_run(cosmos, name) for name in ("long", "long_streamed"))
    assert losses(long) == losses(streamed)
    assert long.lora(20, "ema").read_bytes() == streamed.lora(20, "ema").read_bytes()


def test_a_streamed_video_has_the_same_bytes_and_says_so(cosmos, resident):
    ask = ("--model", "base", "--lora", str(resident.lora(4, "ema")), "--prompt", "A teal robot.")
    videos = []
    for memory in ("in_turn", "streamed"):
        target = cosmos.cwd / f"{memory}.mp4"
        pairs = ("--set", "num_steps=2", "--set", f"memory={memory}")
        done = cosmos("generate", "tiny", *ask, *pairs, "--output", target)
        videos.append(target.read_bytes())
        record = files.read_json(target.with_suffix(".json"))
        assert record["streamed_blocks"] == (6 if memory == "streamed" else 0)
    assert "6 of 6 blocks are streamed from CPU memory" in done.stderr
    assert videos[0] == videos[1]


def test_two_processes_stream_one_copy_and_make_the_same_videos(cosmos, resident):
    adapted = ("--model", "base", "--lora", str(resident.lora(4, "ema")))
    ask = (*adapted, "--prompt", "A teal robot.", "--prompt", "A red ball.")
    for folder, pairs in {"one_copy": ("memory=streamed",), "resident": ()}.items():
        sets = [word for pair in ("num_steps=2", *pairs) for word in ("--set", pair)]
        target = ("--output", cosmos.cwd / folder, "--num-processes", "2")
        done = cosmos("generate", "tiny", *ask, *sets, *target)
        assert ("streamed from CPU memory, one copy for all processes" in done.stderr) == bool(
            pairs
        )
    videos = {path.name: path.read_bytes() for path in (cosmos.cwd / "resident").glob("*.mp4")}
    assert len(videos) == 2
    for name, content in videos.items():
        assert (cosmos.cwd / "one_copy" / name).read_bytes() == content
