"""Captions of many videos in one CSV or JSONL file. No torch."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_cli.errors import ExitCode, UserError

COLUMNS = ("file", "caption")


def read(path: Path, videos: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The captions by the name of their video, and a line on each row that names no video.

    A row names a video by its file name, with or without folders in front.

    Raises:
        UserError: there is no such file, or rows of it cannot be read; all of them are named.
    """
    captions: dict[str, str] = {}
    # A letter with an accent is one character or two, as whoever wrote it had it.
    names = {unicodedata.normalize("NFC", name): name for name in videos}
    first: dict[str, int] = {}
    problems: list[UserError] = []
    unknown: list[str] = []
    for number, row in _rows(path):
        where = f"{path}:{number}"
        problem = row if isinstance(row, str) else _problem(row)
        if problem or isinstance(row, str):
            problems.append(UserError(problem, code=ExitCode.DATASET, where=where))
            continue
        name = unicodedata.normalize("NFC", PurePosixPath(row["file"].strip()).name)
        if name in first:
            what = f"names {name!r} again, after line {first[name]}"
            problems.append(UserError(what, code=ExitCode.DATASET, where=where))
            continue
        first[name] = number
        if name in names:
            captions[names[name]] = one_kind_of_line_end(row["caption"]).strip()
        else:
            unknown.append(f"{where}: there is no video {name!r}")
    if problems:
        raise UserError(
            f"{len(problems)} lines cannot be used",
            code=ExitCode.DATASET,
            where=str(path),
            fix="see the reasons below",
            also=tuple(problems),
        )
    return captions, unknown


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
    try:
        # Editors on Windows put a mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise UserError(
            f"cannot be read: {what}",
            code=ExitCode.ASSET,
            where=str(path),
            fix="set captions_file to a CSV or JSONL file",
        ) from error
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
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, f"is no JSON: {error}"
            continue
        yield number, row if isinstance(row, dict) else "is no JSON object"
