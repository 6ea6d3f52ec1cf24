"""Open every file that a user can name: regular files only, within a size limit by kind. No torch.

A link to /dev/zero would fill memory, and a pipe would block for ever. So each file is checked
before it is opened and again through its descriptor. Text is read up to a limit, whatever size the
file reports. If a library opens a file by its name, the file is checked just before.

Files are written to a temporary name and renamed, so that a kill leaves the old one or the new one.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_cli.errors import ExitCode, UserError, asset_error

MB = 10**6
# The subfolder of a downloaded folder that is not part of the download.
CACHE_DIR = ".cache"


class Kind(NamedTuple):
    """A kind of file: its name, its limit in bytes, and the exit code and fix of a bad one."""

    name: str
    limit: int
    code: ExitCode
    fix: str


# The largest known file of each kind takes a tenth to a half of its limit.
RECIPE = Kind("a recipe", MB // 10, ExitCode.USAGE, "a recipe is a short text file")
BATCH = Kind(
    "a batch", 16 * MB, ExitCode.USAGE, "give a JSONL file, or pipe the prompts to --prompts -"
)
CAPTION = Kind("a caption", MB, ExitCode.DATASET, "write it as a short text file")
CAPTIONS_FILE = Kind(
    "a captions_file", 64 * MB, ExitCode.ASSET, "set captions_file to a CSV or JSONL file"
)
MANIFEST = Kind(
    "a manifest", 100 * MB, ExitCode.DATASET, "move it away and run `cosmos prep RECIPE` again"
)
EMBEDDING = Kind(
    "an embedding", 16 * MB, ExitCode.ASSET, "delete it and run `cosmos prep RECIPE` again"
)
LEROBOT = Kind("LeRobot metadata", 64 * MB, ExitCode.DATASET, "fetch the dataset again")
PARQUET = Kind("a parquet file", 500 * MB, ExitCode.DATASET, "fetch the dataset again")
VIDEO = Kind("a video", 10**12, ExitCode.DATASET, "put a video file there")
INPUT = Kind(
    "a picture or video", 10**12, ExitCode.ASSET, "give a png, jpeg or webp file, or a video"
)
JSON = Kind("a JSON file", 16 * MB, ExitCode.ASSET, "create it again")
# The tokenizer.json of the largest vocabularies has 33 MB.
MODEL_SETTINGS = Kind("a model's settings", 64 * MB, ExitCode.ASSET, "download the model again")
WORDS = Kind("a word list", 32 * MB, ExitCode.ASSET, "run `cosmos download RECIPE`")
FIGURES = Kind("a run's figures", 300 * MB, ExitCode.ASSET, "move it away")
# T5-11B has 45 GB as Google published it.
WEIGHTS = Kind(
    "a weights file",
    200_000 * MB,
    ExitCode.ASSET,
    "name another file, or, if it was downloaded, run `cosmos download RECIPE`",
)
# The hub keeps these files in git, outside its store of large files.
HUB_TEXT = Kind("a text of the hub", 100 * MB, ExitCode.ASSET, "run `cosmos download RECIPE`")
DATA = Kind("a file", 10**12, ExitCode.ASSET, "name a regular file")

# Parsed JSON takes up to 100 times the memory of its text, so the values are counted first. One of
# these characters stands before each value.
_BEFORE_VALUES = ",[{"
MOST_VALUES = 3_000_000

_NO_FILES = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip


class BadFile(UserError):
    """A file is not what its kind should be, or cannot be read."""


class NoSuchFile(BadFile):
    """A file does not exist."""


def bad(path: Path, kind: Kind, what: str) -> BadFile:
    """Return the error for a file that is not of its kind."""
    what = (_mistaken_for_weights(path) if kind is WEIGHTS else "") or what
    return BadFile(what, code=kind.code, where=str(path), fix=kind.fix)


def _mistaken_for_weights(path: Path) -> str:
    """Return what a file is that a failed download or clone left in the place of weights, or ""."""
    with open_regular(path, DATA) as file:
        start = file.read(64).lstrip().lower()
    if not start:
        return "is empty, not weights"
    if start.startswith((b"<!doctype", b"<html")):
        return "is a web page, not weights"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not weights: `git lfs pull` fetches them"
    return ""


# --- paths ----------------------------------------------------------------------------------------

# The errors of a path that the system does not follow. `Path.exists` raises them, too.
_PATH_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EACCES, errno.EPERM})


def expand(path: str | Path) -> Path:
    """Return a path with ~ expanded, or unchanged if there is no such user or home folder.

    The shell expands ~ only at the start of a word, so not in --output=~/videos.
    """
    # Path.expanduser raises a RuntimeError for an unknown user.
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextmanager
def path_errors() -> Iterator[None]:
    """Turn the error of a path that the system does not follow into a UserError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in _PATH_ERRORS or error.filename is None:
            raise
        what = f"cannot be used: {os.strerror(error.errno)}"
        fix = "name another path, or allow access to it"
        raise asset_error(os.fsdecode(error.filename), what, fix) from error


