"""Match captions to videos, by file name or by the rows of a CSV or JSONL file. No torch.

macOS and some tools write an accented letter as two characters, Windows ignores case, and some
tools keep the suffix of the video. Names that differ only in these ways count as the same name,
unless two files have it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError, dataset_error

COLUMNS = ("file", "caption")
# Other names of the two columns, in datasets for diffusers, musubi-tuner and other trainers.
_OTHER_COLUMNS = {
    "file": ("file_name", "video", "video_path", "path", "filename"),
    "caption": ("text", "prompt"),
}
# The table of captions that the hub's "videofolder" datasets keep next to the videos.
_TABLES = ("metadata.csv", "metadata.jsonl")
_SEPARATORS = ",;\t"
SUFFIX, JSON_SUFFIX = ".txt", ".json"
# Captions next to videos may also have the suffixes that other trainers use.
SIDECAR_SUFFIXES = (SUFFIX, ".caption", JSON_SUFFIX)
# Text files with these names often lie next to videos, but are not captions.
_OTHER_TEXTS = frozenset({
    "readme", "license", "licence", "copying", "notice", "changelog", "requirements",
})  # fmt: skip


# --- names ----------------------------------------------------------------------------------------


def key(name: str) -> str:
    """Return a key that is equal for names that differ only in case, Unicode form or outer blanks.

    Source: the Unicode Standard, section 3.13, canonical caseless matching.
    """
    form = unicodedata.normalize("NFD", name.strip()).casefold()
    return unicodedata.normalize("NFD", form).strip()


@dataclass
class Owners:
    """Files and the videos that they belong to.

    Args:
        files: the file of each video.
        unclear: for each video several possible files, or files that may also be another video's.
        unused: files that belong to no video, or whose video has a file with a better name.
    """

    files: dict[str, Path] = field(default_factory=dict)
    unclear: dict[str, list[Path]] = field(default_factory=dict)
    unused: list[Path] = field(default_factory=list)


def owners(
    listed: Sequence[Path], videos: Collection[str], suffixes: Sequence[str] = (SUFFIX,)
) -> Owners:
    """Match each file to the video that it is named after: a.txt or a.mp4.txt to a.mp4.

    Files with the exact name come first, in the order of `suffixes`. Files whose names differ in
    case or Unicode form come after them.
    """
    tables: list[dict[str, list[str]]] = [{}, {}, {}, {}]
    for video in videos:
        stem = PurePosixPath(video).stem
        for table, name in zip(tables, (stem, video, key(stem), key(video)), strict=True):
            table.setdefault(name, []).append(video)
    found = Owners()
    candidates: dict[str, list[tuple[int, Path]]] = {}
    for file in listed:
        base = _without_suffix(file.name)
        names = (base, base, key(base), key(base))
        hits = [table.get(name, []) for table, name in zip(tables, names, strict=True)]
        meant: list[str] = next(filter(None, hits), [])
        # Of videos with the same stem only the first counts. `sources.inspect` rejects the others.
        stems = {PurePosixPath(video).stem: video for video in reversed(meant)}
        if not stems:
            continue
        if len(stems) > 1:
            for video in meant:
                found.unclear.setdefault(video, []).append(file)
        else:
            (video,) = stems.values()
            stem = PurePosixPath(video).stem
            exact = [name + suffix for suffix in suffixes for name in (stem, video)]
            rank = exact.index(file.name) if file.name in exact else len(exact)
            candidates.setdefault(video, []).append((rank, file))
    for video, ranked in candidates.items():
        best = min(ranked)[0]
        chosen = [file for rank, file in ranked if rank == best]
        if len(chosen) > 1:
            found.unclear.setdefault(video, []).extend(chosen)
        else:
            found.files[video] = chosen[0]
            # The video has its own file now, so an unclear one no longer matters.
            found.unclear.pop(video, None)
    placed = {*found.files.values(), *(f for several in found.unclear.values() for f in several)}
    found.unused = [file for file in listed if file not in placed]
    return found


def sidecars(videos: Mapping[str, Path]) -> Owners:
    """Match the caption files in the folders of videos, given by name, to these videos.

    A .json file that belongs to no video is not mentioned, since it may be anything.

    Raises:
        UserError: a folder cannot be read.
    """
    folders: dict[Path, dict[str, str]] = {}
    for name, path in videos.items():
        folders.setdefault(path.parent, {})[path.name] = name
    found = Owners()
    for folder, names in folders.items():
        here = owners(files_in(folder, *SIDECAR_SUFFIXES), names, SIDECAR_SUFFIXES)
        found.files |= {names[video]: file for video, file in here.files.items()}
        found.unclear |= {names[video]: several for video, several in here.unclear.items()}
        found.unused += [file for file in here.unused if file.suffix.lower() != JSON_SUFFIX]
    return found


def _without_suffix(name: str) -> str:
    return name[: len(name.rstrip()) - len(PurePosixPath(name.rstrip()).suffix)]


def is_other_text(path: Path) -> bool:
    """True if a file is a readme, a licence or the like, which belongs to no video on purpose."""
    return _without_suffix(path.name).lower() in _OTHER_TEXTS


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """List the visible files of a folder that have one of the suffixes, in upper or lower case.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        return [p for p in shown if PurePosixPath(p.name.rstrip().lower()).suffix in suffixes]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        fix = "make this folder readable"
        raise dataset_error(folder, f"cannot be read: {error.strerror}", fix) from error


