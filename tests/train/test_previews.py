"""A picture that does not fit is left out by all ranks alike, and the training stays the same."""

import contextlib
import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cosmos_cli import paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import device as devices
from cosmos_cli.model import edm
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.paths import Run
from cosmos_cli.recipe import loading
from cosmos_cli.train import launch, previews, process, status
from cosmos_cli.train.previews import Previews
from tests.helpers import forks
from tests.helpers.stand_ins import stand_in_weights

pytestmark = pytest.mark.workflow

PAIRS = (
    "num_frames=9", "height=64", "width=96", "lora_rank=0", "global_batch_size=2",
    "micro_batch_size=1", "log_every_steps=1", "save_every_steps=2", "max_steps=3",
    "min_free_disk_gb=0.1", "preview_every_steps=1", "sample_every_saves=1", "preview_clips=3",
    "preview_share=1", "num_steps=2", "compile=off",
)  # fmt: skip


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_host_memory(*_, **__):
    # Torch's own words for it.
    torch.empty(2**60, dtype=torch.uint8)


def python_memory(*_, **__):
    bytearray(2**62)


def break_move():
    original = Tokenizer.to
    Tokenizer.to = lambda self, *a, **k: no_memory() if a else original(self, *a, **k)


def break_decode():
    Tokenizer.decode = no_memory


def break_decode_on_the_host():
    Tokenizer.decode = no_host_memory


def break_load():
    previews.load_tokenizer = python_memory


def lose_tokenizer():
    files = paths.model_files
    paths.model_files = lambda *a: files(*a).__class__(
        files(*a).dit, Path("/gone/tokenizer"), files(*a).text_encoder, files(*a).guardrail
    )


def break_second_forward():
    """In the middle of a sample, after forward passes that went well."""
    original, calls = edm.denoise, []

    def denoise(net, *inputs):
        calls.append(0)
        return original(net, *inputs) if len(calls) % 3 else no_memory()

    # Training keeps the one that works.
    previews.edm = SimpleNamespace(denoise=denoise)


BREAKS = {
    "move": break_move, "decode": break_decode, "host": break_decode_on_the_host,
    "load": break_load, "forward": break_second_forward, "lost": lose_tokenizer,
    "none": lambda: None,
}  # fmt: skip


def limit_memory(extra):
    """Leaves a GPU no more than some bytes while pictures are made."""
    original = Previews.make

    def make(self, engine, step, asked):
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(engine.device).total_memory
        before = torch.cuda.memory_allocated()
        torch.cuda.set_per_process_memory_fraction(
            min((torch.cuda.memory_reserved() + extra) / total, 1.0)
        )
        try:
            return original(self, engine, step, asked)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            # cuBLAS allocates its workspace of 32 MiB at the first product and keeps it.
            kept = torch.cuda.memory_allocated() - before
            assert kept <= 2**26, f"{kept / 2**20:.0f} MiB were not given back"

    Previews.make = make


def rank_of_a_run(place, broken, victim, pairs):
    """In a process of its own: what a rank said, and the losses of the run."""
    cwd, rank, world, port = place
    os.chdir(cwd)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    loaded = loading.load("tiny", pairs)
    run = Run(loaded.recipe.run_dir)
    if rank == 0:
        launch._prepare(loaded, run)
    device = process.join_world(120)
    if rank in victim:
        BREAKS[broken]() if isinstance(broken, str) else limit_memory(broken)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        process.train_on_dataset(loaded.recipe, device)
    losses = [row["loss"] for row in status.rows(run) if "loss" in row]
    made = sorted(path.name for path in run.samples.glob("*"))
    sys.stderr.write(said.getvalue())
    torch.distributed.destroy_process_group()
    return said.getvalue(), losses, made


def run_ranks(prepared, name, broken, *pairs, world=2, victim=(0, 1), fixed=PAIRS):
    with forks.pool(world) as pool:
        port = 20000 + os.getpid() % 20000 + len(name)
        same = (*fixed, *pairs, f"name={name}", f"num_processes={world}")
        places = [(prepared, rank, world, port) for rank in range(world)]
        ranks = [pool.submit(rank_of_a_run, p, broken, victim, same) for p in places]
        return next(rank.result(timeout=240) for rank in ranks)


@pytest.fixture(scope="module")
def undisturbed(prepared):
    pairs = ("preview_every_steps=0", "sample_every_saves=0")
    return run_ranks(prepared, "undisturbed", "none", *pairs)[1]


