import argparse
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cosmos_cli import files, hashes, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import edm, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tensor_names import RELEASED, State, rename
from cosmos_cli.model.tokenizer import Tokenizer
from cosmos_cli.spec import TINY, DiTSpec, ModelSpec, TokenizerSpec

SPEC = ModelSpec(
    name="small", dit=DiTSpec(width=32, blocks=2, heads=2, text_channels=8, adaln_rank=4, max_t=8)
)
TOKENIZER = TokenizerSpec(channels=4, latent_channels=4)


def denoiser() -> edm.EDMLoss:
    module = edm.EDMLoss(DiT(SPEC.dit), SPEC)
    for i, parameter in enumerate(module.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(i))
    return module


def tokenizer_state() -> State:
    tok = Tokenizer(TOKENIZER)
    return {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, value) in enumerate(tok.state_dict().items())
    }


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A folder with encoder.jit, decoder.jit and mean_std.pt as released, and its weights."""
    folder = tmp_path_factory.mktemp("archives")
    state = {name: value.bfloat16() for name, value in tokenizer_state().items()}
    tok = Tokenizer(TOKENIZER).bfloat16().requires_grad_(False)
    tok.load_state_dict(state)
    for part in (tok.encoder, tok.decoder):
        part.patcher3d = nn.Module()
        part.patcher3d.register_buffer("wavelets", torch.tensor([0.70710678, 0.70710678]))
        part.patcher3d.register_buffer("_arange", torch.arange(2))
        part.patcher3d.register_buffer("patch_size_buffer", torch.tensor([4], dtype=torch.int32))
    encoder = nn.Sequential(OrderedDict(encoder=tok.encoder, quant_conv=tok.quant_conv))
    decoder = nn.Sequential(OrderedDict(post_quant_conv=tok.post_quant_conv, decoder=tok.decoder))
    for part, name, size in (
        (encoder, "encoder.jit", (1, 3, 1, 8, 8)),
        (decoder, "decoder.jit", (1, 4, 1, 1, 1)),
    ):
        example = torch.zeros(size, dtype=torch.bfloat16)
        with warnings.catch_warnings(action="ignore"):
            torch.jit.save(torch.jit.trace(part, example, check_trace=False), folder / name)
    mean, std = (state[name].float() for name in ("mean", "std"))
    torch.save((mean.flatten(), std.flatten()), folder / "mean_std.pt")
    return folder, state | {"mean": mean, "std": std}


@pytest.fixture
def released(archives: tuple[Path, State], tmp_path: Path) -> Path:
    """A copy of that folder to spoil."""
    return Path(shutil.copytree(archives[0], tmp_path / "tokenizer"))


def refusal(load, *arguments) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as caught:
        load(*arguments)
    assert caught.value.code == ExitCode.ASSET
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


# --- formats of the denoiser ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["pt", "safetensors"])
def test_saved_denoiser_loads_unchanged(tmp_path, format, dtype):
    state = denoiser().to(dtype).state_dict()
    path = tmp_path / f"model.{format}"
    weights.save_dit(path, state, format)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert_same(weights.load_dit_state(path), state)


def test_formats_convert_into_one_another(tmp_path):
    state = denoiser().state_dict()
    weights.save_dit(tmp_path / "a.safetensors", state, "safetensors")
    weights.save_dit(tmp_path / "b.pt", weights.load_dit_state(tmp_path / "a.safetensors"), "pt")
    weights.save_diffusers(tmp_path / "c", weights.load_dit_state(tmp_path / "b.pt"), SPEC.dit)
    net = {name: value for name, value in state.items() if name.startswith("net.")}
    assert_same(weights.load_dit_state(tmp_path / "c"), net)
    size = sum(value.nbytes for value in state.values())
    assert (tmp_path / "b.pt").stat().st_size < 1.5 * size


def test_pt_file_is_the_flat_dict_of_the_reference(tmp_path):
    path = tmp_path / "model.pt"
    weights.save_dit(path, denoiser().bfloat16().state_dict(), "pt")
    content = torch.load(path, weights_only=True)
    keys = (Path(__file__).parent / "data" / "dit_7b_keys.txt").read_text().splitlines()
    blocks = ("net.blocks.block0.", "net.blocks.block1.")
    expected = {key.split()[0] for key in keys}
    expected = {k for k in expected if not k.startswith("net.blocks.") or k.startswith(blocks)}
    assert content.keys() == expected
    assert content["net.pos_embedder.seq"].tolist() == list(range(120))


def test_file_of_the_reference_training_loads(tmp_path):
    path = tmp_path / "iter_000000200_reg_model.pt"
    state = denoiser().state_dict()
    weights.save_dit(path, state, "pt")
    content = torch.load(path, weights_only=True)
    for block in range(2):
        for attention in range(2):
            name = f"net.blocks.block{block}.blocks.{attention}.block.attn.attn_op._extra_state"
            content[name] = io.BytesIO()
            torch.save(None, content[name])
    torch.save(content, path)
    assert_same(weights.load_dit_state(path), state)


def test_sharded_diffusers_folder_loads(tmp_path):
    state = {k: v for k, v in denoiser().state_dict().items() if k.startswith("net.")}
    weights.save_diffusers(tmp_path, state, SPEC.dit)
    single = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = list(load_file(single).items())
    single.unlink()
    parts = {"one.safetensors": dict(tensors[::2]), "two.safetensors": dict(tensors[1::2])}
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    (tmp_path / f"{single.name}.index.json").write_text(json.dumps(index))
    assert_same(weights.load_dit_state(tmp_path), state)


# As trainers and wrappers write the state dict of the reference.
CHECKPOINTS = {
    "model": lambda released: {"model": released, "optimizer": {"state": {}}, "iteration": 3},
    "state_dict": lambda released: {"epoch": 1, "state_dict": released},
    "ema": lambda released: {"ema": {k.replace(".", "-"): v for k, v in released.items()}},
    "nested": lambda released: {"module": {"model": released}},
    "ddp": lambda released: {f"module.{key}": v for key, v in released.items()},
    "compiled": lambda released: {
        k.replace("net.", "net._orig_mod."): v for k, v in released.items()
    },
    "inner": lambda released: {
        k.replace("net.", "net.module._orig_mod."): v for k, v in released.items()
    },
    "lightning": lambda released: {"state_dict": {f"model.{k}": v for k, v in released.items()}},
    "without net": lambda released: {k.removeprefix("net."): v for k, v in released.items()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoint_of_another_trainer_loads(tmp_path, kind):
    path, state = tmp_path / "model.pt", denoiser().state_dict()
    weights.save_dit(path, state, "pt")
    torch.save(CHECKPOINTS[kind](torch.load(path, weights_only=True)), path)
    assert_same(weights.load_dit_state(path), state)


@pytest.mark.parametrize("prefix", ["", "net.", "model.diffusion_model.net."])
def test_released_names_in_safetensors_load(tmp_path, prefix):
    state = denoiser().state_dict()
    released = rename(state, RELEASED, tmp_path) | {"net.pos_embedder.seq": torch.arange(8)}
    path = tmp_path / "model.safetensors"
    save_file({prefix + k.removeprefix("net."): v for k, v in released.items()}, path)
    assert_same(weights.load_dit_state(path), state)


def test_variants_of_a_diffusers_folder_and_others_shards_load(tmp_path):
    state = {k: v for k, v in denoiser().state_dict().items() if k.startswith("net.")}
    weights.save_diffusers(tmp_path, state, SPEC.dit)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    assert_same(weights.load_dit_state(tmp_path), state)
    half = {key: value.half() for key, value in tensors.items()}
    save_file(half, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    expected = {key: value.half() for key, value in state.items()}
    assert_same(weights.load_dit_state(tmp_path), expected)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").rename(tmp_path / "part.safetensors")
    index = {"weight_map": dict.fromkeys(half, "part.safetensors")}
    index_file = tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index_file.write_text(json.dumps(index))
    assert_same(weights.load_dit_state(tmp_path), expected)
    for path in tmp_path.glob("diffusion_pytorch_model*"):
        path.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(weights.load_dit_state(tmp_path), expected)


def test_base_may_be_a_folder_in_any_format(tmp_path):
    weights.save_diffusers(tmp_path / "transformer", {}, SPEC.dit)
    assert paths.model_files(TINY, "", str(tmp_path)).dit == tmp_path / "transformer"


def test_two_sets_of_weights_are_named_with_a_command_that_saves_one(tmp_path):
    path, state = tmp_path / "check 'point'.pt", denoiser().state_dict()
    weights.save_dit(path, state, "pt")
    released = torch.load(path, weights_only=True)
    torch.save({"model": {key: v + 1 for key, v in released.items()}, "ema": released}, path)
    message = refusal(weights.load_dit_state, path)
    assert "holds 2 sets of weights: model, ema" in message
    command = message.partition("`")[2].rpartition("`")[0].replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True)
    assert_same(weights.load_dit_state(tmp_path / "check 'point'_ema.pt"), state)


def test_refusals_of_our_own_model_do_not_speak_of_another(tmp_path):
    state, path = denoiser().state_dict(), tmp_path / "model.safetensors"
    save_file({**state, "extra": torch.zeros(1)}, path)
    assert "1 unknown (extra); save the file again" in refusal(weights.load_dit_state, path)
    part = dict(list(state.items())[:9])
    assert "incomplete" in refusal(weights.load_strict, denoiser(), part, path)
    save_file({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1)}, path)
    assert "is a LoRA" in refusal(weights.load_dit_state, path)
    save_file(state | {"module.net.t_norm.weight": torch.zeros(32)}, path)
    assert "are the same tensor" in refusal(weights.load_dit_state, path)
    torch.save({"args": argparse.Namespace(), "model": {}}, tmp_path / "model.pt")
    assert "argparse.Namespace" in refusal(weights.load_dit_state, tmp_path / "model.pt")


def test_state_from_disk_is_mapped_and_not_read(tmp_path):
    weights.save_dit(tmp_path / "model.pt", denoiser().state_dict(), "pt")
    state = weights.load_dit_state(tmp_path / "model.pt")
    pages = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "model.pt") in pages
    del state


# --- the tokenizer --------------------------------------------------------------------------------


def test_saved_tokenizer_loads_unchanged(tmp_path):
    state = tokenizer_state()
    weights.write_safetensors(tmp_path / "tokenizer.safetensors", state)
    assert_same(weights.load_tokenizer_state(tmp_path / "tokenizer.safetensors"), state)
    assert_same(weights.load_tokenizer_state(tmp_path), state)


def test_released_tokenizer_loads_from_its_torchscript_archives(archives):
    folder, expected = archives
    state = weights.load_tokenizer_state(folder)
    assert_same(state, expected)
    weights.load_strict(Tokenizer(TOKENIZER), state, folder)


@pytest.mark.parametrize("missing", ["encoder.jit", "decoder.jit", "mean_std.pt"])
def test_tokenizer_with_a_file_missing_is_refused(released, missing):
    (released / missing).unlink()
    assert f"{missing}: does not exist" in refusal(weights.load_tokenizer_state, released)


def test_mean_std_of_another_size_is_refused(released):
    torch.save((torch.zeros(60), torch.zeros(60)), released / "mean_std.pt")
    state = weights.load_tokenizer_state(released)
    message = refusal(weights.load_strict, Tokenizer(TOKENIZER), state, released)
    assert "mean is (4, 15) instead of (4, 16)" in message
    torch.save(torch.zeros(3), released / "mean_std.pt")
    assert "mean_std.pt: is damaged" in refusal(weights.load_tokenizer_state, released)


# --- into a module --------------------------------------------------------------------------------


def test_load_strict_copies_in_the_dtype_of_the_module(tmp_path):
    source, target = denoiser(), edm.EDMLoss(DiT(SPEC.dit), SPEC).bfloat16()
    weights.load_strict(target, source.state_dict(), tmp_path)
    assert_same(target.state_dict(), source.bfloat16().state_dict())


def test_load_strict_names_what_does_not_fit_and_changes_nothing():
    module = denoiser()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    for block in range(2):
        for name in ("q", "k", "v"):
            del state[f"net.blocks.{block}.self_attn.{name}.weight"]
    state["net.lora.weight"] = torch.zeros(1)
    state["net.final.linear.weight"] = torch.zeros(2, 3)
    message = refusal(weights.load_strict, module, state, Path("x/model.pt"))
    assert message.startswith("x/model.pt: does not fit")
    assert "6 missing (net.blocks.0.self_attn.q.weight, " in message
    assert "1 unknown (net.lora.weight)" in message
    assert "net.final.linear.weight is (2, 3) instead of (64, 32)" in message
    assert_same(module.state_dict(), before)


# Ends as abruptly as by SIGKILL, and surely in the middle of a file.
DYING = """
import os, resource, signal, sys, torch
from pathlib import Path
from cosmos_cli.model import lora_files, weights
from cosmos_cli.model.tensor_names import State
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
stem = "net.blocks.0.mlp.up"
if os.fork():
    os.wait()
    factors = {f"{stem}.lora_{side}.weight": torch.zeros(4, 9999) for side in "AB"}
    lora_files.save_lora(Path("lora.safetensors"), factors, 1.0)
