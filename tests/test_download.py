"""The download verb against a hub on the loopback."""

import pytest
from conftest import Cosmos, moving_square
from hub import serve

from cosmos_cli import layout
from cosmos_cli.model import video

pytestmark = pytest.mark.workflow

MODEL = ("models", "nvidia/Cosmos-Predict1-7B-Text2World")
TOKENIZER = ("models", "nvidia/Cosmos-Tokenize1-CV8x8x8-720p")
TEXT = ("models", "google-t5/t5-11b")
DATA = ("datasets", "nvidia/Cosmos-NeMo-Assets")


class Online(Cosmos):
    hub = None
    token = None

    def environment(self):
        own = {"HF_ENDPOINT": self.hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(self.cwd / "hf")}
        own |= {"HF_TOKEN": self.token} if self.token else {}
        return {**super().environment(), **own}


@pytest.fixture
def online(tmp_path):
    return Online(tmp_path)


@pytest.fixture
def repos(tmp_path):
    clip = tmp_path / "clip.mp4"
    video.write_mp4(clip, moving_square(9, 64, 96), 24, 18)
    return {
        MODEL: {"model.pt": b"weights" * 999, "config.json": b"{}", "other.bin": b"not wanted"},
        TOKENIZER: {"encoder.jit": b"e" * 99, "decoder.jit": b"d" * 99, "mean_std.pt": b"m"},
        TEXT: {"config.json": b"{}", "pytorch_model.bin": b"t5", "tf_model.h5": b"not wanted"},
        DATA: {"nemo_diffusion_example_data/a.mp4": clip.read_bytes(), "README.md": b"text"},
    }


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_everything_of_a_recipe_arrives_in_the_layout_of_the_reference(online, repos):
    with serve(repos) as online.hub:
        result = online.json("download", "nemo_assets")
    found = content(online.cwd / "checkpoints")
    assert found["Cosmos-Predict1-7B-Text2World/model.pt"] == repos[MODEL]["model.pt"]
    assert found["Cosmos-Tokenize1-CV8x8x8-720p/mean_std.pt"] == b"m"
    assert found["google-t5/t5-11b/pytorch_model.bin"] == b"t5"
    assert not [name for name in found if name.endswith(("other.bin", ".h5"))]
    videos = online.cwd / "datasets" / "cosmos_nemo_assets" / "videos"
    assert [path.name for path in videos.iterdir()] == ["a.mp4"]
    assert result["videos"] == 1


def test_a_second_run_fetches_nothing_and_a_damaged_file_alone_comes_again(online, repos):
    with serve(repos) as online.hub:
        online("download", "nemo_assets")
        online.hub.log.clear()
        online("download", "nemo_assets")
        assert not [path for _, path in online.hub.log if "/resolve/" in path]
        weights = online.cwd / "checkpoints" / "Cosmos-Predict1-7B-Text2World" / "model.pt"
        weights.write_bytes(b"X" + weights.read_bytes()[1:])
        online.hub.log.clear()
        online("download", "nemo_assets")
        fetched = {path for _, path in online.hub.log if "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in fetched} == {"model.pt"}
    assert weights.read_bytes() == repos[MODEL]["model.pt"]


def test_wrong_bytes_are_refused_and_removed(online, repos):
    with serve(repos, corrupt=["model.pt"]) as online.hub:
        refused = online("download", "nemo_assets", code=4)
    assert "other bytes" in refused.stderr
    assert not (online.cwd / "checkpoints/Cosmos-Predict1-7B-Text2World/model.pt").exists()


@pytest.mark.parametrize(
    ("token", "word"), [(None, "needs a token"), ("wrong", "accept the licence")]
)
def test_a_gated_repository_names_its_page_and_the_remedy(online, repos, token, word):
    online.token = token
    with serve(repos, gated=[MODEL[1]]) as online.hub:
        refused = online("download", "nemo_assets", code=4)
    assert word in refused.stderr
    assert f"https://huggingface.co/{MODEL[1]}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_missing_repository_and_a_missing_hub_are_one_line_each(online, repos):
    del repos[MODEL]
    with serve(repos) as online.hub:
        refused = online("download", "nemo_assets", code=4)
        assert "does not exist" in refused.stderr
    refused = online("download", "nemo_assets", code=4)
    assert "cannot be reached" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_dry_run_says_the_bytes_and_fetches_none(online, repos):
    with serve(repos) as online.hub:
        result = online.json("download", "nemo_assets", "--dry-run")
    assert result["assets"][0]["fetched"] == len(repos[MODEL]["model.pt"]) + 2
    assert not (online.cwd / "checkpoints").exists()


def test_the_tiny_recipe_needs_no_hub(cosmos):
    first = cosmos.json("download", "tiny")
    assert first["videos"] == 12
    videos = cosmos.cwd / "datasets" / "tiny" / "videos"
    hashes = {path.name: layout.sha256_file(path) for path in videos.iterdir()}
    next(videos.iterdir()).unlink()
    cosmos("download", "tiny")
    assert {path.name: layout.sha256_file(path) for path in videos.iterdir()} == hashes
    sizes = {(info.height, info.width, info.fps) for info in map(video.probe, videos.iterdir())}
    assert len(sizes) > 1


def test_a_recipe_without_videos_says_where_to_put_them(cosmos):
    (cosmos.cwd / "mine.yaml").write_text("model: Cosmos-Tiny-Text2World\ndataset_dir: data\n")
    refused = cosmos("download", "mine.yaml", code=5)
    assert str(cosmos.cwd / "data" / "videos") in refused.stderr