# --- opening --------------------------------------------------------------------------------------


def open_regular(path: Path, kind: Kind) -> io.BufferedReader:
    """Open a regular file for reading, following links.

    Raises:
        NoSuchFile: the file does not exist.
        BadFile: it is a folder, pipe, device or socket, too large, or may not be read.
    """
    try:
        _require_regular(path, kind, path.stat())
        # O_NONBLOCK: a pipe may have replaced the file since the check, and opening it would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise NoSuchFile("does not exist", code=kind.code, where=str(path), fix=kind.fix) from error
    except OSError as error:
        raise unreadable(path, kind, error) from error
    except ValueError as error:
        raise bad(path, kind, "has a name that no file can have") from error
    stream = os.fdopen(descriptor, "rb")
    try:
        _require_regular(path, kind, os.fstat(descriptor))
    except BadFile:
        stream.close()
        raise
    return stream


def require_regular(path: Path, kind: Kind) -> None:
    """Check a file that a library will open by its name.

    Raises:
        NoSuchFile, BadFile: as of `open_regular`.
    """
    open_regular(path, kind).close()


def _require_regular(path: Path, kind: Kind, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = _NO_FILES.get(stat.S_IFMT(status.st_mode), "something else")
        raise bad(path, kind, f"is {found}, not a file")
    if status.st_size > kind.limit:
        raise _too_large(path, kind)


def _too_large(path: Path, kind: Kind) -> BadFile:
    return bad(path, kind, f"is larger than {kind.limit:,} bytes, too much for {kind.name}")


def unreadable(path: Path, kind: Kind, error: OSError) -> BadFile:
    """Return the error for a file that the system does not let us read."""
    return bad(path, kind, f"cannot be read: {error.strerror or error}")


# --- texts ----------------------------------------------------------------------------------------


def read_bytes(path: Path, kind: Kind) -> bytes:
    """Return the content of a file.

    Raises:
        NoSuchFile, BadFile: as of `open_regular`, or reading fails.
    """
    with open_regular(path, kind) as stream:
        try:
            # The reported size cannot be trusted: /proc reports 0, and other files grow meanwhile.
            content = stream.read(kind.limit + 1)
        except OSError as error:
            raise unreadable(path, kind, error) from error
    if len(content) > kind.limit:
        raise _too_large(path, kind)
    return content


def read_text(path: Path, kind: Kind, errors: str = "strict") -> str:
    """Return the text of a file without its byte order mark, with LF line endings.

    It is UTF-8, or UTF-16 with a byte order mark, as Windows PowerShell writes it.

    Raises:
        NoSuchFile, BadFile: as of `read_bytes`, or the text is neither.
    """
    content = read_bytes(path, kind)
    try:
        text = content.decode(encoding_of(content), errors)
    except UnicodeDecodeError as error:
        raise bad(path, kind, "is not UTF-8 text") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def encoding_of(content: bytes) -> str:
    """Return the encoding of a text that begins with these bytes."""
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf16 else "utf-8-sig"


def read_json(path: Path, kind: Kind = JSON) -> Any:
    """Return the parsed content of a JSON file. Bytes that are not UTF-8 become surrogates.

    Raises:
        NoSuchFile, BadFile: as of `read_bytes`, or it is damaged, too long or nested too deeply.
    """
    text = read_text(path, kind, errors="surrogateescape")
    if sum(map(text.count, _BEFORE_VALUES)) > MOST_VALUES:
        raise bad(path, kind, f"holds more than {MOST_VALUES:,} values, too much for {kind.name}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise bad(path, kind, f"is damaged: {why}") from error


# --- writing --------------------------------------------------------------------------------------

_DISK_ERRORS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
    errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.EFBIG, errno.ELOOP,
    errno.ENOTEMPTY,
})  # fmt: skip
_DISK_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose another folder"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "choose a folder that you may write to"
    ),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "choose a file system for large files",
    errno.EIO: "check the disk",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn file system errors in the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        what = f"cannot be written: {os.strerror(error.errno or 0)}"
        fix = _DISK_FIXES.get(error.errno or 0, "choose another folder")
        raise asset_error(path, what, fix) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, with its suffix; on success sync and rename it.

    Raises:
        UserError: the disk is full or read-only, or the permission is missing.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_next_to(path)
        try:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            # Some writers replace it with a private file. Make it as readable as the umask allows.
            temporary.chmod(mode)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def temporary_next_to(path: Path) -> Path:
    """Return a name for this process to write to before the file is renamed to `path`."""
    # A hash is shorter than most names, so the temporary name stays within the length limit.
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{os.getpid()}.{_machine()}.{mark}.tmp{path.suffix}")