weights.write_safetensors(Path("m.safetensors"), {"w": torch.zeros(99_999)})
"""


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    done = subprocess.run([sys.executable, "-c", DYING], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGXFSZ
    # Each process leaves a file under our temporary name and one under that of safetensors.
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    files.remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_file_of_another_model_is_refused(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "model.pt")
    assert "2 unknown (weight, bias)" in refusal(weights.load_dit_state, tmp_path / "model.pt")
    save_file({"weight": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert "1 unknown (weight)" in refusal(weights.load_dit_state, tmp_path / "m.safetensors")


def test_another_model_that_we_know_is_named(tmp_path):
    state = weights.load_dit_state(paths.EMBEDDED_DIR / "model.safetensors")
    message = refusal(weights.load_strict, denoiser(), state, tmp_path / "model.pt")
    assert f"it has the shapes of {TINY.name}; use a recipe whose model is {TINY.name}" in message


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "model.pt"
    assert f"{path}: does not exist" in refusal(weights.load_dit_state, path)


@pytest.mark.parametrize(
    "content", [{"a": 1}, [1, 2], 3, {3: torch.zeros(1)}, {"net.t_norm.weight": "text"}]
)
def test_pt_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    refusal(weights.load_dit_state, tmp_path / "model.pt")


# --- hostile and damaged files --------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_runs_code_is_refused(tmp_path, zipped):
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    content = {"net.t_norm.weight": Hostile(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "nothing in it was run" in refusal(weights.load_dit_state, path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["encoder.jit", "decoder.jit"])
def test_torchscript_archive_that_runs_code_is_refused(released, name):
    mark = released / "mark"
    rewrite(released / name, "data.pkl", pickle.dumps(Hostile(mark), protocol=2))
    assert "nothing in it was run" in refusal(weights.load_tokenizer_state, released)
    assert not mark.exists()


def test_code_in_a_torchscript_archive_is_not_compiled(released):
    rewrite(released / "encoder.jit", "code/*.py", b"no code")
    # In a process of its own: torch keeps the classes that this one has compiled before.
    load = f"import torch; torch.jit.load({str(released / 'encoder.jit')!r})"
    assert (
        b"RuntimeError"
        in subprocess.run([sys.executable, "-c", load], capture_output=True, check=False).stderr
    )
    weights.load_strict(Tokenizer(TOKENIZER), weights.load_tokenizer_state(released), released)


def test_compressed_torchscript_member_is_refused(released):
    rewrite(released / "encoder.jit", "data/0", bytes(10**6), zipfile.ZIP_DEFLATED)
    assert "is damaged" in refusal(weights.load_tokenizer_state, released)


def test_torchscript_archive_in_place_of_weights_is_refused(released):
    assert "is damaged" in refusal(weights.load_dit_state, released / "encoder.jit")


def rewrite(path: Path, member: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """Replaces the members of a zip archive that a pattern names."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, old in members.items():
            chosen = fnmatch(name.split("/", 1)[1], member)
            archive.writestr(name, content if chosen else old)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content cut short, with bytes changed, or with a piece missing or doubled."""
    at, other = sorted(chance.sample(range(len(content)), 2))
    match chance.randrange(4):
        case 0:
            return content[:at]
        case 1:
            changed = bytearray(content)
            # Headers and directories of these formats are at the ends.
            for _ in range(20):
                near = chance.choice((0, max(0, len(content) - 3000)))
                changed[min(len(content) - 1, near + chance.randrange(3000))] = chance.randrange(
                    256
                )
            return bytes(changed)
        case 2:
            return content[:at] + content[other:]
        case _:
            return content[:other] + content[at:]


def load_damaged(folder: Path, count: int) -> int:
    """Loads `count` damaged files of every kind in turn; gives how many were refused."""
    weights.save_dit(folder / "model.pt", denoiser().state_dict(), "pt")
    weights.save_dit(folder / "model.safetensors", denoiser().state_dict(), "safetensors")
    names = ("model.pt", "encoder.jit", "model.safetensors", "mean_std.pt")
    good = {name: (folder / name).read_bytes() for name in names}
    chance, refused = random.Random(0), 0
    for name in (names * count)[:count]:
        path = folder / name
        # Unlinked first: bytes of a mapped file must not change under its tensors.
        path.unlink()
        path.write_bytes(damaged(good[name], chance))
        try:
            if name.startswith("model"):
                weights.load_strict(denoiser(), weights.load_dit_state(path), path)
            else:
                state = weights.load_tokenizer_state(folder)
                weights.load_strict(Tokenizer(TOKENIZER), state, folder)
        except UserError as error:
            assert error.code == ExitCode.ASSET
            assert "\n" not in str(error)
            refused += 1
        path.unlink()
        path.write_bytes(good[name])
    return refused


def test_damaged_files_are_refused_in_one_line(released):
    assert load_damaged(released, 20) >= 15


@pytest.mark.slow
def test_many_damaged_files_are_refused_in_one_line(released):
    assert load_damaged(released, 200) >= 150


def test_the_hashes_of_a_written_file_are_those_of_what_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "PIECE", 10**6)
    path = tmp_path / "a.pt"
    written = weights.write_pt({"small": torch.ones(3), "large": torch.rand(700_000)}, path)
    pieces = [hashes.sha256_piece(path, i) for i in range(3)]
    assert written == (path.stat().st_size, hashes.sha256_file(path), hashes.sha256_pieces(pieces))