def is_damaged_json(path: Path) -> bool:
    """True if a JSON file cannot be read, so that a caption in it would be missed."""
    if path.suffix.lower() != JSON_SUFFIX:
        return False
    try:
        files.read_json(path)
    except files.BadFile:
        return True
    return False


def caption_in(path: Path) -> str:
    """Return the caption in the JSON file of a video, "" if it holds something else."""
    try:
        content = files.read_json(path)
    except files.BadFile:
        return ""
    caption = _renamed(content).get("caption") if isinstance(content, dict) else None
    return one_kind_of_line_end(caption).strip() if isinstance(caption, str) else ""


# --- captions_file --------------------------------------------------------------------------------


def table_in(*folders: Path) -> Path | None:
    """Return the first metadata.csv or metadata.jsonl of the folders that has captions."""
    for path in (folder / name for folder in folders for name in _TABLES):
        if path.is_file():
            try:
                row = next(_rows(path), (1, {}))[1]
            except UserError:
                continue
            # A row that cannot be read is reported by `read`.
            if isinstance(row, str) or row.keys() >= set(COLUMNS):
                return path
    return None


def read(path: Path, videos: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Read captions_file. Return the captions by video, and the rows that name no video.

    A row names a video by its file name or its path, with slashes or backslashes. Folders that the
    dataset does not have are ignored. An exact name wins over one that differs in case or Unicode
    form.

    Raises:
        UserError: the file is missing, or rows are unusable; the error lists all of them.
    """
    captions: dict[str, str] = {}
    first: dict[str, int] = {}
    problems: list[UserError] = []
    unknown: list[str] = []
    rows: list[tuple[int, str, str]] = []
    videos = set(videos)
    alike: dict[str, list[str]] = {}
    for video in videos:
        alike.setdefault(key(video), []).append(video)
    for number, row in _rows(path):
        problem = row if isinstance(row, str) else _problem(row)
        if problem or isinstance(row, str):
            problems.append(_wrong_row(path, number, problem))
        else:
            rows.append((number, _video_named(row["file"], videos, alike), row["caption"]))
    exact = {name for _, name, _ in rows if name in videos}
    for number, name, caption in rows:
        found = [name] if name in videos else alike.get(key(name), [])
        if len(found) > 1:
            what = f"names {name!r}, which may be {' or '.join(map(repr, sorted(found)))}"
            problems.append(_wrong_row(path, number, what))
            continue
        # A row with the exact name wins.
        known = found[0] if found and (name in videos or found[0] not in exact) else ""
        same = known or name
        if same in first:
            what = f"names {name!r} again, after line {first[same]}"
            problems.append(_wrong_row(path, number, what))
            continue
        first[same] = number
        if known:
            captions[known] = one_kind_of_line_end(caption).strip()
        else:
            unknown.append(f"line {number} {name!r}")
    if problems:
        problems.sort(key=lambda error: int(error.where.rpartition(":")[2]))
        raise UserError(
            f"{len(problems)} lines cannot be used",
            code=ExitCode.DATASET,
            where=str(path),
            fix="see the reasons below",
            also=tuple(problems),
        )
    return captions, unknown


def _wrong_row(path: Path, number: int, what: str) -> UserError:
    return dataset_error(f"{path}:{number}", what)


def _video_named(text: str, videos: Collection[str], alike: Collection[str]) -> str:
    """Return the name of a video that a path stands for, with as many of its folders as exist."""
    # A backslash may be part of a file name on Linux, but separates folders on Windows.
    paths = [PurePosixPath(form).parts for form in (text.strip(), text.strip().replace("\\", "/"))]
    names = ["__".join(parts[first:]) for parts in paths for first in range(len(parts))]
    exact = (name for name in names if name in videos)
    near = (name for name in names if key(name) in alike)
    return next(exact, next(near, names[-1] if names else ""))


def one_kind_of_line_end(text: str) -> str:
    """Convert line ends to newlines, as reading the text back from a file does."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _problem(row: dict[Any, Any]) -> str:
    """Return the problem of a row, "" if it has none."""
    for column in COLUMNS:
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"has no {column}"
    try:
        row["caption"].encode()
    except UnicodeEncodeError as error:
        # JSON can name half of a character, such as "\ud800".
        return f"has a caption with {row['caption'][error.start]!a}, which is not a character"
    # csv.DictReader stores surplus cells under the key None.
    fix = "quote a caption that contains the separator"
    return f"has more cells than the header; {fix}" if None in row else ""


def _renamed(row: dict[Any, Any]) -> dict[Any, Any]:
    """Return a row with the two columns under the names of `COLUMNS`."""
    plain = {k.strip().lower() if isinstance(k, str) else k: value for k, value in row.items()}
    for column, others in _OTHER_COLUMNS.items():
        found = next((name for name in (column, *others) if name in plain), column)
        if found in plain:
            plain[column] = plain[found]
    return plain


def _rows(path: Path) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    """Yield the line number and the columns of each row, or its problem in place of the columns."""
    text = files.read_text(path, files.CAPTIONS_FILE)
    if path.suffix.lower() == ".csv":
        yield from _csv(path, text)
    elif path.suffix.lower() == ".jsonl":
        yield from _jsonl(text)
    else:
        fix = f"write a row of {' and '.join(COLUMNS)} for each video"
        raise dataset_error(path, "is neither .csv nor .jsonl", fix)


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    readers = [
        csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        for separator in _SEPARATORS
    ]
    lacks = [[c for c in COLUMNS if c not in _columns(reader)] for reader in readers]
    reader = readers[lacks.index(min(lacks, key=len))]
    if missing := min(lacks, key=len):
        fix = f"start it with the line {','.join(COLUMNS)}"
        raise dataset_error(f"{path}:1", f"has no column {missing[0]!r} in its first line", fix)
    line = reader.line_num + 1
    try:
        for row in reader:
            yield line, _renamed(row)
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"is not valid CSV: {error}"


def _columns(reader: csv.DictReader[str]) -> Collection[str]:
    try:
        return _renamed(dict.fromkeys(reader.fieldnames or ()))
    except csv.Error:
        return ()


def _jsonl(text: str) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    # splitlines() would also split at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > files.CAPTION.limit:
            yield number, f"is longer than {files.CAPTION.limit:,} characters"
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is not valid JSON: {error}"
            continue
        yield number, _renamed(row) if isinstance(row, dict) else "is not a JSON object"


# These are removed from the start of a model's answer, in this order.
PREFIXES = ("Caption:", "#####", "####", "- ", "* ", ",")
# A bold list heading with fewer words than this is dropped.
SHORT_WORDS = 10


def clean(answer: str) -> str:
    """Strip line breaks, list marks, headings and quotes from a model's answer."""
    text = answer.replace("\r", " ").replace("\n", " ")
    text = re.sub(r"- \*\*(.*?)\*\*", _drop_short, text)
    for prefix in PREFIXES:
        text = text.removeprefix(prefix).lstrip() if text.startswith(prefix) else text
    return " ".join(text.split()).strip(" -,*:\"'\u201c\u201d\u2018\u2019")


def _drop_short(heading: re.Match[str]) -> str:
    return "" if len(re.findall(r"\w+", heading[1])) < SHORT_WORDS else heading[0]
