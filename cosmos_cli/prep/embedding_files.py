"""Read and write text embeddings as pickles in the reference's format.

A pickle holds a list with one fp16 array (real tokens, channels), the end token included. For the
denoiser, `pad` appends zeros up to the full number of tokens.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_cli import files, pickles
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.spec import TextSpec


def pad(embedding: Tensor, spec: TextSpec) -> Tensor:
    """Return the embedding (tokens, channels) padded with zeros to the full number of tokens."""
    return torch.nn.functional.pad(embedding, (0, 0, 0, spec.tokens - len(embedding)))


def write_embedding(path: Path, embedding: Tensor) -> None:
    """Write an embedding in the reference's format; call it inside `atomic_file`."""
    with path.open("wb") as stream:
        pickle.dump([embedding.half().numpy()], stream)


def read_embedding(path: Path, spec: TextSpec) -> Tensor:
    """Load the embedding (real tokens, channels) from a pickle that may hold only a numpy array.

    Raises:
        UserError: the file is missing, damaged or empty, names anything else, has another shape,
            or holds numbers that are not finite.
    """
    content = files.read_bytes(path, files.EMBEDDING)
    try:
        pickles.scan_pickle(io.BytesIO(content), files.EMBEDDING.limit)
        value = pickles.Restricted(io.BytesIO(content), _names_in_arrays()).load()
    except pickles.DAMAGE as error:
        raise _bad(path, f"is not an embedding: {error}") from error
    arrays = value if isinstance(value, list) else [value]
    if len(arrays) != 1 or not isinstance(arrays[0], np.ndarray):
        raise _bad(path, f"holds {type(value).__name__}, not a list with one array")
    array = arrays[0]
    fits = array.ndim == 2 and array.shape[1] == spec.channels and len(array) <= spec.tokens
    if not fits or array.dtype.kind != "f" or not len(array):
        expected = f"(1 to {spec.tokens}, {spec.channels}) numbers"
        raise _bad(path, f"holds {array.dtype} {array.shape}, expected {expected}")
    # Training reads it as fp32, where a large fp64 number becomes infinite.
    with np.errstate(over="ignore"):
        finite = np.isfinite(array.astype(np.float32)).all()
    if not finite:
        raise _bad(path, "holds numbers that are not finite (NaN or infinity)")
    # torch accepts only the machine's own byte order.
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))


def _bad(path: Path, what: str) -> UserError:
    return asset_error(path, what, "delete it and run `cosmos prep RECIPE` again")


def _names_in_arrays() -> dict[str, Any]:
    """Return what the pickle of one array may refer to.

    The array is no larger than the bytes in the pickle. numpy's own functions would allocate an
    object array of any shape that the pickle states.
    """
    # Stands in for numpy's class: the pickle may name it but cannot call it.
    array_class = object()
    made = []

    def empty(kind: Any, shape: Any, _dtype: Any) -> np.ndarray:
        # The pickle then sets the shape and the bytes, which must agree.
        if kind is not array_class or shape != (0,):
            raise pickle.UnpicklingError("it begins an array with a shape, refused")
        return only(np.ndarray((0,), np.int8))

    def filled(content: Any, dtype: np.dtype, shape: Any, order: str) -> np.ndarray:
        return only(np.frombuffer(content, dtype).reshape(shape, order=order))

    def only(array: np.ndarray) -> np.ndarray:
        made.append(array)
        if len(made) > 1:
            raise pickle.UnpicklingError("it holds more than one array")
        return array

    def number_type(name: Any, *_: Any) -> np.dtype:
        if not re.fullmatch(r"[<>=|]?[biuf]\d", str(name)):
            raise pickle.UnpicklingError(f"its numbers are {str(name)[:40]!r}, refused")
        # A copy, because the pickle then sets its byte order.
        return np.dtype(name, False, True)

    def latin1(value: str, encoding: str) -> bytes:
        # Old pickle protocols restore the bytes of an array with it.
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"it asks for the codec {encoding}, refused")
        return value.encode("latin1")

    names = {"_codecs.encode": latin1, "numpy.ndarray": array_class, "numpy.dtype": number_type}
    # numpy 2 renamed its core.
    for core in ("numpy.core", "numpy._core"):
        names |= {f"{core}.multiarray._reconstruct": empty, f"{core}.numeric._frombuffer": filled}
    return names
