"""The promote and generate commands on the embedded model."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from cosmos_cli import files, hashes, locks, paths
from cosmos_cli.generate.memory import bytes_together
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.generate.video_models import load_denoiser, sample_latents, worth_compiling
from cosmos_cli.model import edm, rgb, sampler, video, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.recipe import loading
from cosmos_cli.spec import COSMOS_14B, MODELS
from tests.helpers.command import QUICK, generate, settings
from tests.helpers.runs import copy_of

pytestmark = pytest.mark.workflow


def digest(result, index=0):
    return hashes.sha256_file(result["artifacts"][index])


def test_a_prompt_becomes_an_mp4_with_sidecar_text_and_contact_sheet(cosmos):
    result = generate(cosmos, "--prompt", "A red [bold]ball[/bold] moves left.")
    (path,) = result["artifacts"]
    info = video.probe(path)
    assert (info.frames, info.fps, info.height, info.width) == (9, 16.0, 64, 96)
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["mp4_sha256"] == hashes.sha256_file(path)
    assert about["seed"] == 1
    assert about["weights"]["sha256"] == hashes.sha256_file(
        paths.EMBEDDED_DIR / "model.safetensors"
    )
    assert about["recipe"]["num_steps"] == 3
    assert path.with_suffix(".txt").read_text() == "A red [bold]ball[/bold] moves left.\n"
    assert path.with_suffix(".jpg").read_bytes()[:2] == b"\xff\xd8"


def test_the_same_seed_gives_the_same_file_alone_or_in_a_batch(cosmos):
    cosmos.cache = os.devnull
    (cosmos.cwd / "batch.jsonl").write_text(
        '{"prompt": "A much longer prompt about a blue star that spins in place."}\n'
        "\n"
        '{"prompt": "A red ball.", "seed": 5}\n'
    )
    batch = generate(cosmos, "--batch", "batch.jsonl", "-o", "batch")
    alone = generate(cosmos, "--prompt", "A red ball.", "--seed", "5", "-o", "alone")
    other = generate(cosmos, "--prompt", "A red ball.", "--seed", "6", "-o", "other")
    assert digest(batch, 1) == digest(alone)
    assert digest(other) != digest(alone)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_video_and_need_no_compiler(cosmos, monkeypatch):
    # torch reads CXX when it is imported.
    cosmos.fresh = True
    # Lossless, because one pixel rounded differently can change how later ones are encoded.
    ask = ["--prompt", "A red ball.", "--set", "video_crf=0"]
    compile_on = [*ask, "--set", "compile=on"]
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cosmos.cwd / "cache"))
    plain, compiled = generate(cosmos, *ask, "-o", "a"), generate(cosmos, *compile_on, "-o", "b")
    assert list((cosmos.cwd / "cache").rglob("*.so"))
    one, two = (video.read_frames(made["artifacts"][0], range(9)) for made in (plain, compiled))
    assert (one.float() - two.float()).abs().mean() < 0.01
    monkeypatch.setenv("CXX", "/nowhere/g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cosmos.cwd / "empty"))
    done = cosmos("generate", *compile_on, "-o", "c", *QUICK)
    (warning,) = (line for line in done.stderr.splitlines() if "is compiled" in line)
    assert "compiler" in warning
    (without,) = cosmos.cwd.glob("c/*.mp4")
    assert hashes.sha256_file(without) == digest(plain)
    noted = [
        json.loads(next(cosmos.cwd.glob(f"{folder}/*.json")).read_text())["compiled"]
        for folder in "abc"
    ]
    assert noted == [False, True, False]


def test_only_a_video_with_enough_work_is_compiled():
    seven = loading.load("nemo_assets", []).recipe
    assert worth_compiling(seven, "cuda")
    assert not worth_compiling(seven, "cpu")
    assert not worth_compiling(seven.model_copy(update={"compile": "off"}), "cuda")
    assert not worth_compiling(seven.model_copy(update={"num_steps": 10}), "cuda")
    assert not worth_compiling(loading.load("tiny", []).recipe, "cuda")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ([], "--prompt"),
        (["--prompt", "  "], "empty"),
        (["--batch", "missing.jsonl"], "missing.jsonl"),
        (["--batch", "bad.jsonl"], "bad.jsonl:2"),
        (["--prompt", "a", "--set", "num_frames=12"], "num_frames"),
        (["--prompt", "a", "--set", "height=705"], "height"),
        (["--prompt", "a", "--prompts", "-"], "--prompts"),
        (["--prompts", "file.txt"], "--prompts"),
        (["--prompt", "a", "--prompt", "b", "-o", "one.mp4"], "one file for 2"),
        (["--prompt", "a", "-o", "one.mov"], ".mov files are not written"),
        (["--prompt", "a", "--lora", "bad.jsonl:nan"], "nan is not a strength"),
        (["--prompt", "a", "-o", "folder.mp4"], "folder.mp4: is a folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(cosmos, arguments, word):
    (cosmos.cwd / "bad.jsonl").write_text('\n{"text": "no prompt"}\n')
    (cosmos.cwd / "folder.mp4").mkdir()
    done = cosmos("generate", *arguments, code=2)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cosmos.cwd / "outputs").exists()


def test_missing_weights_are_exit_code_four(cosmos):
    done = cosmos("generate", "nemo_assets", "--prompt", "a", code=4)
    assert "cosmos download" in done.stderr
    done = cosmos("generate", "--model", "nowhere", "--prompt", "a", code=4)
    assert "nowhere" in done.stderr


def test_a_folder_without_weights_is_named_and_not_read_through(cosmos):
    done = cosmos("generate", "--model", "/", "--prompt", "a", code=4)
    assert "/: holds no model.pt, model.safetensors, transformer" in done.stderr


def test_an_output_that_cannot_be_written_is_exit_code_four(cosmos):
    (cosmos.cwd / "file").write_text("in the way")
    done = cosmos("generate", "--prompt", "a", "-o", "file/videos", *QUICK, code=4)
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_batch_has_only_whole_videos(cosmos):
    lines = [json.dumps({"prompt": "A ball.", "seed": seed}) for seed in range(500)]
    (cosmos.cwd / "batch.jsonl").write_text("\n".join(lines))
    # As a killed process leaves it.
    name = files.temporary_next_to(cosmos.cwd / "a.mp4").name
    (cosmos.cwd / "outputs").mkdir()
    (cosmos.cwd / "outputs" / name.replace(f".{os.getpid()}.", ".99999999.")).touch()
    process = cosmos.start("generate", "--batch", "batch.jsonl", *QUICK)
    deadline = time.monotonic() + 90
    while len(list(cosmos.cwd.glob("outputs/[!.]*.mp4"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    made = list(cosmos.cwd.glob("outputs/[!.]*.mp4"))
    assert len(made) >= 2
    assert all(video.probe(path).frames == 9 for path in made)
    assert not list(cosmos.cwd.glob("outputs/.*"))


def lines(cosmos, name, *entries):
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (cosmos.cwd / name).write_text(text + "\n", encoding="utf-8")
    return name


def test_a_line_of_a_batch_has_its_own_settings_and_only_known_ones(cosmos):
    prompt = {"prompt": "A red ball.", "seed": 5}
    own = {"negative_prompt": "blue", "num_steps": 2, "guidance": 0}
    made = generate(cosmos, "--batch", lines(cosmos, "b.jsonl", prompt, {**prompt, **own}))
    plain, special = (
        json.loads(path.with_suffix(".json").read_text())["recipe"] for path in made["artifacts"]
    )
    assert (plain["num_steps"], plain["guidance"], plain["sampling_seed"]) == (3, 2.0, 5)
    assert {**own, "sampling_seed": 5} == {key: special[key] for key in (*own, "sampling_seed")}
    for wrong, word in [({"steps": 2}, "'steps'"), ({"num_steps": 1}, "num_steps"),
                        ({"guidance": "7"}, "guidance"), ({"seed": -1}, "seed")]:  # fmt: skip
        batch = lines(cosmos, "w.jsonl", prompt, {**prompt, **wrong})
        assert word in cosmos("generate", "--batch", batch, "--dry-run", code=2).stderr


def test_an_existing_video_is_not_generated_again(cosmos):
    batch = lines(cosmos, "b.jsonl", *({"prompt": "A ball.", "seed": seed} for seed in range(6)))
    whole = generate(cosmos, "--batch", batch, "-o", "whole")["artifacts"]
    process = cosmos.start("generate", "--batch", batch, "-o", "cut", *QUICK)
    while not list(cosmos.cwd.glob("cut/[!.]*.mp4")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    left = {path: path.stat().st_mtime_ns for path in cosmos.cwd.glob("cut/[!.]*.mp4")}
    assert 0 < len(left) < 6
    again = generate(cosmos, "--batch", batch, "-o", "cut")["artifacts"]
    assert [path.name for path in again] == [path.name for path in whole]
    assert [hashes.sha256_file(p) for p in again] == [hashes.sha256_file(p) for p in whole]
    assert {path: path.stat().st_mtime_ns for path in left} == left
    assert sorted(p.suffix for p in cosmos.cwd.glob("cut/[!.]*")) == sorted(
        [".mp4", ".json", ".txt", ".jpg"] * 6
    )
    # A damaged video is generated again; --overwrite generates all again.
    again[0].write_bytes(b"damaged")
    assert "not generated again" in cosmos("generate", "--batch", batch, "-o", "cut", *QUICK).stderr
    assert hashes.sha256_file(again[0]) == hashes.sha256_file(whole[0])
    forced = cosmos("generate", "--batch", batch, "-o", "cut", "--overwrite", *QUICK)
    assert "not generated again" not in forced.stderr


@pytest.mark.parametrize("suffix", [".mp4", ".txt", ".json", ".jpg"])
def test_files_of_other_programs_are_not_overwritten(cosmos, suffix):
    other = cosmos.cwd / f"mine{suffix}"
    other.write_text("{}")
    ask = ["--prompt", "A ball.", "-o", "mine.mp4"]
    assert other.name in cosmos("generate", *ask, *QUICK, code=2).stderr
    assert [path.name for path in cosmos.cwd.iterdir()] == [other.name]
    if suffix == ".mp4":
        generate(cosmos, *ask, "--overwrite")
        assert "another video" in cosmos("generate", *ask, "--seed", 9, *QUICK, code=2).stderr


def test_a_batch_in_utf_16_is_read_from_a_file_and_from_standard_input(cosmos):
    path = cosmos.cwd / "b.jsonl"
    path.write_text('{"prompt": "A réd ball."}\r\n', encoding="utf-16")
    cosmos("generate", "--batch", path, *QUICK)
    with path.open("rb") as stream:
        out, _ = cosmos.start("generate", "--prompts", "-", *QUICK, stdin=stream).communicate()
    assert json.loads(out)["prompt"] == "A réd ball."
    # The second found the video of the first.
    assert len(list(cosmos.cwd.rglob("*.mp4"))) == 1


def test_prompts_from_standard_input_become_videos_as_they_come(cosmos):
    process = cosmos.start("generate", "--prompts", "-", *QUICK, stdin=subprocess.PIPE)

    def answer(line):
        process.stdin.write(line + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    first = answer("A red ball moves left.")
    assert first["status"] == "ok"
    # The video exists while the command still waits for input.
    digest = hashes.sha256_file(Path(first["path"]))
    assert process.poll() is None
    assert answer('{"prompt": "红色的球向左移动。", "seed": 4}')["seed"] == 4
    refused = [answer('{"prompt": ""}'), answer('{"text": 1}'), answer("x" * 100_000)]
    assert [line["exit_code"] for line in refused] == [2, 2, 2]
    assert answer("A red ball moves left.")["path"] == first["path"]
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert "not generated again" in err
    assert "Traceback" not in err
    alone = generate(cosmos, "--prompt", "A red ball moves left.", "-o", "alone")
    assert hashes.sha256_file(alone["artifacts"][0]) == digest


def test_networks_together_or_in_turn_make_the_same_files(cosmos):
    cosmos.cache = os.devnull
    prompts = [{"prompt": "A red ball."}, {"prompt": "A nude statue."}, {"prompt": "A blue box."}]
    batch = lines(cosmos, "b.jsonl", *prompts)
    ask = ["generate", "--batch", batch, *QUICK]
    assert "networks, one at a time" in cosmos(*ask, "-o", "turn", code=8).stderr
    together = cosmos(*ask, "--set", "memory=together", "-o", "together", code=8).stderr
    assert together.count("loading denoiser") == together.count("networks, all in memory") == 1
    ask = ["generate", "--prompts", "-", "--set", "memory=in_turn", "-o", "stream", *QUICK]
    stream = cosmos(*ask, stdin="\n".join(map(json.dumps, prompts)), code=8)
    assert [json.loads(line)["exit_code"] for line in stream.stdout.splitlines()] == [0, 8, 0]
    assert stream.stderr.count("loading denoiser") == 2
    made = sorted(path.name for path in cosmos.cwd.glob("turn/*.mp4"))
    assert len(made) == 2
    for name in made:
        copies = (cosmos.cwd / folder / name for folder in ("turn", "together", "stream"))
        assert len({hashes.sha256_file(file) for file in copies}) == 1


def test_memory_of_all_networks_is_their_files_plus_one_pass(tmp_path):
    settings = [f"checkpoints_dir={tmp_path}", f"upsampler={tmp_path / 'chat'}", "height=704"]
    seven = loading.load("nemo_assets", settings).recipe
    t5, guard = tmp_path / paths.TEXT_ENCODER_DIR, tmp_path / paths.LLAMA_GUARD_DIR
    sizes = {
        t5 / "model.safetensors": 9.8e9,
        t5 / "pytorch_model.bin": 45e9,  # Google's, of which the other was made.
        tmp_path / "chat" / "model.pt": 24.5e9,
        guard / "model-00001-of-00002.safetensors": 9.9e9,
        guard / "model-00002-of-00002.safetensors": 3.5e9,
    }
    for path, size in sizes.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as sparse:
            sparse.truncate(int(size))
    denoiser = 2 * 7_236_192_384 + 2 * 16 * 56_320 * 4096
    assert bytes_together(seven) == pytest.approx(denoiser + 9.8e9 + 24.5e9 + 13.4e9, rel=1e-6)
    off = seven.model_copy(update={"guardrails": "off", "upsampler": "off"})
    assert bytes_together(off) == pytest.approx(denoiser + 9.8e9, rel=1e-6)


def test_the_14b_is_loaded_and_sampled_with_its_own_spec(tmp_path, monkeypatch):
    with torch.device("meta"):
        whole = DiT(COSMOS_14B.dit)
    assert sum(p.numel() for p in whole.parameters()) == COSMOS_14B.dit.parameters
    small = replace(COSMOS_14B.dit, width=64, blocks=3, heads=2, text_channels=32, adaln_rank=8)
    text = replace(COSMOS_14B.text, channels=32, tokens=8)
    small_size = ["num_frames=9", "height=64", "width=96", "num_steps=4"]
    generator = torch.Generator().manual_seed(0)
    state = {f"net.{name}": tensor for name, tensor in DiT(small).state_dict().items()}
    for weight in state.values():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    weights.save_dit(tmp_path / "model.pt", state, "pt")
    words = torch.randn(8, 32, generator=generator)
    made = []
    for dit in (small, replace(small, rope_ratio=(2.0, 1.0, 1.0))):
        monkeypatch.setitem(MODELS, COSMOS_14B.name, replace(COSMOS_14B, dit=dit, text=text))
        r = loading.load("nemo_assets", [f"model={COSMOS_14B.name}", *small_size]).recipe
        loaded = load_denoiser(r, tmp_path / "model.pt", "cpu")
        with torch.inference_mode():
            made.append(sample_latents(r, loaded, [Conditioning("", words, 0 * words)], [1], "14B"))
    assert made[0].shape == (1, 16, 2, 8, 12)
    assert made[0].isfinite().all()
    assert (made[0] - made[1]).abs().max() > 0.01


def test_a_malformed_line_does_not_stop_the_others(cosmos):
    text = '\ufeff{"prompt": "A ball."}\r\nA ball.\n{"prompt": 3}\n'
    (cosmos.cwd / "b.jsonl").write_text(text, encoding="utf-8")
    done = generate(cosmos, "--batch", "b.jsonl", code=2)
    assert len(done["artifacts"]) == 1
    errors = [video["error"] for video in done["videos"] if "error" in video]
    assert [error.partition(": ")[0] for error in errors] == ["b.jsonl:2", "b.jsonl:3"]


def test_a_bad_prompt_of_a_batch_does_not_stop_the_others(cosmos):
    codes = {
        " ": 2,
        "A ball. " * 2000: 0,
        "红色的球向左移动。": 0,
        "A nude statue.": 8,
        "x" * 10**7: 2,
        **{f"{i} balls.": 0 for i in range(15)},
    }
    batch = lines(cosmos, "b.jsonl", *({"prompt": prompt} for prompt in codes))
    done = generate(cosmos, "--batch", batch, code=8)
    assert {video["prompt"]: video["exit_code"] for video in done["videos"]} == codes
    assert [video.probe(path).frames for path in done["artifacts"]] == [9] * 17
    assert len(done["error"].splitlines()) == 3


def test_two_processes_make_the_same_videos_as_one(cosmos):
    cosmos.cache = os.devnull
    prompts = ({"prompt": "A red ball.", "seed": seed} for seed in (1, 2, 3))
    batch = lines(cosmos, "b.jsonl", *prompts, {"prompt": "A nude statue."})
    one = generate(cosmos, "--batch", batch, "-o", "one", code=8)
    two = generate(cosmos, "--batch", batch, "-o", "two", "--num-processes", "2", code=8)
    names = sorted(path.name for path in one["artifacts"])
    assert sorted(path.name for path in two["artifacts"]) == names
    assert len(names) == 3
    for name in names:
        copies = (cosmos.cwd / folder / name for folder in ("one", "two"))
        assert len({hashes.sha256_file(file) for file in copies}) == 1
    assert "nude" in two["error"]
    assert not list(cosmos.cwd.glob("two/.*"))


AGAINST = ["--prompt", "A red ball.", "--set", "negative_prompt=a blue box"]


def test_a_negative_prompt_changes_the_video(cosmos):
    one = generate(cosmos, *AGAINST, "-o", "one")
    assert digest(one) != digest(generate(cosmos, *AGAINST[:2], "-o", "other"))


# In CI two processes share the guidance of a video with a LoRA, in workflows/test_lora.py.
@pytest.mark.slow
def test_two_processes_share_the_guidance_of_one_video(cosmos):
    cosmos.cache = os.devnull
    one = generate(cosmos, *AGAINST, "-o", "one")
    two = generate(cosmos, *AGAINST, "-o", "two", "--num-processes", "2")
    assert digest(one) == digest(two)


def test_a_fast_video_is_the_same_alone_in_a_batch_and_by_two_processes(cosmos):
    cosmos.cache = os.devnull
    fast = [*settings("guidance=2", "speed=fast"), "--json"]
    asked = lines(cosmos, "b.jsonl", {"prompt": "A blue box."}, {"prompt": "A red ball."})
    runs = [("--batch", asked), ("--prompt", "A red ball.", "--num-processes", "2")]
    made = [cosmos("generate", *ask, "-o", str(i), *fast) for i, ask in enumerate(runs)]
    both = [Path(cosmos.cwd, json.loads(run.stdout)["artifacts"][-1]) for run in made]
    assert both[0].read_bytes() == both[1].read_bytes()
    about = json.loads(both[0].with_suffix(".json").read_text())
    assert about["passes"]["exact"] == 70
    assert f"took {about['passes']['evaluated']} passes" in made[0].stderr


def test_compare_exact_makes_both_and_tells_the_difference(cosmos):
    ask = ["generate", "--prompt", "A ball.", *settings("guidance=0", "speed=fast")]
    done = cosmos(*ask, "--compare", "exact", "--json")
    exact, fast, both = (Path(cosmos.cwd, path) for path in json.loads(done.stdout)["artifacts"])
    assert [json.loads(path.with_suffix(".json").read_text())["recipe"]["speed"]
            for path in (exact, fast)] == ["exact", "fast"]  # fmt: skip
    found = json.loads(both.with_suffix(".json").read_text())["difference"]
    frames = [video.read_frames(path, range(9)) for path in (exact, fast)]
    assert found["psnr_db"] == pytest.approx(rgb.psnr(*frames), abs=0.01)
    assert 0 < found["latent_distance"] < 1
    words = f"PSNR {found['psnr_db']:.1f} dB"
    assert words in both.with_suffix(".html").read_text()
    again = cosmos(*ask, "--compare", "exact").stderr
    assert words in again
    assert again.count("not generated again") == 3
    refused = cosmos(*ask[:-2], "--compare", "exact", "--dry-run", code=2).stderr
    assert "`--set speed=fast`" in refused


def test_compare_exact_shows_what_fp8_changes(cosmos):
    ask = ["generate", "--prompt", "A ball.", *settings("guidance=0", "sampling_precision=fp8")]
    exact, fp8, both = json.loads(cosmos(*ask, "--compare", "exact", "--json").stdout)["artifacts"]
    about = [json.loads((cosmos.cwd / path).with_suffix(".json").read_text())
             for path in (exact, fp8, both)]  # fmt: skip
    assert [one["fp8"] for one in about[:2]] == [[], ["linears", "attention"]]
    assert 0 < about[2]["difference"]["latent_distance"] < 1
    alone = json.loads(cosmos(*ask, "-o", "alone.mp4", "--json").stdout)["artifacts"][0]
    assert Path(cosmos.cwd, alone).read_bytes() == Path(cosmos.cwd, fp8).read_bytes()


def test_two_commands_cannot_write_the_same_file(cosmos):
    with locks.held(cosmos.cwd / ".one.lock", "cosmos generate"):
        refused = cosmos("generate", "--prompt", "A ball.", *settings(), "-o", "one.mp4", code=2)
    assert "one.mp4: another `cosmos generate` is writing it" in refused.stderr
    assert not (cosmos.cwd / "one.mp4").exists()
    cosmos("generate", "--prompt", "", *settings(), "-o", "new/one.mp4", code=2)
    assert not (cosmos.cwd / "new").exists()


def test_a_dry_run_reads_standard_input(cosmos):
    ask = ("generate", "--prompts", "-", "--dry-run", *settings(), "--json")
    found = json.loads(cosmos(*ask, stdin="A ball.\nA cube.\n").stdout)
    assert [one["prompt"] for one in found["videos"]] == ["A ball.", "A cube."]
    assert cosmos(*ask, stdin="A ball.\n{bad\n", code=2)


def test_several_processes_end_together(cosmos):
    batch = lines(cosmos, "b.jsonl", *({"prompt": "A ball.", "seed": i} for i in range(200)))
    process = cosmos.start("generate", "--batch", batch, "--num-processes", "2", *QUICK)
    while len(list(cosmos.cwd.glob("outputs/[!.]*.mp4"))) < 2 and process.poll() is None:
        time.sleep(0.05)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) >= 3
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    assert not list(cosmos.cwd.glob("outputs/.*"))


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Return a folder with a finished run of two steps."""
    cosmos = copy_of(prepared, tmp_path_factory.mktemp("trained"))
    cosmos.ranks(1, "train", "tiny", *RUN)
    return cosmos


