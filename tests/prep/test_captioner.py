"""Captions by a vision-language model: a real class with random weights, in real processes."""

import json
import shutil
import time

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from cosmos_cli.model import mp4
from tests.helpers.command import settings
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow

WORDS = 60
CHAT = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %} w1"
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A folder as transformers writes it: LLaVA of random weights that sees 4 patches a frame."""
    folder = tmp_path_factory.mktemp("vlm")
    words = ["<unk>", "<pad>", "</s>", "<image>", *(f"w{i}" for i in range(WORDS - 4))]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **small, num_attention_heads=2, image_size=28, patch_size=14
        ),
        text_config=LlamaConfig(**small, num_attention_heads=2, vocab_size=WORDS, eos_token_id=2),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    network = LlavaForConditionalGeneration(config)
    # Random weights would hardly look at the picture.
    network.model.multi_modal_projector.linear_2.weight.data.mul_(50)
    network.save_pretrained(folder)
    return folder


def write_videos(cosmos, count):
    videos = cosmos.cwd / "datasets" / "tiny" / "videos"
    videos.mkdir(parents=True)
    for i in range(count):
        shades = moving_square(9, 64, 96 + 32 * i) // (i + 1)
        mp4.write_mp4(videos / f"{i}.mp4", shades, 16, 18)
    return videos


def rows(dataset):
    found = json.loads((dataset / "manifest.json").read_text())["videos"]
    return [(row["caption"], row["caption_source"]) for row in found]


def write_by_vlm(vlm, *more):
    return settings("caption=vlm", f"caption_model={vlm}", *more)


def test_descriptions_follow_the_prompt_and_given_captions_stay(cosmos, vlm):
    videos = write_videos(cosmos, 4)
    dataset, metas = videos.parent, videos.parent / "metas"
    metas.mkdir()
    (metas / "0.txt").write_text("By hand.")
    (videos / "1.txt").write_text("Beside.")
    planned = cosmos("prep", "tiny", *write_by_vlm(vlm, "prompt=sks robot:"), "--dry-run")
    assert "4 clips" in planned.stderr
    assert not (dataset / "vlm").exists()

    cosmos("prep", "tiny", *write_by_vlm(vlm, "prompt=sks robot:"))
    first = rows(dataset)
    assert first[:2] == [("By hand.", "metas"), ("Beside.", "sidecar")]
    assert {origin for _, origin in first[2:]} == {"vlm"}
    words = [caption.removeprefix("sks robot: ") for caption, _ in first[2:]]
    # The model saw the videos.
    assert len(set(words)) == 2
    assert all(set(line.split()) <= {f"w{i}" for i in range(WORDS)} for line in words)
    assert [(metas / f"{i}.txt").read_text().strip() for i in range(4)] == [c for c, _ in first]
    times = {path: path.stat().st_mtime_ns for path in (dataset / "vlm").glob("*.json")}
    assert {path.stem for path in times} == {"2", "3"}

    (metas / "3.txt").write_text("Edited by a person.\n")
    # A copy of the dataset has other times.
    (videos / "2.mp4").touch()
    cosmos("prep", "tiny", *write_by_vlm(vlm, "prompt=tkt robot:"))
    assert rows(dataset)[2:] == [
        (f"tkt robot: {words[0]}", "vlm"), ("Edited by a person.", "metas")
    ]  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_descriptions_replace_a_bare_prompt_and_follow_the_video(cosmos, vlm):
    videos = write_videos(cosmos, 1)
    cosmos("prep", "tiny", *settings("prompt=A clip."))
    cosmos("prep", "tiny", *write_by_vlm(vlm))
    ((first, origin),) = rows(videos.parent)
    assert origin == "vlm"
    assert first != "A clip."
    mp4.write_mp4(videos / "0.mp4", 255 - moving_square(9, 64, 96), 16, 18)
    cosmos("prep", "tiny", *write_by_vlm(vlm))
    assert rows(videos.parent)[0][0] != first


def test_three_processes_and_one_killed_end_with_the_same_captions(cosmos, vlm):
    videos = write_videos(cosmos, 6)
    dataset = videos.parent
    shutil.copytree(dataset, cosmos.cwd / "again")
    arguments = write_by_vlm(vlm, "prompt=sks")
    cosmos("prep", "tiny", *arguments)
    array = [
        cosmos.start("prep", "tiny", *arguments, "--set", "dataset_dir=again") for _ in range(3)
    ]
    deadline = time.monotonic() + 60
    while not list((cosmos.cwd / "again" / "vlm").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    array[0].kill()
    for process in array:
        _, err = process.communicate(timeout=120)
        assert process.returncode == (-9 if process is array[0] else 0), err
    assert rows(cosmos.cwd / "again") == rows(dataset)
    # Helpers describe videos too.
    shutil.copytree(videos, cosmos.cwd / "helped" / "videos")
    helped = cosmos("prep", "tiny", *arguments, *settings("dataset_dir=helped", "num_processes=2"))
    assert helped.stderr.count("2 processes share 6 videos") == 2
    assert rows(cosmos.cwd / "helped") == rows(dataset)
    assert {origin for _, origin in rows(dataset)} == {"vlm"}


def test_a_model_that_cannot_be_used_is_refused(cosmos, vlm):
    write_videos(cosmos, 1)
    missing = cosmos("prep", "tiny", *write_by_vlm("owner/name"), code=4)
    assert "hf download owner/name" in missing.stderr
    silent = shutil.copytree(vlm, cosmos.cwd / "silent")
    (silent / "chat_template.jinja").unlink()
    assert "no chat template" in cosmos("prep", "tiny", *write_by_vlm(silent), code=4).stderr
    assert "set caption_model" in cosmos("prep", "tiny", *settings("caption=vlm"), code=2).stderr
