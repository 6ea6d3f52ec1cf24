"""Load models, tokenizers and processors of transformers, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cosmos_cli import archives, files
from cosmos_cli.errors import asset_error


def load_pretrained(kind: Any, source: Path | str, **options: Any) -> Any:
    """Load an object of the transformers class `kind` from a local folder.

    A name instead of a folder stands for a model in the hub's cache. Nothing is downloaded, and no
    code of the folder is run. Call it inside `reading_pretrained`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    # `load_model` reports what transformers would print as a table of tensors.
    logging.set_verbosity_error()
    archives.check_model_folder(Path(source))
    return kind.from_pretrained(source, local_files_only=True, trust_remote_code=False, **options)


def load_model(kind: Any, source: Path | str, dtype: torch.dtype) -> Any:
    """Load a model as `load_pretrained` does, with all of its weights.

    Raises:
        ValueError: a weight is missing, which transformers would initialise at random, or has
            another shape, or the folder has no config.json, for which it may take a default.
    """
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise ValueError("it has no config.json")
    model, about = load_pretrained(
        kind, source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if about["mismatched_keys"]:
        name, found, wanted = min(about["mismatched_keys"])
        raise ValueError(
            f"{name} has the shape {list(found)}, but config.json describes {list(wanted)}"
        )
    if about["missing_keys"]:
        raise ValueError(f"it lacks weights, {min(about['missing_keys'])} among them")
    return model


@contextmanager
def reading_pretrained(source: Path | str, what: str, fix: str) -> Iterator[None]:
    """Turn the errors of a missing or damaged file into a UserError: `what`, the reason, `fix`.

    For settings of a wrong type, transformers raises whatever its code runs into.
    """
    from huggingface_hub.errors import StrictDataclassError

    wrong_settings = (
        TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError,
    )  # fmt: skip
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (files.BadFile, OSError, ValueError, SafetensorError, *wrong_settings) as error:
        found = f"{error.where}: {error.what}" if isinstance(error, files.BadFile) else str(error)
        reason = " ".join(found.split())[:200]
        raise asset_error(source, f"{what}: {reason}", fix) from error
