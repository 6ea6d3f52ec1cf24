"""Read and write weights as released files, our own or diffusers'. No code in a file is run.

In memory the keys are ours: `net.` and, for the log-variance head of training, `logvar.`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cosmos_cli import archives, files, hashes, pickles
from cosmos_cli.errors import asset_error
from cosmos_cli.model.tensor_names import (
    DIFFUSERS,
    OURS,
    RELEASED,
    State,
    another_model,
    check_keys,
    is_denoiser,
    plain,
    rename,
    rename_tokenizer,
    some,
)
from cosmos_cli.spec import DiTSpec

# Keys of a released file that are not weights: positions 0, 1, 2 ... and Transformer Engine's fp8
# state.
_NOT_WEIGHTS = re.compile(r"(?:^|\.)(?:pos_embedder\.seq|_extra_state)$")
_LORA = re.compile(r"\.lora[._](?:A|B|up|down)\b")
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# The files of a folder of diffusers or accelerate, best first. A variant such as fp16 stands before
# the last suffix.
_FOLDER_FILES = tuple(
    f"{stem}{name}"
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    for suffix in (".safetensors", ".bin")
    for name in (f"{suffix}.index.json", suffix, f"{suffix}.index.*.json", f".*{suffix}")
)
# The depth of dicts in which a training checkpoint keeps the weights.
_DEEPEST = 3

# The errors with which torch's zip writer and safetensors report a failed write.
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|I/O error|IoError|os error")

_DAMAGE = (*pickles.DAMAGE, OSError, zipfile.BadZipFile, SafetensorError)


# --- the denoiser ---------------------------------------------------------------------------------


def load_dit_state(path: Path) -> State:
    """Load the denoiser's weights under our keys, memory-mapped where the file allows it.

    Args:
        path: a torch or safetensors file, or a diffusers folder. The names may be released ones,
            ours or those of diffusers, with the prefixes of wrappers. The state dict may lie inside
            a training checkpoint.

    Raises:
        UserError: the file is missing, damaged, of another model, or holds more than tensors.
    """
    if path.is_dir():
        content = _read_diffusers(path)
    elif path.suffix == ".safetensors":
        content = read_safetensors(path)
    else:
        content = _state_dict(path)
    with reading(path):
        state = {k: v for k, v in content.items() if not _NOT_WEIGHTS.search(plain(k))}
        is_lora = any(_LORA.search(key) for key in state)
    if is_lora:
        fix = f"`cosmos generate --model base --lora {shlex.quote(str(path))} --prompt TEXT`"
        raise asset_error(path, "is a LoRA, not a whole model", fix)
    return rename(_check_tensors(state, path), OURS, path)


def _state_dict(path: Path) -> dict[str, Any]:
    """Load a torch file and return its state dict, which a training checkpoint holds in a key.

    Raises:
        UserError: the file is damaged, or several keys hold one.
    """
    content = _read_pt(path)
    with reading(path):
        found = list(_denoisers(content, ())) or [((), dict(content))]
    if len(found) > 1:
        names = [".".join(map(str, place)) for place, _ in found]
        place = "".join(f"[{json.dumps(name)}]" for name in found[-1][0])
        load = f"torch.load({json.dumps(str(path))}, weights_only=True){place}"
        new = json.dumps(str(path.with_name(f"{path.stem}_{names[-1]}.pt")))
        script = f"import torch; torch.save({load}, {new})"
        fix = f"save the one to use: `python -c {shlex.quote(script)}`"
        raise asset_error(path, f"holds {len(found)} sets of weights: {', '.join(names)}", fix)
    return found[0][1]


def _denoisers(content: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield each state dict of a denoiser in nested dicts, with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    if is_denoiser(content):
        yield place, dict(content)
        return
    for key, value in content.items():
        if len(place) < _DEEPEST:
            yield from _denoisers(value, (*place, key))


def save_dit(path: Path, state: Mapping[str, Tensor], format: Literal["pt", "safetensors"]) -> None:
    """Write the denoiser's weights: `pt` is the reference's format, `safetensors` is ours."""
    (save_released if format == "pt" else write_safetensors)(path, state)


def save_released(path: Path, state: Mapping[str, Tensor]) -> Written:
    """Write the denoiser's weights in the reference's format and return the hashes of the file."""
    released = rename(state, RELEASED, path)
    tables = [state[f"net.pos_embedder.{axis}"] for axis in "thw"]
    seq = torch.arange(max(map(len, tables)), dtype=tables[0].dtype)
    with write_errors(path), files.atomic_file(path) as temporary:
        return write_pt({**released, "net.pos_embedder.seq": seq}, temporary)


def save_diffusers(folder: Path, state: Mapping[str, Tensor], spec: DiTSpec) -> None:
    """Write the denoiser as a diffusers model folder, without the log-variance head."""
    net = {key: value for key, value in state.items() if key.startswith("net.")}
    write_safetensors(folder / _DIFFUSERS_FILE, rename(net, DIFFUSERS, folder))
    files.write_json(folder / "config.json", diffusers_config(spec))


def diffusers_config(spec: DiTSpec) -> dict[str, Any]:
    """Return the `config.json` of a denoiser for diffusers."""
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": spec.in_channels,
        "out_channels": spec.latent_channels,
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.head_width,
        "num_layers": spec.blocks,
        "mlp_ratio": float(spec.mlp_ratio),
        "text_embed_dim": spec.text_channels,
        "adaln_lora_dim": spec.adaln_rank,
        "max_size": [spec.max_t, spec.max_hw, spec.max_hw],
        "patch_size": [spec.patch_t, spec.patch_hw, spec.patch_hw],
        "rope_scale": list(spec.rope_ratio),
        "concat_padding_mask": True,
        "extra_pos_embed_type": "learnable",
    }


def load_tensors(path: Path) -> State:
    """Load the tensors of a released `.pt` under their own names, memory-mapped.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors.
    """
    with reading(path):
        content = dict(_read_pt(path))
        content = dict(content.get("model", content))
        state = {key: v for key, v in content.items() if not key.endswith("_extra_state")}
    return _check_tensors(state, path)


# --- the tokenizer --------------------------------------------------------------------------------

TOKENIZER_FILE = "tokenizer.safetensors"

# Constants of the wavelet transform; our code has them in the source.
_WAVELETS = re.compile(r".*\.(wavelets|_arange|patch_size_buffer)")


def load_tokenizer_state(path: Path) -> State:
    """Load the tokenizer's weights with the latent `mean` and `std`.

    Args:
        path: our file or a folder that holds it, the released folder with encoder.jit, decoder.jit
            and mean_std.pt, or a diffusers folder.

    Raises:
        UserError: a file is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        state = read_safetensors(path)
    elif (path / TOKENIZER_FILE).exists():
        state = read_safetensors(path / TOKENIZER_FILE)
    elif (path / "config.json").exists() and not (path / "encoder.jit").exists():
        state = rename_tokenizer(_read_diffusers(path))
        with reading(path / "config.json"):
            config = files.read_json(path / "config.json")
            tables = config["latents_mean"], config["latents_std"]
        state |= _mean_std(tables, state, path / "config.json")
    else:
        parts = [_read_torchscript(path / name) for name in ("encoder.jit", "decoder.jit")]
        state = parts[0] | parts[1]
        tables = _read_pt(path / "mean_std.pt")
        state |= _mean_std(tables, state, path / "mean_std.pt")
        state = {key: value for key, value in state.items() if not _WAVELETS.fullmatch(key)}
    return state


