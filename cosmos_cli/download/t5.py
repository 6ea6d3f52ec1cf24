"""Check a file of T5's encoder, and extract the encoder from Google's own file. No torch.

Google's repository has the whole model in one file in the format of torch before 1.6: pickles,
followed by the raw tensor data. The file is read as data, nothing in it is executed, and the
encoder's tensors are copied unchanged.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import IO, Any

from cosmos_cli import archives, console, files, pickles
from cosmos_cli.download import assets
from cosmos_cli.download.assets import Asset, RemoteFile
from cosmos_cli.errors import UserError, asset_error

# For each torch storage, its dtype in safetensors and its bytes per element.
STORAGES = {
    "torch.FloatStorage": ("F32", 4),
    "torch.HalfStorage": ("F16", 2),
    "torch.BFloat16Storage": ("BF16", 2),
}
# The first two values in a file of the old format.
# Source: pytorch/pytorch, torch/serialization.py.
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
PIECE = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, safetensors dtype, offset and length in bytes."""

    shape: list[int]
    dtype: str
    start: int
    length: int


def require_encoder(path: Path, asset: Asset) -> None:
    """Check that a file is the encoder that `config.json` of the asset describes.

    transformers would initialise missing tensors with random numbers. Additional tensors are
    ignored.

    Raises:
        UserError: a tensor is missing or has another shape. The file is deleted.
    """
    try:
        _require_shapes(_shapes_in(path), asset)
    except UserError:
        path.unlink()
        raise


def convert(asset: Asset, original: RemoteFile) -> None:
    """Write the encoder of Google's file as safetensors next to it, unless it is there already.

    Raises:
        UserError: the file is damaged, or the disk has no room.
    """
    path, target = asset.path(original.name), asset.folder / assets.TEXT_WEIGHTS
    if not any(form.is_at(place) for place, form in converted(asset, original)):
        tensors = _read_old_format(path)
        shapes = _require_shapes({name: t.shape for name, t in tensors.items()}, asset)
        encoder = {name: tensors[name] for name in shapes}
        needed = sum(t.length for t in encoder.values())
        files.require_free(target, needed, "the weights of T5's encoder", "free some space")
        digest = _write_safetensors(target, path, encoder)
        form = RemoteFile(assets.TEXT_WEIGHTS, files.size_of(target), digest, is_git_hash=False)
        files.write_json(_note(asset), {"of": original.digest, "file": astuple(form)})
    if path.exists():
        console.say(f"{path} is no longer needed and may be deleted: {console.size(original.size)}")


def converted(asset: Asset, original: RemoteFile) -> Iterator[tuple[Path, RemoteFile]]:
    """Yield the path, size and hash of the encoder made from a file, if it was converted."""
    if original.name == assets.TEXT_ORIGINAL and _note(asset).is_file():
        note = files.read_json(_note(asset))
        if note["of"] == original.digest:
            yield asset.folder / assets.TEXT_WEIGHTS, RemoteFile(*note["file"])


def _note(asset: Asset) -> Path:
    return asset.notes / "converted.json"


# --- names and shapes -----------------------------------------------------------------------------


def _require_shapes(found: dict[str, Any], asset: Asset) -> dict[str, list[int]]:
    """Check the shapes `found` against the encoder's, and return the encoder's."""
    wanted = _shapes(asset.folder / "config.json")
    for name, shape in wanted.items():
        if found.get(name) != shape:
            what = f"{name} has the shape {found.get(name)}, T5's encoder has {shape}"
            raise asset_error(asset.url, what, "set text_encoder_repo to the other source")
    return wanted