RUN = settings(
    "max_steps=2", "global_batch_size=2", "learning_rate=1e-2", "warmup_steps=0",
    "lr_start_factor=1", "min_free_disk_gb=0.1",
)  # fmt: skip


def test_promote_describes_the_model_and_generate_finds_it(trained):
    promoted = trained.json("promote", "tiny", *RUN)
    folder = trained.cwd / "checkpoints" / "Cosmos-Tiny-Text2World_post-trained"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert promoted["step"] == manifest["step"] == 2
    assert manifest["weights"] == "ema"
    assert manifest["sha256"] == hashes.sha256_file(folder / "model.pt")
    assert manifest["base"]["sha256"]
    assert min(manifest["relative_change"].values()) > 0
    assert "# Cosmos-Tiny-Text2World, post-trained as tiny" in (folder / "README.md").read_text()

    state = weights.load_dit_state(folder / "model.pt")
    (saved,) = trained.cwd.glob("outputs/*/*/*/checkpoints/iter_000000002_ema_model.pt")
    assert all(torch.equal(v, state[k]) for k, v in weights.load_dit_state(saved).items())

    result = trained.json("generate", "--prompt", "A square.", "--set", "num_steps=2")
    about = json.loads((trained.cwd / result["artifacts"][0]).with_suffix(".json").read_text())
    assert about["weights"]["sha256"] == manifest["sha256"]
    assert about["recipe"]["num_frames"] == 9

    base = trained.json(
        "generate", "--model", "base", "--prompt", "A square.", "-o", "base", *QUICK
    )
    assert json.loads((trained.cwd / base["artifacts"][0]).with_suffix(".json").read_text())[
        "weights"
    ]["path"].endswith("model.safetensors")


