"""Caption files whose names are nearly those of their videos, as prep takes and names them."""

import json
import os
import pickle
import re

import numpy as np
import pytest
import torch

from cosmos_cli import paths
from cosmos_cli.model import mp4, text
from cosmos_cli.prep import embedding_files
from cosmos_cli.spec import TINY
from tests.helpers.command import Cosmos, settings
from tests.helpers.stand_ins import moving_square

NFC, NFD = "caf\u00e9", "cafe\u0301"


def write_videos(root, *stems):
    """A dataset with a video for each stem, no two alike."""
    dataset = root / "datasets" / "tiny"
    for folder in ("videos", "metas"):
        (dataset / folder).mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate(stems):
        clip = moving_square(13, 64, 96).roll(7 * i, dims=3)
        mp4.write_mp4(dataset / "videos" / f"{stem}.mp4", clip, 12, 18)
    return dataset


def captions_of(dataset):
    videos = json.loads((dataset / "manifest.json").read_text())["videos"]
    return {row["file"].removesuffix(".mp4"): row["caption"] for row in videos}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A dataset with every kind of name, prepared once; what prep said and its --json."""
    root = tmp_path_factory.mktemp("names")
    dataset = write_videos(root, NFD, "big", "full", "Case", "a.b", "long", "row", "unclear")
    videos, metas = dataset / "videos", dataset / "metas"
    (metas / f"{NFC}.txt").write_text("A coffee.")
    (metas / "CASE.txt").write_text("A case.")
    (metas / "full.mp4.txt").write_text("A full name.")
    (videos / "big.TXT").write_text("A suffix.")
    (videos / "a.b.txt").write_text("Dots.")
    (videos / "a.txt").write_text("The caption of nothing.")
    (videos / "unclear.TXT").write_text("One.")
    (videos / "unclear.Txt").write_text("Two.")
    (videos / "README.txt").write_text("About these videos.")
    (videos / "._big.txt").write_bytes(b"\0\5\x16\7")
    for i in range(7):
        (metas / f"gone{i}.txt").write_text("The caption of a video that is gone.")
    (metas / "long.txt").write_text("word " * 300)
    (root / "c.csv").write_text("file,caption\nvideos\\ROW.mp4,A row.\nnone.mp4,None.\n")
    (dataset / "t5_xxl").mkdir()
    (dataset / "t5_xxl" / "old.pickle").touch()
    cosmos = Cosmos(root)
    done = cosmos("prep", "tiny", *settings("captions_file=c.csv"))
    result = cosmos.json("prep", "tiny", *settings("captions_file=c.csv"))
    return dataset, done.stderr, result


@pytest.mark.workflow
def test_a_caption_with_nearly_the_name_of_a_video_reaches_it(prepared):
    dataset, _, result = prepared
    wanted = {
        NFD: "A coffee.", "big": "A suffix.", "full": "A full name.", "Case": "A case.",
        "a.b": "Dots.", "long": ("word " * 300).strip(), "row": "A row.", "unclear": "",
    }  # fmt: skip
    assert captions_of(dataset) == wanted
    reasons = {row["file"]: row["reason"] for row in result["videos"] if row["reason"]}
    assert list(reasons) == ["unclear.mp4"]
    assert reasons["unclear.mp4"].startswith("its caption may be unclear.TXT or unclear.Txt")
    # What prep writes has the video's own stem.
    assert (dataset / "metas" / f"{NFD}.txt").read_text() == "A coffee.\n"
    assert (dataset / "t5_xxl" / f"{NFD}.pickle").is_file()


@pytest.mark.workflow
def test_files_of_no_video_are_named_in_one_line_with_their_count(prepared):
    dataset, said, result = prepared
    (line,) = (line for line in said.splitlines() if "caption files belong to no video" in line)
    assert "8 caption files" in line
    assert "metas/gone0.txt, metas/gone1.txt" in line and "and 3 more" in line
    unused = result["captions_unused"]
    assert unused["caption_files"] == [*(f"metas/gone{i}.txt" for i in range(7)), "videos/a.txt"]
    assert "1 row of captions_file belongs to no video and is not used: line 3 'none.mp4'" in said
    assert "1 embedding belongs to no video and is not used: t5_xxl/old.pickle" in said
    page = (dataset / "report.html").read_text()
    assert "8 caption files belong to no video" in page
    assert json.loads((dataset / "manifest.json").read_text())["captions_unused"] == unused


@pytest.mark.workflow
def test_a_caption_that_is_cut_is_named_with_its_tokens(prepared):
    dataset, said, result = prepared
    assert re.search(
        r"1 caption is longer than the 128 tokens .* is not used: long\.mp4 \(1501 tokens\)", said
    )
    assert result["captions_cut"] == {"long.mp4": 1501}
    assert "long.mp4 (1501 tokens)" in (dataset / "report.html").read_text()


@pytest.mark.workflow
def test_a_second_run_takes_the_same_captions_and_encodes_nothing(prepared):
    dataset, _, _ = prepared
    files = [*dataset.glob("metas/*"), *dataset.glob("t5_xxl/*"), *dataset.glob("latents/*")]
    before = {path: path.stat().st_mtime_ns for path in files}
    manifest = (dataset / "manifest.json").read_bytes()
    Cosmos(dataset.parents[1])("prep", "tiny", *settings("captions_file=c.csv"))
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (dataset / "manifest.json").read_bytes() == manifest


@pytest.mark.workflow
def test_a_changed_caption_of_another_name_reaches_the_dataset(tmp_path):
    dataset = write_videos(tmp_path, "a", "b")
    (dataset / "metas" / "A.TXT").write_text("First.")
    (dataset / "metas" / "b.txt").write_text("Its own.")
    (dataset / "metas" / "B.txt").write_text("Not its own.")
    cosmos = Cosmos(tmp_path)
    said = cosmos("prep", "tiny", *settings()).stderr
    assert "1 caption file belongs to no video and is not used: metas/B.txt" in said
    assert captions_of(dataset) == {"a": "First.", "b": "Its own."}
    embedding = (dataset / "t5_xxl" / "a.pickle").read_bytes()
    (dataset / "metas" / "A.TXT").write_text("Second.")
    cosmos("prep", "tiny", *settings())
    assert captions_of(dataset) == {"a": "Second.", "b": "Its own."}
    assert (dataset / "t5_xxl" / "a.pickle").read_bytes() != embedding


@pytest.mark.workflow
def test_the_references_embeddings_are_taken_under_the_same_rule(tmp_path):
    dataset = write_videos(tmp_path, NFD)
    (dataset / "metas" / f"{NFC}.txt").write_text("A coffee.")
    (dataset / "t5_xxl").mkdir()
    made = np.random.default_rng(0).normal(size=(5, TINY.text.channels)).astype(np.float16)
    (dataset / "t5_xxl" / f"{NFC}.pickle").write_bytes(pickle.dumps([made]))
    said = Cosmos(tmp_path)("prep", "tiny", *settings()).stderr
    read = embedding_files.read_embedding(dataset / "t5_xxl" / f"{NFD}.pickle", TINY.text)
    assert np.array_equal(read.numpy(), made)
    assert "belong" not in said
    # Another caption makes another embedding, and the first does not come back.
    (dataset / "metas" / f"{NFC}.txt").write_text("A tea.")
    os.utime(dataset / "metas" / f"{NFC}.txt", (0, 0))
    for _ in range(2):
        Cosmos(tmp_path)("prep", "tiny", *settings())
        read = embedding_files.read_embedding(dataset / "t5_xxl" / f"{NFD}.pickle", TINY.text)
        assert not np.array_equal(read.numpy()[:1], made[:1])


@pytest.mark.workflow
def test_unused_files_are_named_by_dry_runs_and_failed_runs(tmp_path):
    dataset = write_videos(tmp_path, "a")
    (dataset / "metas" / "b.txt").write_text("Not of a.")
    cosmos = Cosmos(tmp_path)
    line = "1 caption file belongs to no video and is not used: metas/b.txt"
    assert line in cosmos("prep", "tiny", *settings(), "--dry-run", code=5).stderr
    assert line in cosmos("prep", "tiny", *settings(), code=5).stderr
    (dataset / "metas" / "b.txt").rename(dataset / "metas" / "A.TXT")
    done = cosmos("prep", "tiny", *settings(), "--dry-run")
    assert "belong" not in done.stderr


@pytest.mark.workflow
def test_a_new_recipe_counts_captions_of_other_names(tmp_path):
    dataset = write_videos(tmp_path, "a", NFD)
    (dataset / "videos" / "A.TXT").write_text("One.")
    (dataset / "videos" / f"{NFC}.mp4.txt").write_text("Two.")
    Cosmos(tmp_path)("recipes", "new", "mine", "--videos", dataset / "videos")
    assert "every video has its own caption" in (tmp_path / "mine.yaml").read_text()


def test_a_caption_of_exactly_the_token_limit_is_not_cut():
    encoder = text.TextEncoder(paths.EMBEDDED_DIR / "t5", TINY.text, "cpu", torch.float32)
    word = len(encoder.tokenizer("word").input_ids) - 1
    words = (TINY.text.tokens - 1) // word
    whole, more = " ".join(["word"] * words), " ".join(["word"] * (words + word + 1))
    assert encoder.cut([whole, more, "a", whole]) == {more: len(encoder.tokenizer(more).input_ids)}
    assert encoder.cut([]) == {}