def _shapes(path: Path) -> dict[str, list[int]]:
    """Return the names and shapes of the encoder's tensors, as in transformers for T5 1.0.

    Raises:
        UserError: the configuration at `path` is not one of a T5.
    """
    config = files.read_json(path)
    needed = ("d_model", "d_kv", "num_heads", "d_ff", "vocab_size", "num_layers",
              "relative_attention_num_buckets")  # fmt: skip
    config = config if isinstance(config, dict) else {}
    if wrong := [key for key in needed if type(config.get(key)) is not int]:
        what = f"is not the configuration of a T5 encoder: {wrong[0]} is {config.get(wrong[0])!r}"
        raise asset_error(path, what, "delete it and run `cosmos download RECIPE` again")
    width, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes = {
        "shared.weight": [config["vocab_size"], width],
        "encoder.final_layer_norm.weight": [width],
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [
            config["relative_attention_num_buckets"],
            config["num_heads"],
        ],
    }
    for i in range(config["num_layers"]):
        attention, feed = (f"encoder.block.{i}.layer.{layer}" for layer in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{part}.weight": [inner, width] for part in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = [width, inner]
        shapes[f"{feed}.DenseReluDense.wi.weight"] = [hidden, width]
        shapes[f"{feed}.DenseReluDense.wo.weight"] = [width, hidden]
        shapes |= {f"{layer}.layer_norm.weight": [width] for layer in (attention, feed)}
    return shapes


# --- safetensors ----------------------------------------------------------------------------------


def _shapes_in(path: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a safetensors file, empty if it is not such a file."""
    from safetensors import SafetensorError, safe_open

    archives.check_safetensors(path)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        return {}


def _write_safetensors(path: Path, source: Path, tensors: dict[str, Stored]) -> str:
    """Copy tensors of `source` to a safetensors file, in pieces, and return its sha256."""
    ends = list(accumulate(t.length for t in tensors.values()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (name, t), end in zip(tensors.items(), ends, strict=True):
        offsets = [end - t.length, end]
        header[name] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    # Align the tensor data to 8 bytes.
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with (
        files.atomic_file(path) as temporary,
        files.open_regular(source, files.WEIGHTS) as old,
        temporary.open("wb") as new,
        console.progress(f"{source.name} to {path.name}", ends[-1] // 10**6, "MB") as bar,
    ):
        for piece in _pieces(struct.pack("<Q", len(text)) + text, old, tensors):
            new.write(piece)
            digest.update(piece)
            bar.advance(count=new.tell() // 10**6 - bar.done)
    return digest.hexdigest()


def _pieces(head: bytes, stream: IO[bytes], tensors: dict[str, Stored]) -> Iterator[bytes]:
    yield head
    for tensor in tensors.values():
        stream.seek(tensor.start)
        left = tensor.length
        while piece := stream.read(min(left, PIECE)):
            left -= len(piece)
            yield piece


# --- torch's old format ---------------------------------------------------------------------------


def _read_old_format(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file from torch before 1.6, without executing anything in it.

    Raises:
        UserError: the file is damaged, or holds more than tensors.
    """
    archives.check_torch(path)
    with files.open_regular(path, files.WEIGHTS) as stream:
        try:
            return _tensors(stream, files.size_of(path))
        except pickles.DAMAGE as error:
            what = f"is damaged or holds more than tensors; nothing in it was run ({error})"
            fix = "delete it and run `cosmos download RECIPE` again"
            raise asset_error(path, what, fix) from error


def _tensors(stream: IO[bytes], size: int) -> dict[str, Stored]:
    """Return the tensors of a file of torch's old format.

    The file has five pickles: magic number, protocol, the writer's machine, the tensors and the
    keys of the storages. Each storage follows as its number of elements in 8 bytes and its data.
    """
    admitted = {
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: _View(
            storage, offset, tuple(shape), tuple(strides)
        ),
        "torch._utils._rebuild_parameter": lambda view, *_: view,
        **STORAGES,
    }
    widths: dict[str, int] = {}

    def storage(pid: Any) -> tuple[str, str, int]:
        _, (dtype, width), key, *_ = pid
        widths[key] = width
        return key, dtype, width

    magic, protocol, _, tensors, keys = (
        pickles.Restricted(stream, admitted, storage).load()
        for _ in range(pickles.OLD_FORMAT_PICKLES)
    )
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise ValueError("it has another format")
    places = {}
    for key in keys:
        (count,) = struct.unpack("<Q", stream.read(8))
        places[key] = stream.tell(), count
        stream.seek(places[key][0] + count * widths[key])
    if stream.tell() > size:
        raise EOFError("it ends too early")
    return {name: _stored(view, *places[view.storage[0]]) for name, view in tensors.items()}


@dataclass(frozen=True)
class _View:
    """A tensor in a pickle: its storage (key, dtype, bytes per element), offset, shape, strides."""

    storage: tuple[str, str, int]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _stored(view: _View, start: int, count: int) -> Stored:
    """Locate a tensor in the file. Its storage has `count` elements and begins at byte `start`."""
    _, dtype, width = view.storage
    numbers = prod(view.shape)
    dense = tuple(prod(view.shape[i + 1 :]) for i in range(len(view.shape)))
    if view.strides != dense or not 0 <= view.offset <= count - numbers:
        raise ValueError("a tensor is not contiguous inside its storage")
    return Stored(list(view.shape), dtype, start + view.offset * width, numbers * width)
