"""The download verb against a hub on the loopback."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import T5Config, T5EncoderModel

from cosmos_cli import hashes, paths
from cosmos_cli.model import mp4, video
from tests.helpers.hub import Online, commit_of, serve, socks_proxy
from tests.helpers.stand_ins import moving_square

pytestmark = pytest.mark.workflow

MODEL = ("models", "nvidia/Cosmos-Predict1-7B-Text2World")
TOKENIZER = ("models", "nvidia/Cosmos-Tokenize1-CV8x8x8-720p")
TEXT = ("models", "google-t5/t5-11b")
ENCODER = ("models", "comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI")
ENCODER_FILE = "text_encoders/oldt5_xxl_fp16.safetensors"
SIGLIP = ("models", "google/siglip-so400m-patch14-384")
LLAMA_GUARD = ("models", "meta-llama/LlamaGuard-7b")
AEGIS = ("models", "nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0")
DATA = ("datasets", "nvidia/Cosmos-NeMo-Assets")


T5 = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2)


@pytest.fixture
def online(tmp_path):
    return Online(tmp_path)


def t5_weights():
    """T5's encoder in fp16 under the names of the third party's file."""
    torch.manual_seed(0)
    weights = T5EncoderModel(T5).state_dict()
    del weights["encoder.embed_tokens.weight"]
    return {name: tensor.half().clone() for name, tensor in weights.items()}


def old_format(weights):
    """The bytes of a file as torch wrote it before 1.6."""
    stream = io.BytesIO()
    torch.save(weights, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.fixture
def repos(tmp_path):
    clip = tmp_path / "clip.mp4"
    mp4.write_mp4(clip, moving_square(9, 64, 96), 24, 18)
    return {
        MODEL: {
            "model.pt": b"weights" * 999,
            "config.json": b"{}",
            "other.bin": b"not wanted",
            "guardrail/blocklist/custom/words": b"word",
            "guardrail/face_blur_filter/Resnet50_Final.pth": b"faces",
            "guardrail/video_content_safety_filter/safety_filter.pt": b"frames",
        },
        SIGLIP: {"config.json": b"{}", "model.safetensors": b"siglip"},
        LLAMA_GUARD: {"model-00001-of-00001.safetensors": b"guard", "pytorch_model.bin": b"twice"},
        AEGIS: {"adapter_config.json": b"{}", "adapter_model.safetensors": b"lora"},
        TOKENIZER: {"encoder.jit": b"e" * 99, "decoder.jit": b"d" * 99, "mean_std.pt": b"m"},
        TEXT: {
            "config.json": json.dumps(T5.to_dict()).encode(),
            "pytorch_model.bin": old_format(T5EncoderModel(T5).state_dict()),
            "tf_model.h5": b"not wanted",
        },
        ENCODER: {ENCODER_FILE: save(t5_weights()), "vae/vae.safetensors": b"not wanted"},
        DATA: {"nemo_diffusion_example_data/a.mp4": clip.read_bytes(), "README.md": b"text"},
    }


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_all_assets_of_a_recipe_arrive_in_the_layout_of_the_reference(online, repos):
    with serve(repos) as online.hub:
        result = online.json("download", "nemo_assets")
    found = content(online.cwd / "checkpoints")
    assert found["Cosmos-Predict1-7B-Text2World/model.pt"] == repos[MODEL]["model.pt"]
    assert found["Cosmos-Tokenize1-CV8x8x8-720p/mean_std.pt"] == b"m"
    assert found["google-t5/t5-11b/model.safetensors"] == repos[ENCODER][ENCODER_FILE]
    assert found["Cosmos-Predict1-7B-Text2World/guardrail/blocklist/custom/words"] == b"word"
    guards = "Cosmos-Predict1-7B-Text2World/guardrail/face_blur_filter/Resnet50_Final.pth"
    assert found[guards] == b"faces"
    assert found["google/siglip-so400m-patch14-384/model.safetensors"] == b"siglip"
    assert found["meta-llama/LlamaGuard-7b/model-00001-of-00001.safetensors"] == b"guard"
    assert found[f"{AEGIS[1]}/adapter_model.safetensors"] == b"lora"
    assert not [name for name in found if name.endswith((".bin", ".h5", "vae.safetensors"))]
    videos = online.cwd / "datasets" / "cosmos_nemo_assets" / "videos"
    assert [path.name for path in videos.iterdir()] == ["a.mp4"]
    assert result["videos"] == 1


FEATURES = {
    ("models", "facebook/dinov2-base"): "apache-2.0",
    SIGLIP: "apache-2.0",
    ("models", "facebook/vjepa2-vitl-fpc64-256"): "mit",
}


def test_the_models_of_evaluate_are_fetched_for_it_alone(online, repos):
    names = ("config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin")
    own = {key: dict.fromkeys(names, key[1].encode()) for key in FEATURES}
    own[SIGLIP] |= {**repos[SIGLIP], "tokenizer.json": b"{}", "spiece.model": b"not wanted"}
    licences = {name: licence for (_, name), licence in FEATURES.items()}
    with serve({**repos, **own}, licences=licences) as online.hub:
        online("download", "nemo_assets")
        assert not (online.cwd / "checkpoints" / "facebook").exists()
        planned = online("download", "nemo_assets", "--for", "evaluate", "--dry-run", "--json")
        assert not (online.cwd / "checkpoints" / "facebook").exists()
        done = online.json("download", "nemo_assets", "--for", "evaluate")
        assert done["next"] == "cosmos evaluate nemo_assets"
        online.hub.log.clear()
        online("download", "nemo_assets", "--for", "evaluate")
        assert not [path for _, path in online.hub.log if "/resolve/" in path]
    assert "facebook/vjepa2-vitl-fpc64-256 at" in planned.stderr
    assert "licence mit, 3 files, 90 B, 90 B to download" in planned.stderr
    planned = {each["repo"]: each for each in json.loads(planned.stdout)["assets"]}
    assert {each["licence"] for each in planned.values()} == {"mit", "apache-2.0"}
    # The guardrail has fetched the rest of SigLIP.
    assert planned[SIGLIP[1]]["fetched"] == len(b"{}")
    found = content(online.cwd / "checkpoints")
    assert {name.rpartition("/")[2] for name in found if name.startswith("facebook/")} == {
        *names[:3]
    }
    assert found["google/siglip-so400m-patch14-384/tokenizer.json"] == b"{}"
    # They are complete without a network.
    online.variables = {"HF_HUB_OFFLINE": "1"}
    online("download", "nemo_assets", "--for", "evaluate")
    chosen = ("--set", "likeness_model=off", "--set", f"match_model={online.cwd}")
    named = online.json("download", "nemo_assets", "--for", "evaluate", *chosen, "--dry-run")
    assert [each["repo"] for each in named["assets"]] == ["facebook/vjepa2-vitl-fpc64-256"]


def test_a_second_run_downloads_only_damaged_files(online, repos):
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


def test_check_downloads_only_missing_and_damaged_files(online, repos):
    online.variables = {"CUDA_VISIBLE_DEVICES": ""}
    with serve(repos) as online.hub:
        online("download", "nemo_assets")
        whole = content(online.cwd / "checkpoints")
        model, by_hand = "Cosmos-Predict1-7B-Text2World/model.pt", "meta-llama/LlamaGuard-7b"
        weights = online.cwd / "checkpoints" / model
        weights.write_bytes(b"X" + weights.read_bytes()[1:])
        (online.cwd / "checkpoints" / paths.TOKENIZER_DIR / "mean_std.pt").unlink()
        # Nothing is known of files that came by other ways.
        (online.cwd / "checkpoints" / by_hand / "model-00001-of-00001.safetensors").write_bytes(b"")
        for record in (online.cwd / "checkpoints" / by_hand / ".cache" / "cosmos").glob("*.json"):
            record.unlink()
        ask = ["download", "nemo_assets", "--check"]
        online(*ask, "--dry-run")
        assert weights.read_bytes() != whole[model]
        online.hub.log.clear()
        # The weights themselves are tried on a GPU only.
        assert "needs a GPU" in online(*ask, code=3).stderr
        fetched = {path for _, path in online.hub.log if "/resolve/" in path}
        assert {path.rpartition("/")[2] for path in fetched} == {"model.pt", "mean_std.pt"}
        guard = f"{by_hand}/model-00001-of-00001.safetensors"
        assert content(online.cwd / "checkpoints") == {**whole, guard: b""}
        online.hub.log.clear()
        online(*ask, code=3)
        assert not online.hub.log


def test_a_file_with_wrong_bytes_is_refused_and_deleted(online, repos):
    with serve(repos, corrupt=["model.pt"]) as online.hub:
        refused = online("download", "nemo_assets", code=4)
    assert "other bytes" in refused.stderr
    assert not (online.cwd / "checkpoints/Cosmos-Predict1-7B-Text2World/model.pt").exists()


@pytest.mark.parametrize(
    ("token", "word"), [(None, "needs a token"), ("wrong", "accept the licence")]
)
def test_the_error_of_a_gated_repository_names_its_page_and_the_fix(online, repos, token, word):
    online.token = token
    with serve(repos, gated=[MODEL[1]]) as online.hub:
        refused = online("download", "nemo_assets", code=4)
    assert word in refused.stderr
    assert f"https://huggingface.co/{MODEL[1]}" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_missing_repository_or_hub_is_an_error_of_one_line(online, repos):
    del repos[MODEL]
    with serve(repos) as online.hub:
        refused = online("download", "nemo_assets", code=4)
        assert "does not exist" in refused.stderr
    refused = online("download", "nemo_assets", code=4)
    assert "cannot be reached" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_file_that_the_hub_lacks_is_named(online, repos):
    """A file that is not listed, or is listed and cannot be fetched."""
    del repos[TOKENIZER]["mean_std.pt"]
    with serve(repos, lost=["a.mp4"]) as online.hub:
        refused = online("download", "nemo_assets", "--for", "prep", code=4)
        assert f"{TOKENIZER[1]}: has no file like mean_std.pt" in refused.stderr
        assert not (online.cwd / "checkpoints").exists()
        repos[TOKENIZER]["mean_std.pt"] = b"m"
        refused = online("download", "nemo_assets", "--for", "prep", code=4)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"datasets/{DATA[1]}: has no such file: " in line
    assert "a.mp4" in line
    assert not list(online.cwd.rglob("*.incomplete"))
    assert not list(online.cwd.glob("datasets/*/videos/*"))


def test_dry_run_prints_the_bytes_and_downloads_nothing(online, repos):
    with serve(repos) as online.hub:
        result = online.json("download", "nemo_assets", "--dry-run")
    sizes = {asset["repo"]: asset["fetched"] for asset in result["assets"][:-4]}
    assert sizes[MODEL[1]] == len(repos[MODEL]["model.pt"]) + 2
    assert sizes[ENCODER[1]] == len(repos[ENCODER][ENCODER_FILE])
    assert not (online.cwd / "checkpoints").exists()


def test_the_tiny_recipe_needs_no_hub(cosmos):
    first = cosmos.json("download", "tiny")
    assert first["videos"] == 36
    videos = cosmos.cwd / "datasets" / "tiny" / "videos"
    before = {path.name: hashes.sha256_file(path) for path in videos.iterdir()}
    next(videos.iterdir()).unlink()
    cosmos("download", "tiny")
    assert {path.name: hashes.sha256_file(path) for path in videos.iterdir()} == before
    sizes = {(info.height, info.width, info.fps) for info in map(video.probe, videos.iterdir())}
    assert len(sizes) > 1


def test_a_recipe_without_videos_says_where_to_put_them(cosmos):
    (cosmos.cwd / "mine.yaml").write_text("model: Cosmos-Tiny-Text2World\ndataset_dir: data\n")
    refused = cosmos("download", "mine.yaml", code=5)
    assert str(cosmos.cwd / "data" / "videos") in refused.stderr


def test_work_can_start_before_the_rest_arrives(online, repos):
    with serve(repos) as online.hub:
        first = online("download", "nemo_assets", "--for", "prep")
        prep = {path.split("/")[0] for path in content(online.cwd / "checkpoints")}
        online("download", "nemo_assets", "--for", "train")
        train = {path.split("/")[0] for path in content(online.cwd / "checkpoints")} - prep
        assert not list(online.cwd.glob("checkpoints/*/guardrail"))
    assert prep == {"Cosmos-Tokenize1-CV8x8x8-720p", "google-t5"}
    assert train == {"Cosmos-Predict1-7B-Text2World"}
    lines = first.stderr.splitlines()
    assert any(ENCODER[1] in line and "third party" in line for line in lines)
    assert any(line.startswith("in all") for line in lines)


def test_unavailable_repositories_are_reported_before_the_first_byte(online, repos):
    del repos[TOKENIZER]
    with serve(repos, gated=[MODEL[1]]) as online.hub:
        refused = online("download", "nemo_assets", code=4)
        assert not [path for _, path in online.hub.log if "/resolve/" in path]
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert any(TOKENIZER[1] in line for line in errors)
    assert any(MODEL[1] in line and "HF_TOKEN" in line for line in errors)


@pytest.mark.parametrize("code", [429, 503])
def test_a_request_to_a_busy_hub_is_retried(online, repos, code):
    storm = {"/api/": [code] * 2, "/model.pt": [code] * 7}
    with serve(repos, storm=storm) as online.hub:
        done = online("download", "nemo_assets", "--for", "train")
    assert not any(storm.values())
    assert f"{MODEL[1]}: the hub answered {code}, next try in 1 s" in done.stderr
    found = content(online.cwd / "checkpoints")
    assert found["Cosmos-Predict1-7B-Text2World/model.pt"] == repos[MODEL]["model.pt"]


def test_a_slow_redirected_file_arrives_whole_and_a_cut_one_never(online, repos):
    repos[MODEL]["model.pt"] = os.urandom(40_000)
    online.variables = {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    faults = {"moved": ["model.pt"], "slow": {"model.pt": 6}}
    with serve(repos, **faults) as online.hub:
        online("download", "nemo_assets", "--for", "train")
        assert any(path.startswith("/cdn/") for _, path in online.hub.log)
    weights = online.cwd / "checkpoints/Cosmos-Predict1-7B-Text2World/model.pt"
    assert weights.read_bytes() == repos[MODEL]["model.pt"]
    weights.unlink()
    with serve(repos, cut={"model.pt": 100}) as online.hub:
        refused = online("download", "nemo_assets", "--for", "train", code=4)
    assert "Traceback" not in refused.stderr
    assert not weights.exists()


def test_a_killed_download_keeps_whole_files_and_no_partial_ones(online, repos):
    repos[DATA] |= {f"{i}.mp4": os.urandom(3000) for i in range(3)}
    repos[DATA]["9.mp4"] = os.urandom(4000)
    with serve(repos, slow={"9.mp4": 1000}) as online.hub:
        process = online.start("download", "nemo_assets", "--for", "prep")
        folder = online.cwd / "datasets" / "cosmos_nemo_assets"
        arriving = folder / ".cache" / "cosmos" / "arriving"
        deadline = time.monotonic() + 60
        whole = [folder / "videos" / f"{i}.mp4" for i in range(3)]
        while not (all(map(Path.exists, whole)) and list(arriving.rglob("*.incomplete"))):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.communicate()
        assert list(arriving.rglob("*.incomplete"))
        assert not (folder / "videos" / "9.mp4").exists()
        online.hub.slow, online.hub.log = {}, []
        online("download", "nemo_assets", "--for", "prep")
        fetched = {path.rpartition("/")[2] for _, path in online.hub.log if "/resolve/" in path}
    assert "9.mp4" in fetched
    assert not fetched & {"0.mp4", "1.mp4", "2.mp4"}
    assert not list(online.cwd.rglob("*.incomplete"))
    assert not arriving.exists()


def test_two_processes_download_every_file_once(online, repos):
    repos[DATA] = {f"{i}.mp4": os.urandom(3000) for i in range(5)}
    with serve(repos, slow={f"{i}.mp4": 2 for i in range(5)}) as online.hub:
        both = [online.start("download", "nemo_assets", "--for", "prep") for _ in range(2)]
        ends = [process.communicate(timeout=200)[1] for process in both]
        fetched = [path for method, path in online.hub.log if method == "GET" and ".mp4" in path]
    assert [process.returncode for process in both] == [0, 0], ends
    assert len(fetched) == 5
    videos = online.cwd / "datasets" / "cosmos_nemo_assets" / "videos"
    assert {path.name: path.read_bytes() for path in videos.iterdir()} == repos[DATA]


def test_files_copied_by_hand_are_recorded_for_use_without_a_network(online, repos):
    folder = online.cwd / "checkpoints" / "Cosmos-Predict1-7B-Text2World"
    folder.mkdir(parents=True)
    for name in ("model.pt", "config.json"):
        (folder / name).write_bytes(repos[MODEL][name])
    with serve(repos) as online.hub:
        online("download", "nemo_assets", "--for", "train")
        assert not [path for _, path in online.hub.log if "/resolve/" in path]
    online.variables = {"HF_HUB_OFFLINE": "1"}
    online("download", "nemo_assets", "--for", "train")


def test_without_a_network_whole_files_pass_and_damaged_ones_are_named(online, repos):
    with serve(repos) as online.hub:
        online("download", "nemo_assets")
    online.variables = {"HF_HUB_OFFLINE": "1"}
    assert online.json("download", "nemo_assets")["videos"] == 1
    (online.cwd / "checkpoints/Cosmos-Tokenize1-CV8x8x8-720p/encoder.jit").write_bytes(b"x" * 99)
    refused = online("download", "nemo_assets", code=4)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert TOKENIZER[1] in line
    assert "HF_HUB_OFFLINE" in line


def test_a_socks_proxy_is_used(online, repos):
    with serve(repos) as online.hub, socks_proxy() as proxy:
        port = online.hub.server_address[1]
        address = f"socks5h://127.0.0.1:{proxy.server_address[1]}"
        online.variables = {"HF_ENDPOINT": f"http://hub.invalid:{port}", "ALL_PROXY": address}
        online.variables |= {"NO_PROXY": "", "no_proxy": ""}
        online("download", "nemo_assets", "--for", "train")
    assert set(proxy.log) == {"hub.invalid"}
    found = content(online.cwd / "checkpoints")
    assert found["Cosmos-Predict1-7B-Text2World/model.pt"] == repos[MODEL]["model.pt"]


def test_a_pinned_revision_is_downloaded_or_refused(online, repos):
    words = ("download", "nemo_assets", "--for", "prep", "--set")
    with serve(repos) as online.hub:
        online(*words, f"dataset_revision={commit_of(repos[DATA])}")
        refused = online(*words, f"dataset_revision={'f' * 40}", code=4)
    assert "no such revision" in refused.stderr


def test_later_downloads_stay_at_the_first_revision(online, repos):
    first = dict(repos[MODEL])
    weights = online.cwd / "checkpoints/Cosmos-Predict1-7B-Text2World/model.pt"
    with serve(repos) as online.hub:
        online("download", "nemo_assets", "--for", "train")
    repos[MODEL] |= {"model.pt": b"newer", "notes.txt": b""}
    with serve(repos, older={commit_of(first): first}) as online.hub:
        online("download", "nemo_assets", "--for", "train")
        assert weights.read_bytes() == first["model.pt"]
        weights.write_bytes(b"damaged")
        found = online.json("download", "nemo_assets", "--for", "train")
        assert weights.read_bytes() == first["model.pt"]
        assert found["assets"][0]["revision"] == commit_of(first)
        online.hub.older = {}
        refused = online("download", "nemo_assets", "--for", "train", code=4)
        (record,) = re.findall(r"delete (\S+) to take the newest", refused.stderr)
        Path(record).unlink()
        done = online("download", "nemo_assets", "--for", "train")
    assert weights.read_bytes() == b"newer"
    assert "model.pt is as the hub has it, but not the one" in done.stderr


def test_files_are_downloaded_in_parallel(online, repos):
    repos[DATA] = {f"{i}.mp4": os.urandom(3000) for i in range(4)}
    mine = "dataset_dir: data\ndataset_repo: nvidia/Cosmos-NeMo-Assets\n"
    (online.cwd / "mine.yaml").write_text(f"model: Cosmos-Tiny-Text2World\n{mine}")
    # The hub sends none of them before it was asked for all.
    with serve(repos, together=threading.Barrier(4, timeout=60)) as online.hub:
        online("download", "mine.yaml")
    videos = online.cwd / "data" / "videos"
    assert {path.name: path.read_bytes() for path in videos.iterdir()} == repos[DATA]


def test_one_bad_file_does_not_stop_the_others(online, repos):
    repos[DATA] |= {f"{i}.mp4": os.urandom(3000) for i in range(3)}
    with serve(repos, corrupt=["0.mp4"], slow={"1.mp4": 3, "2.mp4": 3}) as online.hub:
        refused = online("download", "nemo_assets", "--for", "prep", code=4)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "0.mp4: the hub sent other bytes" in line
    videos = online.cwd / "datasets" / "cosmos_nemo_assets" / "videos"
    assert {path.name for path in videos.iterdir()} >= {"1.mp4", "2.mp4"}


def test_an_interrupted_download_ends_at_once_and_can_be_repeated(online, repos):
    repos[DATA] |= {f"{i}.mp4": os.urandom(3000) for i in range(2)}
    folder = online.cwd / "datasets" / "cosmos_nemo_assets"
    with serve(repos, slow={"0.mp4": 3000, "1.mp4": 3000}) as online.hub:
        process = online.start("download", "nemo_assets", "--for", "prep")
        deadline = time.monotonic() + 60
        while len(list(folder.rglob("*.incomplete"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - started < 10
        assert process.returncode == 130
        assert err.splitlines()[-1].startswith("error: interrupted; the same command resumes")
        assert "Traceback" not in err
        assert not {"0.mp4", "1.mp4"} & {path.name for path in folder.glob("videos/*")}
        online.hub.slow = {}
        online("download", "nemo_assets", "--for", "prep")
    assert (folder / "videos" / "1.mp4").read_bytes() == repos[DATA]["1.mp4"]


def test_whole_files_in_the_hub_cache_are_linked_but_damaged_ones_not(online, repos):
    for name in ("model.pt", "config.json"):
        fetch = f"import huggingface_hub as h; h.hf_hub_download({MODEL[1]!r}, {name!r})"
        with serve(repos) as online.hub:
            subprocess.run([sys.executable, "-c", fetch], env=online.environment(), check=True)
    cached = next(online.cwd.glob("hf/hub/models--*/snapshots/*"))
    damaged = (cached / "config.json").resolve()
    damaged.write_bytes(b"[]")
    folder = online.cwd / "checkpoints" / "Cosmos-Predict1-7B-Text2World"
    with serve(repos) as online.hub:
        online("download", "nemo_assets", "--for", "train")
        fetched = {p.rpartition("/")[2] for m, p in online.hub.log if m == "GET" and "resolve" in p}
    assert fetched == {"config.json"}
    assert (folder / "model.pt").samefile(cached / "model.pt")
    assert (folder / "config.json").read_bytes() == b"{}"


def test_the_third_party_encoder_loads_in_transformers(online, repos):
    with serve(repos) as online.hub:
        online("download", "nemo_assets", "--for", "prep")
        folder = online.cwd / "checkpoints" / "google-t5" / "t5-11b"
        loaded = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], t.float()) for name, t in t5_weights().items())


def test_googles_t5_file_is_converted_once_and_loads_in_transformers(online, repos):
    torch.manual_seed(1)
    model = T5EncoderModel(T5)
    # Some writers leave parameters, and what is not the encoder's.
    weights = {**model.state_dict(), "lm_head.weight": torch.zeros(9)}
    weights["shared.weight"] = torch.nn.Parameter(weights["shared.weight"])
    repos[TEXT]["pytorch_model.bin"] = old_format(weights)
    words = ("download", "nemo_assets", "--for", "prep", "--set")
    official = (*words, f"text_encoder_repo={TEXT[1]}")
    folder = online.cwd / "checkpoints" / "google-t5" / "t5-11b"
    with serve(repos) as online.hub:
        online("download", "nemo_assets", "--for", "prep")
        done = online(*official)
        assert f"{folder / 'pytorch_model.bin'} is no longer needed" in done.stderr
        (folder / "pytorch_model.bin").unlink()
        online.hub.log.clear()
        online(*official)
        assert not [path for _, path in online.hub.log if "/resolve/" in path]
        loaded = T5EncoderModel.from_pretrained(folder, dtype=torch.float32).state_dict()
        assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())
        encoder = folder / "model.safetensors"
        whole = encoder.read_bytes()
        assert b"lm_head" not in whole
        encoder.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        online(*official)
    assert encoder.read_bytes() == whole


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (old_format({"shared.weight": Hostile()}), "refused"),
        (old_format({"shared.weight": torch.zeros(32, 16)})[:-9], "ends too early"),
        (old_format({"shared.weight": torch.zeros(16, 32).T}), "not contiguous"),
        (old_format({"shared.weight": torch.zeros(32, 15)}), "has the shape [32, 15]"),
        (save({"shared.weight": torch.zeros(32, 16)}), "nothing in it was run"),
    ],
)
def test_a_bad_t5_file_is_refused_without_running_it(online, repos, content, why):
    repos[TEXT]["pytorch_model.bin"] = content
    words = ("--for", "prep", "--set", f"text_encoder_repo={TEXT[1]}")
    with serve(repos) as online.hub:
        refused = online("download", "nemo_assets", *words, code=4)
    assert why in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(online.cwd.rglob("hostile"))
    assert not list((online.cwd / "checkpoints").rglob("*.safetensors"))


def test_an_encoder_with_wrong_shapes_is_never_moved_into_place(online, repos):
    weights = t5_weights()
    weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"] = torch.zeros(16, 31)
    for file, shape in ((save(weights), "[16, 31]"), (b"no such file", "None")):
        repos[ENCODER][ENCODER_FILE] = file
        with serve(repos) as online.hub:
            refused = online("download", "nemo_assets", "--for", "prep", code=4)
        assert f"has the shape {shape}, T5's encoder has [" in refused.stderr
    assert not list((online.cwd / "checkpoints").rglob("*.safetensors"))


@pytest.mark.parametrize("config", [b"{}", b"[]", b'{"d_model": "x"}'])
def test_settings_that_are_not_those_of_a_t5_are_one_line(online, repos, config):
    repos[TEXT]["config.json"] = config
    with serve(repos) as online.hub:
        refused = online("download", "nemo_assets", "--for", "prep", code=4)
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "config.json: is not the configuration of a T5 encoder: d_model is" in line
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_downloading_five_gigabytes_takes_less_than_300_megabytes(online, repos, tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as stream:
        stream.truncate(5 * 10**9)
    repos[MODEL]["model.pt"] = large
    with serve(repos) as online.hub:
        process = online.start("download", "nemo_assets", "--for", "train")
        peak = 0
        while process.poll() is None:
            status = Path("/proc", str(process.pid), "status").read_text()
            # The line is missing when the process has just ended.
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak = max(peak, int(found[1]) * 1024 if found else 0)
            time.sleep(0.2)
        process.communicate()
    assert process.returncode == 0
    assert 20e6 < peak < 300e6
    weights = online.cwd / "checkpoints/Cosmos-Predict1-7B-Text2World/model.pt"
    assert weights.stat().st_size == 5 * 10**9