@pytest.mark.parametrize(
    ("broken", "victim", "words"),
    [
        ("move", (0,), "CUDA out of memory"),
        pytest.param("decode", (0, 1), "CUDA out of memory", marks=pytest.mark.slow),
        pytest.param("host", (0,), "can't allocate memory", marks=pytest.mark.slow),
        pytest.param("load", (0,), "memory ran out", marks=pytest.mark.slow),
        pytest.param("lost", (0, 1), "/gone/tokenizer", marks=pytest.mark.slow),
    ],
)
def test_pictures_that_cannot_be_decoded_are_skipped_with_a_warning(
    prepared, undisturbed, broken, victim, words
):
    said, losses, made = run_ranks(prepared, f"no_{broken}", broken, victim=victim)
    assert losses == undisturbed
    assert not [name for name in made if name.endswith(("preview.jpg", "sample0.mp4"))]
    warnings = [line for line in said.splitlines() if line.startswith("warning")]
    assert sum("previews are left out" in line for line in warnings) == 1
    assert sum("samples are left out" in line for line in warnings) == 1
    assert all(words in line for line in warnings if "left out" in line)
    assert any("--set preview_every_steps=0" in line for line in warnings)
    assert any("--set sample_every_saves=0" in line for line in warnings)


def test_a_decoding_failure_on_another_rank_is_reported_too(prepared, undisturbed):
    said, losses, made = run_ranks(prepared, "no_other", "decode", victim=(1,))
    assert losses == undisturbed
    assert "samples are left out" in said
    assert "they do not fit the memory of rank 1" in said
    assert "previews are left out" not in said
    # Rank 0 has made its own.
    assert "step_000000000_sample0.mp4" in made
    assert "step_000000000_sample1.mp4" not in made


@pytest.mark.parametrize("victim", [pytest.param((0,), marks=pytest.mark.slow), (1,)])
def test_a_failed_forward_pass_on_one_rank_does_not_hang_the_others(prepared, undisturbed, victim):
    pairs = ("zero_stage=2",)
    said, losses, made = run_ranks(prepared, f"f{victim[0]}", "forward", *pairs, victim=victim)
    assert losses == pytest.approx(undisturbed, rel=1e-4)
    assert not [name for name in made if name.endswith(("jpg", "mp4"))]
    assert "previews are left out" in said
    assert "samples are left out" in said


def test_errors_that_are_not_about_memory_are_not_hidden():
    assert devices.is_out_of_memory(torch.OutOfMemoryError("x"))
    for words in ("CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"):
        assert devices.is_out_of_memory(RuntimeError(words))
    assert devices.is_out_of_memory(OSError(12, "Cannot allocate memory"))
    for error in (RuntimeError("shape"), OSError(28, "No space"), ValueError("out of memory")):
        assert not devices.is_out_of_memory(error)
    missing = []
    with pytest.raises(RuntimeError, match="shape"), previews._spared(missing):
        raise RuntimeError("shape")
    assert not missing


def test_a_missing_tokenizer_is_refused_before_any_process_starts(tmp_path):
    from cosmos_cli.train import preflight

    base = tmp_path / "base.safetensors"
    stand_in_weights(base)
    pairs = [f"checkpoints_dir={tmp_path}", f"base={base}"]
    r = loading.load("nemo_assets", pairs).recipe
    with pytest.raises(UserError, match="tokenizer is missing") as caught:
        preflight.check_recipe(r, 1)
    assert caught.value.code == ExitCode.ASSET
    off = [*pairs, "preview_every_steps=0", "sample_every_saves=0"]
    preflight.check_recipe(loading.load("nemo_assets", off).recipe, 1)


def needs_gpus(count):
    return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("world", "victim"),
    [
        pytest.param(1, (0,), marks=needs_gpus(1)),
        pytest.param(2, (0,), marks=needs_gpus(2)),
        pytest.param(2, (1,), marks=needs_gpus(2)),
    ],
)
def test_training_survives_pictures_at_every_memory_limit(prepared, world, victim):
    """From nothing to spare, where no forward pass fits, to room for all."""
    off = ("preview_every_steps=0", "sample_every_saves=0")
    _, expected, _ = run_ranks(prepared, f"g{world}", "none", *off, world=world)
    left_out = []
    for megabytes in (0, 16, 128, 8192):
        name = f"g{world}_{victim[0]}_{megabytes}"
        said, losses, made = run_ranks(
            prepared, name, megabytes * 2**20, world=world, victim=victim
        )
        assert losses == pytest.approx(expected, rel=2e-2)
        left_out.append("are left out" in said)
        if not left_out[-1]:
            assert "step_000000003_preview.jpg" in made
    print(f"left out at each limit: {left_out}")
    assert left_out[0]
    assert not left_out[-1]