@cache
def _machine() -> str:
    """Return eight digits that identify this machine and, in a container, its process numbers."""
    processes = Path("/proc/self/ns/pid")
    container = str(processes.stat().st_ino) if processes.exists() else ""
    names = json.dumps((platform.node(), container))
    return hashlib.sha256(names.encode()).hexdigest()[:8]


def remove_own_stale(folder: Path) -> None:
    """Remove the temporary files of killed processes of this machine from a user's folder.

    Unlike `remove_stale`, it may run while other machines write to the folder.
    """
    for path in folder.glob(f".*.{_machine()}.*.tmp*"):
        owner = re.fullmatch(r"\.(\d+)\.[0-9a-f]{8}\.[0-9a-f]{8}\.tmp(\.\w+)?", path.name)
        if owner and not Path("/proc", owner[1]).exists():
            # In a shared folder, it may belong to another user.
            with contextlib.suppress(PermissionError):
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        # File names in the text need not be UTF-8. Python keeps such bytes as surrogates.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def stale(folder: Path) -> Iterator[Path]:
    """Yield the temporary files and folders that a killed process left in `folder`."""
    for path in folder.glob(".*.tmp*"):
        owner = re.match(r"\.(\d+)\.", path.name)
        if not owner or not Path("/proc", owner[1]).exists():
            yield path


def remove_stale(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`."""
    for path in stale(folder):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, else the nearest folder above it that does.

    Raises:
        UserError: the permission to search a folder above it is missing.
    """
    with disk_errors(path):
        return next(parent for parent in [path, *path.parents] if parent.exists())


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that holds, or will hold, `path`.

    Raises:
        UserError: the permission to search a folder above it is missing.
    """
    return shutil.disk_usage(nearest_existing(path)).free


def require_free(path: Path, needed: float, what: str, fix: str) -> None:
    """Check that the disk of `path` has room for `needed` bytes.

    Raises:
        UserError: less than `needed` bytes are free.
    """
    if (free := free_bytes(path)) < needed:
        unit, name = (1e9, "GB") if needed > 1e9 else (1e6, "MB")
        sizes = f"{needed / unit:,.2f} {name}, {free / unit:,.2f} {name} are free"
        raise asset_error(path, f"{what} need {sizes}", fix)


def require_writable(folder: Path) -> None:
    """Create a folder for output.

    Raises:
        UserError: the folder cannot be created or written to.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # os.access would not give the reason.
        tempfile.TemporaryFile(dir=folder).close()


def size_of(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it cannot be read, as with a broken link."""
    return stamp_of(path)[0]


def size_within(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(map(size_of, path.rglob("*"))) if path.is_dir() else size_of(path)


def stamp_of(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the mtime in ns of a file, or zeros if stat fails."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def file_id(file: Path | int) -> tuple[int, int] | None:
    """Return the device and inode of a path or open file, or None if it does not exist."""
    try:
        status = os.stat(file)  # noqa: PTH116 - `file` may be a descriptor
    except OSError:
        return None
    return status.st_dev, status.st_ino
