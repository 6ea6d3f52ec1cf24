"""Find the promoted models in checkpoints_dir, the run of each and the newest. No torch.

A promoted model is a folder, or a link to one, whose name is `<Model>_post-trained` or
`<Model>_post-trained_NAME`. Promote writes a manifest.json and a recipe.yaml into it. A folder that
users of NVIDIA's scripts made by hand holds only weights.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import Any

from cosmos_cli import console, exchange, files, paths
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.spec import MODELS, ModelSpec

# NVIDIA's own scripts also write names such as <Model>_post-trained-lora.
_FOLDER = re.compile(r"(?P<model>[^.].*?)_post-trained([-_].+)?")


def is_promoted(folder: Path) -> bool:
    """True if the folder has the name of a promoted model."""
    return _FOLDER.fullmatch(folder.name) is not None


def model_of(folder: Path) -> ModelSpec | None:
    """Return the model that a folder's name stands for, or None."""
    name = _FOLDER.fullmatch(folder.name)
    return MODELS.get(name["model"] if name else folder.name)


def manifest_of(folder: Path) -> dict[str, Any]:
    """Return promote's manifest of a model folder, or {} if it is missing or has no sha256.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / paths.MANIFEST_FILE
    try:
        manifest = files.read_json(path) if path.is_file() else {}
    except UserError as error:
        error.fix = "run `cosmos promote RECIPE` again, or delete it to use the weights unverified"
        raise
    ours = isinstance(manifest, dict) and isinstance(manifest.get("sha256"), str)
    return manifest if ours else {}


def run_of(folder: Path) -> str | None:
    """Return the folder of the run that a promoted model comes from, or None if unknown."""
    with contextlib.suppress(UserError):
        run = manifest_of(folder).get("run")
        return run if isinstance(run, str) else None
    return None


def is_of(folder: Path, run: Path) -> bool:
    """True if a promoted model comes from this run, which may have been moved since."""
    known = run_of(folder)
    if known is None or known == str(run):
        return known is not None
    # A run is named by the last folders of its path: project, group and name.
    same_name = Path(known).parts[-3:] == run.parts[-3:]
    return same_name and not os.path.exists(known)  # noqa: PTH110 - False if unreachable


def found(checkpoints_dir: str, spec: ModelSpec | None = None) -> list[Path]:
    """Return the folders of promoted models, of `spec` if given, the newest first.

    First restore models that an interrupted promotion moved aside. Warn about folders without a
    model.

    Raises:
        UserError: a folder cannot be read. It might hold the newest model.
    """
    root = Path(checkpoints_dir).absolute()
    for path in _entries(root):
        hidden = re.fullmatch(r"\.(.+)\.old", path.name)
        place = path.with_name(hidden[1]) if hidden else path
        if is_promoted(place):
            exchange.restore(place)
    folders = filter(is_promoted, _entries(root))
    changed = {path: _changed_ns(path) for path in folders if spec in (None, model_of(path))}
    known = {path: ns for path, ns in changed.items() if ns is not None}
    return sorted(known, key=known.__getitem__, reverse=True)


def named(word: str, checkpoints_dir: str, spec: ModelSpec | None = None) -> list[Path]:
    """Return the folders in checkpoints_dir that `--model word` may mean.

    The word is the name of a folder, else the NAME of `cosmos promote --name NAME`.
    """
    if not word or Path(word).name != word or word.startswith("."):
        return []
    root = Path(checkpoints_dir).absolute()
    specs = [spec] if spec else MODELS.values()
    wanted = [[root / word], [paths.promoted_dir(s, checkpoints_dir, word) for s in specs]]
    for folders in wanted:
        for folder in filter(is_promoted, folders):
            exchange.restore(folder)
        if there := [folder for folder in folders if os.path.lexists(folder)]:
            return there
    return []


def _entries(root: Path) -> list[Path]:
    """Return the entries of a folder, sorted by name; [] if it does not exist.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return sorted(root.iterdir())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return []
        raise _unreadable(root, error) from error


def _changed_ns(folder: Path) -> int | None:
    """Return when a model folder last changed; None, with a warning, if it holds no model.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = {path.name for path in folder.iterdir()}
    except NotADirectoryError:
        content = set()
    except FileNotFoundError as error:
        if not folder.is_symlink():
            # On a disk that cannot swap folders, a running promotion is about to put it back.
            exchange.restore(folder)
            return _changed_ns(folder) if folder.exists() else None
        fix = "restore its target, delete the link, or choose another --model"
        raise asset_error(folder, "is a broken link", fix) from error
    except OSError as error:
        raise _unreadable(folder, error) from error
    holds = content & {*paths.MODEL_FORMATS.values(), paths.MANIFEST_FILE, "recipe.yaml"}
    if not holds:
        if model_of(folder):
            names = " or ".join(paths.MODEL_FORMATS.values())
            console.warn(f"{folder} is ignored: it is not a folder with {names}")
        return None
    if model_of(folder) is None and "recipe.yaml" not in content:
        what = "its name is not that of a known model, and it has no recipe.yaml"
        console.warn(f"{folder} is ignored: {what}")
        return None
    dates = holds - {"recipe.yaml"} or holds
    return max(_changed(folder / name) for name in dates)


def _changed(path: Path) -> int:
    """Return when a file or the link to it changed, in ns: a new link may lead to an old file."""
    with contextlib.suppress(OSError):
        return max(files.stamp_of(path)[1], path.lstat().st_mtime_ns)
    return 0


def _unreadable(folder: Path, error: OSError) -> UserError:
    fix = "change its permissions, or choose a --model by its path"
    return asset_error(folder, f"cannot be read: {error.strerror}", fix)
