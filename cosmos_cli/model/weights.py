"""Read and write weights as released files, our own or diffusers'. No code in a file is run.

In memory the keys are ours: `net.` and, for the log-variance head of training, `logvar.`.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, state dicts of `diffusion/networks/general_dit.py`
and `tokenizer/networks`; diffusers 0.42 `CosmosTransformer3DModel` and `AutoencoderKLCosmos`.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cosmos_cli import files, pickles
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.spec import DiTSpec

State = dict[str, Tensor]

# One parameter per row: our name, the released name, the diffusers name. The suffix ".weight" is
# left out. Only the position tables and the constants of the log-variance head lack it.
_NET = """
x_embedder            x_embedder.proj.1                    patch_embed.proj
pos_embedder.t        extra_pos_embedder.pos_emb_t         learnable_pos_embed.pos_emb_t
pos_embedder.h        extra_pos_embedder.pos_emb_h         learnable_pos_embed.pos_emb_h
pos_embedder.w        extra_pos_embedder.pos_emb_w         learnable_pos_embed.pos_emb_w
t_embedder.linear_1   t_embedder.1.linear_1                time_embed.t_embedder.linear_1
t_embedder.linear_2   t_embedder.1.linear_2                time_embed.t_embedder.linear_2
t_norm                affline_norm                         time_embed.norm
final.adaln.down      final_layer.adaLN_modulation.1       norm_out.linear_1
final.adaln.up        final_layer.adaLN_modulation.2       norm_out.linear_2
final.linear          final_layer.linear                   proj_out
"""
_BLOCK = """
self_attn_adaln.down  blocks.0.adaLN_modulation.1          norm1.linear_1
self_attn_adaln.up    blocks.0.adaLN_modulation.2          norm1.linear_2
self_attn.q           blocks.0.block.attn.to_q.0           attn1.to_q
self_attn.q_norm      blocks.0.block.attn.to_q.1           attn1.norm_q
self_attn.k           blocks.0.block.attn.to_k.0           attn1.to_k
self_attn.k_norm      blocks.0.block.attn.to_k.1           attn1.norm_k
self_attn.v           blocks.0.block.attn.to_v.0           attn1.to_v
self_attn.out         blocks.0.block.attn.to_out.0         attn1.to_out.0
cross_attn_adaln.down blocks.1.adaLN_modulation.1          norm2.linear_1
cross_attn_adaln.up   blocks.1.adaLN_modulation.2          norm2.linear_2
cross_attn.q          blocks.1.block.attn.to_q.0           attn2.to_q
cross_attn.q_norm     blocks.1.block.attn.to_q.1           attn2.norm_q
cross_attn.k          blocks.1.block.attn.to_k.0           attn2.to_k
cross_attn.k_norm     blocks.1.block.attn.to_k.1           attn2.norm_k
cross_attn.v          blocks.1.block.attn.to_v.0           attn2.to_v
cross_attn.out        blocks.1.block.attn.to_out.0         attn2.to_out.0
mlp_adaln.down        blocks.2.adaLN_modulation.1          norm3.linear_1
mlp_adaln.up          blocks.2.adaLN_modulation.2          norm3.linear_2
mlp.up                blocks.2.block.layer1                ff.net.0.proj
mlp.down              blocks.2.block.layer2                ff.net.2
"""
_LOGVAR = """
logvar.freqs          logvar.0.freqs                       -
logvar.phases         logvar.0.phases                      -
logvar                logvar.1                             -
"""
COLUMNS = OURS, RELEASED, DIFFUSERS = range(3)

# Keys of a released file that are not weights: positions 0, 1, 2 ... and Transformer Engine's fp8
# state.
_NOT_WEIGHTS = re.compile(r"net\.pos_embedder\.seq|.*\._extra_state")
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.HalfStorage": torch.float16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# The errors with which torch's zip writer and safetensors report a failed write.
_WRITE_FAILED = re.compile(r"PytorchStreamWriter|inline_container|I/O error|IoError|os error")

_DAMAGE = (*pickles.DAMAGE, OSError, zipfile.BadZipFile, SafetensorError)


# --- the denoiser ---------------------------------------------------------------------------------


def load_dit_state(path: Path) -> State:
    """Load the denoiser's weights under our keys, memory-mapped where the file allows it.

    Args:
        path: a released or post-trained `.pt`, our `.safetensors`, or a diffusers folder.

    Raises:
        UserError: the file is missing, damaged, of another model, or holds more than tensors.
    """
    if path.is_dir():
        return rename(_read_diffusers(path), DIFFUSERS, OURS, path)
    if path.suffix == ".safetensors":
        return rename(_read_safetensors(path), OURS, OURS, path)
    with reading(path):
        content = dict(_read_pt(path))
        state = {key: v for key, v in content.items() if not _NOT_WEIGHTS.fullmatch(key)}
    return rename(_check_tensors(state, path), RELEASED, OURS, path)


def save_dit(path: Path, state: Mapping[str, Tensor], format: Literal["pt", "safetensors"]) -> None:
    """Write the denoiser's weights: `pt` is the reference's format, `safetensors` is ours."""
    (save_released if format == "pt" else write_safetensors)(path, state)


def save_released(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write the denoiser's weights in the reference's format and return the sha256 of the file."""
    released = rename(state, OURS, RELEASED, path)
    tables = [state[f"net.pos_embedder.{axis}"] for axis in "thw"]
    seq = torch.arange(max(map(len, tables)), dtype=tables[0].dtype)
    with writing(path), files.atomic_file(path) as temporary:
        return write_pt({**released, "net.pos_embedder.seq": seq}, temporary)[1]