def test_compare_shows_base_and_promoted_side_by_side(trained):
    trained("promote", "tiny", *RUN)
    ask = ["generate", "--compare", "--prompt", "A ball.", "--set", "num_steps=2", "-o", "both"]
    done = trained.json(*ask)
    base, tuned, both = map(Path, done["artifacts"])
    info = video.probe(both)
    assert (info.frames, info.width) == (9, 2 * 96)
    label = info.height - 64
    frames, left, right = (
        video.read_frames(path, range(9)).float() for path in (both, base, tuned)
    )
    for place, alone in ((frames[..., :96], left), (frames[..., 96:], right)):
        assert (place[:, :, label:] - alone).abs().mean() < 4
        assert place[:, :, :label].max() > 200
    about = json.loads(both.with_suffix(".json").read_text())["compared"]
    assert {side["seed"] for side in about.values()} == {1}
    digests = [side["weights"]["sha256"] for side in about.values()]
    assert len(set(digests)) == 2
    page = both.with_suffix(".html").read_text()
    assert all(digest in page for digest in digests)
    assert page.count("data:video/mp4;base64,") == 2
    assert "http" not in page
    again = trained(*ask).stderr
    assert "not generated again" in again
    assert f"base: {base}" in again
    assert "--compare" in trained(*ask, "--model", "base", code=2).stderr


