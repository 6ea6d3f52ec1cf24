"""Which caption belongs to which video, by its name or by a row of a CSV or JSONL file. No torch.

macOS and some tools write an accented letter as two characters, Windows does not tell upper from
lower case, and some tools keep the suffix of the video. Names that differ in such things alone are
one name here, unless there are two files of it.
"""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError

COLUMNS = ("file", "caption")
SUFFIX = ".txt"
# Captions beside videos may have the suffix that other trainers use.
BESIDE_SUFFIXES = (SUFFIX, ".caption")
# Texts that lie beside videos and are no captions.
_OTHER_TEXTS = frozenset({
    "readme", "license", "licence", "copying", "notice", "changelog", "requirements",
})  # fmt: skip


# --- names ----------------------------------------------------------------------------------------


def key(name: str) -> str:
    """Return what names that differ in case, Unicode form or blanks around them have in common.

    Source: the Unicode Standard, section 3.13, canonical caseless matching.
    """
    form = unicodedata.normalize("NFD", name.strip()).casefold()
    return unicodedata.normalize("NFD", form).strip()


def by_key(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names by their key."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


@dataclass
class Owners:
    """Which file belongs to which video, by the video's name.

    Args:
        files: the one file of a video.
        unclear: files of which each may be the video's, or that may be another video's as well.
        unused: files that belong to no video, and those of which a better named one is used.
    """

    files: dict[str, Path] = field(default_factory=dict)
    unclear: dict[str, list[Path]] = field(default_factory=dict)
    unused: list[Path] = field(default_factory=list)


def owners(
    listed: Sequence[Path], videos: Collection[str], suffixes: Sequence[str] = (SUFFIX,)
) -> Owners:
    """Give each file to the video that it is named after: a.txt or a.mp4.txt to a.mp4.

    A file whose name is exact, with one of the suffixes, the first of them first, comes before
    those that differ in case or Unicode form.
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
        # Videos of one stem: the first one counts, the others are rejected for their name.
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
            # It is clear, whatever another file might be.
            found.unclear.pop(video, None)
    placed = {*found.files.values(), *(f for several in found.unclear.values() for f in several)}
    found.unused = [file for file in listed if file not in placed]
    return found


def _without_suffix(name: str) -> str:
    return name[: len(name.rstrip()) - len(PurePosixPath(name.rstrip()).suffix)]


def is_other_text(path: Path) -> bool:
    """True for a readme, a licence and the like, which belong to no video by intent."""
    return _without_suffix(path.name).lower() in _OTHER_TEXTS


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """List the files of a folder with one of some suffixes, in any case, hidden ones left out.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        shown = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
        return [p for p in shown if PurePosixPath(p.name.rstrip().lower()).suffix in suffixes]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}", code=ExitCode.DATASET, where=str(folder),
            fix="make it a folder that you may read",
        ) from error  # fmt: skip


# --- captions_file --------------------------------------------------------------------------------


def read(path: Path, videos: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Read the captions by the name of their video, and name each row that names no video.

    A row names a video by its file name, with or without folders in front, which may stand behind
    backslashes. An exact name wins over one that differs in case or Unicode form.

    Raises:
        UserError: there is no such file, or rows of it cannot be used; all of them are named.
    """
    captions: dict[str, str] = {}
    first: dict[str, int] = {}
    problems: list[UserError] = []
    unknown: list[str] = []
    rows: list[tuple[int, str, str]] = []
    for number, row in _rows(path):
        problem = row if isinstance(row, str) else _problem(row)
        if problem or isinstance(row, str):
            problems.append(_wrong_row(path, number, problem))
        else:
            rows.append((number, _base_name(row["file"], videos), row["caption"]))
    exact = {name for _, name, _ in rows if name in videos}
    alike = by_key(videos)
    for number, name, caption in rows:
        found = [name] if name in videos else alike.get(key(name), [])
        if len(found) > 1:
            what = f"names {name!r}, which may be {' or '.join(map(repr, sorted(found)))}"
            problems.append(_wrong_row(path, number, what))
            continue
        # The row whose name is exact holds.
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
    return UserError(what, code=ExitCode.DATASET, where=f"{path}:{number}")


def _base_name(text: str, videos: Collection[str]) -> str:
    name = PurePosixPath(text.strip()).name
    # A backslash may be part of a name here, and is none on Windows.
    return name if name in videos else PurePosixPath(name.replace("\\", "/")).name


def one_kind_of_line_end(text: str) -> str:
    """The text as it is read back from a file."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _problem(row: dict[Any, Any]) -> str:
    """What is wrong with a row, "" when nothing is."""
    for column in COLUMNS:
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"has no {column}"
    # What csv puts behind the last column.
    return "has more cells than the header; quote a caption with commas" if None in row else ""


def _rows(path: Path) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    """The line and the columns of every row; in place of the columns, what is wrong with it."""
    text = files.read_text(path, files.CAPTIONS_FILE)
    if path.suffix.lower() == ".csv":
        yield from _csv(path, text)
    elif path.suffix.lower() == ".jsonl":
        yield from _jsonl(text)
    else:
        raise UserError(
            "is neither .csv nor .jsonl",
            code=ExitCode.DATASET,
            where=str(path),
            fix=f"write a row of {' and '.join(COLUMNS)} for each video",
        )


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    if missing := [column for column in COLUMNS if column not in (reader.fieldnames or ())]:
        raise UserError(
            f"has no column {missing[0]!r} in its first line",
            code=ExitCode.DATASET,
            where=f"{path}:1",
            fix=f"start it with the line {','.join(COLUMNS)}",
        )
    line = reader.line_num + 1
    try:
        for row in reader:
            yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        yield line, f"is no CSV: {error}"


def _jsonl(text: str) -> Iterator[tuple[int, dict[Any, Any] | str]]:
    # Not splitlines, which also splits at characters that JSON allows in a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > files.CAPTION.limit:
            yield number, f"is longer than {files.CAPTION.limit:,} characters"
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"is no JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else "is no JSON object"


PREFIXES = ("Caption:", "#####", "####", "- ", "* ", ",")


SHORT_WORDS = 10


def clean(answer: str) -> str:
    """The caption in a model's answer, without line breaks, list marks, headings and quotes."""
    text = answer.replace("\r", " ").replace("\n", " ")
    text = re.sub(r"- \*\*(.*?)\*\*", _drop_short, text)
    for prefix in PREFIXES:
        text = text.removeprefix(prefix).lstrip() if text.startswith(prefix) else text
    return " ".join(text.split()).strip(" -,*:\"'\u201c\u201d\u2018\u2019")


def _drop_short(heading: re.Match[str]) -> str:
    return "" if len(re.findall(r"\w+", heading[1])) < SHORT_WORDS else heading[0]