def save_diffusers(folder: Path, state: Mapping[str, Tensor], spec: DiTSpec) -> None:
    """Write the denoiser as a diffusers model folder, without the log-variance head."""
    net = {key: value for key, value in state.items() if key.startswith("net.")}
    write_safetensors(folder / _DIFFUSERS_FILE, rename(net, OURS, DIFFUSERS, folder))
    files.write_json(folder / "config.json", diffusers_config(spec))


def diffusers_config(spec: DiTSpec) -> dict[str, Any]:
    """Return the `config.json` of a denoiser for diffusers."""
    return {
        "_class_name": "CosmosTransformer3DModel",
        "in_channels": spec.latent_channels,
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


def names(source: int, target: int) -> dict[str, str]:
    """Map the names of one column to those of another; "#" stands for the number of the block."""
    prefixes = {
        _NET: ("net.", "net.", ""),
        _BLOCK: ("net.blocks.#.", "net.blocks.block#.", "transformer_blocks.#."),
        _LOGVAR: ("", "", ""),
    }
    return {
        prefix[source] + row[source]: prefix[target] + row[target]
        for table, prefix in prefixes.items()
        for row in map(str.split, table.strip().splitlines())
    }


def rename(state: Mapping[str, Tensor], source: int, target: int, where: Path) -> State:
    """Rename the tensors of a denoiser, or of a LoRA for it, from one column to another.

    Raises:
        UserError: a name is not in the tables.
    """
    known = names(source, target)
    renamed, unknown = {}, []
    for key, value in state.items():
        stem = re.sub(r"(\.lora_[AB])?\.weight$", "", key)
        block = re.search(r"blocks\.(?:block)?(\d+)", stem)
        number = block[1] if block else ""
        general = f"{stem[: block.start(1)]}#{stem[block.end(1) :]}" if block else stem
        if general in known:
            renamed[known[general].replace("#", number) + key[len(stem) :]] = value
        else:
            unknown.append(key)
    if unknown:
        raise another_model([some(unknown, "unknown")], where)
    return renamed


def name_in_file(path: Path) -> Callable[[str], str]:
    """Return a function from our name of a tensor to its name in a denoiser's file or folder."""
    column = DIFFUSERS if path.is_dir() else OURS if path.suffix == ".safetensors" else RELEASED
    return lambda name: next(iter(rename({name: torch.empty(0)}, OURS, column, path)))


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

# Substitutions, applied in this order, that turn diffusers names into released ones.
_TOKENIZER = (
    (r"(down|up)_blocks\.(\d+)\.resnets", r"\1.\2.block"),
    (r"(down|up)_blocks\.(\d+)\.\w+samplers\.0\.(conv\d)", r"\1.\2.\1sample.\3.conv3d"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1.0"),
    (r"mid_block\.temp_attentions\.0", "mid.attn_1.1"),
    (r"\.to_([qkv])\.", r".\1.conv3d."),
    (r"\.to_out\.0\.", ".proj_out.conv3d."),
    (r"\.conv_shortcut\.", ".nin_shortcut.conv3d."),
    (r"\.conv_s\.", ".0.conv3d."),
    (r"\.conv_t\.", ".1.conv3d."),
    (r"quant_conv\.", "quant_conv.conv3d."),
)


def load_tokenizer_state(path: Path) -> State:
    """Load the tokenizer's weights with the latent `mean` and `std`.

    Args:
        path: our file or a folder that holds it, the released folder with encoder.jit, decoder.jit
            and mean_std.pt, or a diffusers folder.

    Raises:
        UserError: a file is missing, damaged, or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        state = _read_safetensors(path)
    elif (path / TOKENIZER_FILE).exists():
        state = _read_safetensors(path / TOKENIZER_FILE)
    elif (path / "config.json").exists() and not (path / "encoder.jit").exists():
        state = _rename_tokenizer(_read_diffusers(path))
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


def _rename_tokenizer(state: State) -> State:
    """Rename diffusers keys to released ones; diffusers counts decoder levels in reverse."""
    levels = {int(n) for key in state for n in re.findall(r"up_blocks\.(\d+)", key)}
    renamed = {}
    for key, value in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up_blocks.{max(levels) - int(m[1])}", key)
        for pattern, replacement in _TOKENIZER:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _mean_std(tables: Any, state: State, where: Path) -> State:
    """Return mean and std as (channels, latent frames), whatever shape they were stored in."""
    channels = len(state.get("quant_conv.conv3d.bias", ()))
    with reading(where):
        mean, std = (torch.as_tensor(table).reshape(channels, -1).clone() for table in tables)
    return {"mean": mean, "std": std}


# --- into a module --------------------------------------------------------------------------------


def check_keys(
    shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor], where: Path
) -> None:
    """Refuse a state dict that does not have exactly these names and shapes.

    Raises:
        UserError: names are missing or unexpected, or tensors of another shape.
    """
    missing = [name for name in shapes if name not in state]
    unknown = [name for name in state if name not in shapes]
    other = [
        f"{name} is {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    found = {"missing": missing, "unknown": unknown, "of another shape": other}
    problems = [some(names, kind) for kind, names in found.items() if names]
    if problems:
        raise another_model(problems, where)


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


def another_model(problems: list[str], where: Path) -> UserError:
    """Return the error for a file that does not fit the model; it lists the problems."""
    return UserError(
        f"does not fit the model: {'; '.join(problems)}", code=ExitCode.ASSET, where=str(where),
        fix="check that the file belongs to this model",
    )  # fmt: skip


def some(names: list[str], kind: str) -> str:
    """Return the number of names and the first three of them, as text."""
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} {kind} ({', '.join(names[:3])}{more})"


# --- files ----------------------------------------------------------------------------------------


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any exception from a missing or damaged file into a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(
            "does not exist",
            code=ExitCode.ASSET,
            where=str(path),
            fix="run `cosmos download RECIPE`",
        ) from error
    except _DAMAGE as error:
        kind = type(error).__name__
        raise UserError(
            f"is damaged or holds more than tensors; nothing in it was run ({kind})",
            code=ExitCode.ASSET, where=str(path), fix="download it again",
        ) from error  # fmt: skip


def _read_pt(path: Path) -> Any:
    # Files of the reference's training hold empty BytesIO objects, left by Transformer Engine.
    safe = torch.serialization.safe_globals([io.BytesIO])
    # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
    mmap = files.check_torch(path)
    with reading(path), safe, warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


class _Hashing(io.BufferedWriter):
    """A file that computes the sha256 of what is written to it."""

    def __init__(self, path: Path, thread: Executor) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.digest, self.thread = hashlib.sha256(), thread

    def write(self, data: Any) -> int:
        # On a fast disk, writing takes as long as hashing. Neither holds the GIL, so they overlap.
        hashed = self.thread.submit(self.digest.update, data)
        try:
            return super().write(data)
        finally:
            hashed.result()


def write_pt(content: Any, path: Path) -> tuple[int, str]:
    """Write a torch file, fsync it, and return its size in bytes and its sha256.

    The hash is computed while writing.
    """
    # A stream, because torch would store the name of a path, here a temporary one, in the file.
    with ThreadPoolExecutor(1) as thread, _Hashing(path, thread) as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell(), stream.digest.hexdigest()


def _read_safetensors(path: Path) -> State:
    files.check_safetensors(path)
    with reading(path):
        return load_file(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn failed writes of torch and safetensors into a `UserError` that names `path`."""
    with files.disk_errors(path):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if not _WRITE_FAILED.search(str(error)):
                raise
            raise UserError(
                "cannot be written, the disk is full or broken", code=ExitCode.ASSET,
                where=str(path), fix="free some space or choose another folder",
            ) from error  # fmt: skip


def write_safetensors(
    path: Path, state: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Write tensors. `about` has at most one entry, since the order of several is not fixed."""
    # Trap: save_file writes to a temporary file of its own, which stays behind after a kill. It is
    # put in a folder named after the process, so that the next run knows it may delete it.
    own = {"dir": path.parent, "prefix": f".{os.getpid()}.", "suffix": ".tmp"}
    with writing(path), files.atomic_file(path) as temporary, TemporaryDirectory(**own) as folder:
        written = Path(folder, path.name)
        save_file({key: value.contiguous() for key, value in state.items()}, written, about)
        written.replace(temporary)


def _read_diffusers(folder: Path) -> State:
    """Load all tensors of a diffusers model folder, from one file or from shards with an index."""
    index = folder / f"{_DIFFUSERS_FILE}.index.json"
    if not index.exists():
        return _read_safetensors(folder / _DIFFUSERS_FILE)
    with reading(index):
        names = files.read_json(index)["weight_map"].values()
        shards = sorted({Path(name).name for name in names})
    state: State = {}
    for shard in shards:
        state |= _read_safetensors(folder / shard)
    return state


def _read_torchscript(path: Path) -> State:
    """Load the parameters and buffers of a TorchScript archive as plain data.

    torch.jit.load would compile the code in the archive.
    """
    files.check_torch(path)
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