def test_a_promoted_model_that_changed_is_refused(trained):
    model = trained.cwd / "checkpoints" / "Cosmos-Tiny-Text2World_post-trained" / "model.pt"
    whole = model.read_bytes()
    try:
        model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused = trained("generate", "--prompt", "A square.", code=4)
    finally:
        model.write_bytes(whole)
    assert "is damaged" in refused.stderr
    assert "cosmos promote" in refused.stderr


def test_promote_lists_the_saved_steps(trained):
    assert (
        "use `--step 2`; saved: 2" in trained("promote", "tiny", "--step", "7", *RUN, code=4).stderr
    )
    assert "latest" in trained("promote", "tiny", "--step", "last", *RUN, code=2).stderr
    other = trained("promote", "tiny", *RUN, "--set", "name=never", code=4)
    assert "cosmos train" in other.stderr


def test_promote_refuses_weights_that_do_not_differ_from_the_base(trained):
    (saved,) = trained.cwd.glob("outputs/*/*/*/checkpoints/iter_000000002_reg_model.pt")
    whole = saved.read_bytes()
    try:
        base = weights.load_dit_state(paths.EMBEDDED_DIR / "model.safetensors")
        weights.save_dit(saved, base, "pt")
        refused = trained("promote", "tiny", "--weights", "reg", *RUN, code=4)
        assert "does not differ" in refused.stderr
        saved.write_bytes(whole[: len(whole) // 2])
        refused = trained("promote", "tiny", "--weights", "reg", *RUN, code=4)
        assert saved.name in refused.stderr
        assert "Traceback" not in refused.stderr
    finally:
        saved.write_bytes(whole)


def test_sampling_follows_the_guided_estimate_of_both_prompts():
    r = loading.load("tiny", ["num_steps=3", "guidance=2"]).recipe
    net = load_denoiser(r, paths.model_files(r.spec, r.checkpoints_dir).dit, "cpu")
    generator = torch.Generator().manual_seed(0)
    shape = 2, r.spec.text.tokens, r.spec.text.channels
    cond, uncond = torch.randn(shape, generator=generator)
    fps_B = torch.tensor([r.fps])

    def denoise(xt, sigma_B):
        of = [
            edm.denoise(net, xt, sigma_B, text[None], fps_B, r.spec.sigma_data)
            for text in (cond, uncond)
        ]
        return of[0] + 2 * (of[0] - of[1])

    noise = sampler.start_noise(5, (1, *r.latent_shape))
    with torch.inference_mode():
        expected = sampler.sample(denoise, noise, r, lambda _: None)
        made = sample_latents(r, net, [Conditioning("", cond, uncond)], [5], "test")
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