def _mean_std(tables: Any, state: State, where: Path) -> State:
    """Return mean and std as (channels, latent frames), whatever shape they were stored in."""
    channels = len(state.get("quant_conv.conv3d.bias", ()))
    with reading(where):
        mean, std = (torch.as_tensor(table).reshape(channels, -1).clone() for table in tables)
    return {"mean": mean, "std": std}


# --- into a module --------------------------------------------------------------------------------


@torch.no_grad()
def load_strict(module: nn.Module, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy `state` into `module`, one tensor at a time, converting to its dtype and device.

    Raises:
        UserError: names or shapes differ from those of the module.
    """
    own = module.state_dict(keep_vars=True)
    check_keys({name: tensor.shape for name, tensor in own.items()}, state, where)
    for name, tensor in own.items():
        tensor.copy_(state[name])


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any exception from a missing or damaged file into a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise asset_error(path, "does not exist", "run `cosmos download RECIPE`") from error
    except _DAMAGE as error:
        if refused := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            # Loading it might run code, so only the user can decide.
            what = f"holds more than tensors, an object of {refused[1]}; nothing in it was run"
            fix = "save its state dict alone: `torch.save(model.state_dict(), FILE)`"
            raise asset_error(path, what, fix) from error
        kind = type(error).__name__
        what = f"is damaged or holds more than tensors; nothing in it was run ({kind})"
        raise files.bad(path, files.WEIGHTS, what) from error


def _read_pt(path: Path) -> Any:
    # Files of the reference's training hold empty BytesIO objects, left by Transformer Engine.
    safe = torch.serialization.safe_globals([io.BytesIO])
    # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
    mmap = archives.check_torch(path)
    with reading(path), safe, warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


class Written(NamedTuple):
    """A file that was written: its size in bytes, its sha256 and its hash in pieces."""

    bytes: int
    sha256: str
    pieces: str


# Data from this size on is hashed in threads. For less, changing threads takes longer than hashing,
# and each thread takes the GIL from a training that launches kernels.
_WORTH_A_THREAD = 2**20


class _Hashing(io.BufferedWriter):
    """A file that computes the hashes of what is written to it."""

    def __init__(self, path: Path, threads: Executor) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest, self.pieces, self.threads = hashlib.sha256(), hashes.PieceHash(), threads

    def write(self, data: Any) -> int:
        if len(data) < _WORTH_A_THREAD:
            self.digest.update(data)
            self.pieces.update(data)
            return super().write(data)
        # On a fast disk, writing takes as long as hashing. Both release the GIL, so they overlap.
        hashed = [self.threads.submit(to.update, data) for to in (self.digest, self.pieces)]
        try:
            return super().write(data)
        finally:
            for one in hashed:
                one.result()


def write_pt(content: Any, path: Path) -> Written:
    """Write a torch file, fsync it, and return its size and its hashes.

    The hashes are computed while writing.
    """
    # A stream, because torch would store the name of a path, here a temporary one, in the file.
    with ThreadPoolExecutor(2) as threads, _Hashing(path, threads) as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
        return Written(stream.tell(), stream.digest.hexdigest(), stream.pieces.hexdigest())


def read_safetensors(path: Path) -> State:
    """Load the tensors of a safetensors file under their own names.

    Raises:
        UserError: the file is missing or damaged.
    """
    archives.check_safetensors(path)
    with reading(path):
        return load_file(path)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn failed writes of torch and safetensors into a `UserError` that names `path`."""
    with files.disk_errors(path):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if not _WRITE_FAILED.search(str(error)):
                raise
            fix = "free some space or choose another folder"
            raise asset_error(path, "cannot be written, the disk is full or broken", fix) from error


def write_safetensors(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write tensors. `about` has at most one entry, since the order of several is not fixed."""
    # Trap: save_file writes to a temporary file of its own, which stays behind after a kill. It is
    # put in a folder named after the process, so that the next run knows it may delete it.
    folder = path.with_name(f".{os.getpid()}.{hashes.sha256_text(path.name)[:8]}.tmp")
    with write_errors(path), files.atomic_file(path) as temporary:
        # A signal may come at any time, so the folder is made where it is sure to be removed.
        try:
            folder.mkdir(exist_ok=True)
            written = folder / path.name
            save_file({key: value.contiguous() for key, value in state.items()}, written, about)
            written.replace(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _read_diffusers(folder: Path) -> State:
    """Load all tensors of a diffusers model folder, from one file or from shards with an index."""
    found = (path for name in _FOLDER_FILES for path in sorted(folder.glob(name)))
    first = next(found, folder / _DIFFUSERS_FILE)
    shards = [first]
    if first.suffix == ".json":
        with reading(first):
            names = files.read_json(first)["weight_map"].values()
            shards = [folder / name for name in sorted({Path(name).name for name in names})]
    state: State = {}
    for shard in shards:
        safe = shard.suffix == ".safetensors"
        state |= read_safetensors(shard) if safe else load_tensors(shard)
    return state


def _read_torchscript(path: Path) -> State:
    """Load the parameters and buffers of a TorchScript archive as plain data.

    torch.jit.load would compile the code in the archive.
    """
    archives.check_torch(path)
    opened = files.open_regular(path, files.WEIGHTS)
    with reading(path), opened as stream, zipfile.ZipFile(stream) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        root = pickled.removesuffix("data.pkl")

        storages: dict[str, bytearray] = {}

        def rebuild(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
            return storage.as_strided(size, stride, offset)

        def storage(pid: Any) -> Tensor:
            _, dtype, key, _, _ = pid
            # Read each storage once, even if the pickle refers to it many times.
            if key not in storages:
                storages[key] = bytearray(_stored(archive, f"{root}data/{key}"))
            return torch.frombuffer(storages[key], dtype=dtype)

        admitted = {
            "__torch__.*": type("Module", (), {}),
            "torch._utils._rebuild_tensor_v2": rebuild,
            "collections.OrderedDict": dict,
            **_STORAGES,
        }
        content = io.BytesIO(_stored(archive, pickled))
        tree = pickles.Restricted(content, admitted, storage).load()
        return _check_tensors(dict(_leaves(tree, "")), path)


def _leaves(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif hasattr(value, "__dict__"):
            yield from _leaves(value, f"{prefix}{name}.")


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read an uncompressed member of the archive and verify its checksum."""
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise zipfile.BadZipFile(f"{name} is compressed, which may hide any size")
    return archive.read(member)


def _check_tensors(state: dict[str, Any], where: Path) -> State:
    """Refuse anything but dense CPU tensors."""
    others = [
        key
        for key, value in state.items()
        if not (isinstance(value, Tensor) and value.device.type == "cpu" and not value.is_sparse)
    ]
    if others:
        raise another_model([some(others, "that are not tensors")], where)
    return state
