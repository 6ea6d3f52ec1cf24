"""Read LeRobot datasets v2 and v3.0: the video file and the frames of each episode. No torch.

v2.0 and v2.1 differ in statistics only; they have one mp4 per episode and camera. v3.0 puts many
episodes into one mp4 and their positions into parquet files. The metadata is untrusted: each value
has a range, and the path of a video, as written, must lie inside the dataset. A video may be a link
to any place, because the hub's cache consists of such links. An episode with an invalid row is
rejected by name; the others are used.
Source: huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx.
"""

from __future__ import annotations

import json
import os
import re
import string
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

from cosmos_cli import archives, files, paths
from cosmos_cli.errors import UserError, dataset_error, environment_error

VERSIONS = ("v2.0", "v2.1", "v3.0")
# The largest published datasets have some 100,000 episodes.
MOST_ROWS = 300_000
MOST_FRAMES = 10**7
MOST_INDEX = 10**9
LONGEST_ROW = 10**6
LONGEST_PATH = 1000
LONGEST_TASK, MOST_TASKS = 10_000, 100
# Limits for one row group of a parquet file, over the columns that are read.
MOST_VALUES, MOST_BYTES = 5_000_000, 256 * files.MB
ROWS_AT_ONCE = 500
# The fields that video_path may contain.
V2_FIELDS = ("video_key", "episode_index", "episode_chunk")
V3_FIELDS = ("video_key", "episode_index", "chunk_index", "file_index")
# The format of an integer with leading zeros, such as 06d.
_FORMAT = re.compile(r"(0?([1-9]|1[0-2]))?d?")
_PLACE = ("chunk_index", "file_index", "from_timestamp")


@dataclass(frozen=True)
class Episode:
    """One episode from one camera: `frames` frames of the file, starting at frame `first`.

    If its row is unusable, `reason` says why, and `path` is the metadata file with that row.
    """

    name: str
    path: Path
    first: int
    frames: int
    task: str
    reason: str = ""


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("is not valid Unicode") from error
    if "\0" in text:
        raise ValueError("contains a NUL")
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Index = Annotated[int, Field(ge=0, le=MOST_INDEX)]


class Info(BaseModel):
    """The fields of info.json that prep reads."""

    codebase_version: Text
    fps: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
    video_path: Annotated[Text, Field(max_length=LONGEST_PATH)]
    chunks_size: Annotated[int, Field(ge=1, le=MOST_INDEX)] = 1000
    features: dict[Text, Any]

    @property
    def cameras(self) -> list[str]:
        """The feature keys of the videos."""
        features = self.features.items()
        return [k for k, v in features if isinstance(v, dict) and v.get("dtype") == "video"]


class Row(BaseModel):
    """The metadata of an episode that both versions have."""

    episode_index: Index
    length: Annotated[int, Field(ge=1, le=MOST_FRAMES)]
    tasks: Annotated[
        list[Annotated[Text, Field(max_length=LONGEST_TASK)]],
        Field(max_length=MOST_TASKS),
        BeforeValidator(lambda tasks: [tasks] if isinstance(tasks, str) else tasks),
    ]


class PlacedRow(Row):
    """The metadata of an episode in v3.0, which adds the position of its video."""

    chunk_index: Index
    file_index: Index
    from_timestamp: Annotated[float, Field(ge=0, le=MOST_FRAMES, allow_inf_nan=False)]


# The file of a row, the position in that file, and the content or, as a string, the problem.
Found = tuple[Path, str, Any]


def is_lerobot(folder: Path) -> bool:
    """True if a folder is a LeRobot dataset."""
    return (folder / paths.LEROBOT_INFO).is_file()


def episodes(folder: Path, camera: str | None) -> list[Episode]:
    """Return every episode of a dataset in order, from `camera` or from its only camera.

    Raises:
        UserError: the camera does not exist or must be chosen, a file is damaged or points outside
            of the dataset, or pyarrow is missing.
    """
    info = _info(folder)
    key = _choose(folder, camera, info.cameras)
    _check_path(folder, info, key)
    rows = _v3_rows(folder, key) if info.codebase_version == "v3.0" else _v2_rows(folder)
    found: dict[str, Episode] = {}
    wrong: list[tuple[str, Episode]] = []
    for number, (path, where, content) in enumerate(rows):
        if number >= MOST_ROWS:
            raise _damaged(path, f"it has more than {MOST_ROWS:,} episodes")
        try:
            episode = _episode(folder, info, key, content)
        except ValueError as error:
            reason = f"its row cannot be used: {_reason(error)}"
            wrong.append((where, Episode(_name(content) or where, path, 0, 0, "", reason)))
            continue
        first = found.setdefault(episode.name, episode)
        if first is not episode:
            wrong.append((where, replace(episode, path=path, reason="it is listed twice")))
            if astuple(first)[:-1] != astuple(episode)[:-1]:
                # Nothing tells which of the two is right, so both are rejected.
                reason = "it is listed twice, and the two differ"
                found[episode.name] = replace(first, reason=reason)
    for where, episode in wrong:
        name = f"{episode.name}, {where}" if episode.name in found else episode.name
        found[name] = replace(episode, name=name)
    return sorted(found.values(), key=lambda episode: episode.name)


def _name(content: Any) -> str:
    """Return the name of a row's episode, "" if the row has no valid index."""
    index = content.get("episode_index") if isinstance(content, dict) else None
    known = isinstance(index, int) and 0 <= index <= MOST_INDEX
    return f"episode_{index:06d}" if known else ""


def _episode(folder: Path, info: Info, key: str, content: Any) -> Episode:
    """Return the episode of a row.

    Raises:
        ValueError: the row is invalid; the message says why.
    """
    if isinstance(content, str):
        raise ValueError(content)
    for name, value in content.items():
        if isinstance(value, Exception):
            raise ValueError(f"{name} cannot be read: {value}")
    placed = info.codebase_version == "v3.0"
    row = (PlacedRow if placed else Row).model_validate(content)
    names: dict[str, Any] = {"video_key": key, "episode_index": row.episode_index}
    first = 0
    if isinstance(row, PlacedRow):
        # The frames of a file are evenly spaced, so a time converts to a frame number.
        first = round(row.from_timestamp * info.fps)
        names |= {"chunk_index": row.chunk_index, "file_index": row.file_index}
    else:
        names |= {"episode_chunk": row.episode_index // info.chunks_size}
    return Episode(
        name=f"episode_{row.episode_index:06d}",
        path=folder / os.path.normpath(info.video_path.format(**names)),
        first=first,
        frames=row.length,
        task="; ".join(task.strip() for task in row.tasks if task.strip()),
    )


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    found = "it is missing" if first["type"] == "missing" else first["msg"]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {found}"


def _info(folder: Path) -> Info:
    path = folder / paths.LEROBOT_INFO
    content = files.read_json(path, files.LEROBOT)
    version = content.get("codebase_version") if isinstance(content, dict) else None
    if isinstance(version, str) and version not in VERSIONS:
        what = f"is a LeRobot dataset of version {version[:60]!r}, not one of {', '.join(VERSIONS)}"
        raise dataset_error(folder, what, "convert it with LeRobot's conversion scripts")
    try:
        return Info.model_validate(content)
    except ValidationError as error:
        raise _damaged(path, _reason(error)) from error


def _check_path(folder: Path, info: Info, key: str) -> None:
    """Check that video_path contains only known fields and stays inside the dataset.

    The numbers in a path contain neither a slash nor a dot, so checking one episode is enough.

    Raises:
        UserError: video_path contains another field or leads out of the dataset.
    """
    known = V3_FIELDS if info.codebase_version == "v3.0" else V2_FIELDS
    try:
        for _, name, form, conversion in string.Formatter().parse(info.video_path):
            if name is None:
                continue
            allowed = name in known and not conversion
            if not allowed or not (_FORMAT.fullmatch(form or "") if name != known[0] else not form):
                text = name + (f":{form}" if form else "")
                raise ValueError(
                    f"video_path holds {{{text[:60]}}}, it may hold {', '.join(known)}"
                )
        path = os.path.normpath(
            info.video_path.format(**{known[0]: key}, **dict.fromkeys(known[1:], 0))
        )
    except ValueError as error:
        raise _damaged(folder / paths.LEROBOT_INFO, error) from error
    if Path(path).is_absolute() or Path(path).parts[:1] == (os.pardir,):
        what = f"video_path leads to {path[:200]}, outside of the dataset"
        raise _damaged(folder / paths.LEROBOT_INFO, what)


def _choose(folder: Path, camera: str | None, names: list[str]) -> str:
    if camera is None and len(names) == 1:
        return names[0]
    # People call a camera by the last part of its key.
    matches = [name for name in names if camera in (name, name.rpartition(".")[2])]
    if len(matches) == 1:
        return matches[0]
    what = f"has no camera {camera!r}" if camera else f"has {len(names)} cameras"
    fix = (
        f"use `--set camera={min(names)}`, or another of {', '.join(sorted(names)[:20])}"
        if names
        else "it has no videos"
    )
    raise dataset_error(folder, what, fix)


def _v2_rows(folder: Path) -> Iterator[Found]:
    path = folder / "meta" / "episodes.jsonl"
    number = 0
    with files.open_regular(path, files.LEROBOT) as stream:
        while line := stream.readline(LONGEST_ROW):
            number += 1
            where = f"{path.name} line {number}"
            if stream.tell() > files.LEROBOT.limit:
                raise _damaged(path, f"it is larger than {files.LEROBOT.limit:,} bytes")
            if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                yield path, where, f"it is longer than {LONGEST_ROW:,} bytes"
                while (rest := stream.readline(LONGEST_ROW)) and not rest.endswith(b"\n"):
                    pass
            elif line.strip():
                yield path, where, _object(line)


def _object(line: bytes) -> Any:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"it is not valid JSON: {error}"
    return content if isinstance(content, dict) else "it is not a JSON object"


def _v3_rows(folder: Path, key: str) -> Iterator[Found]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        what = "reading a LeRobot dataset of version v3.0 needs pyarrow"
        fix = 'run `pip install -e ".[lerobot]"` in the clone'
        raise environment_error(folder, what, fix) from error
    names = {f"videos/{key}/{name}": name for name in _PLACE}
    names |= {name: name for name in ("episode_index", "length", "tasks")}
    root = folder / "meta" / "episodes"
    found = sorted(root.glob("chunk-*/file-*.parquet"))
    if not found:
        raise _damaged(root, "there are no parquet files")
    for path in found:
        where = f"{path.parent.name} {path.name}"
        with files.open_regular(path, files.PARQUET) as stream:
            try:
                number = 0
                for batch in _batches(parquet, stream, list(names)):
                    for content in _contents(batch, names):
                        number += 1
                        yield path, f"{where} row {number}", content
            except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
                # KeyError: two columns have the same name.
                raise _damaged(path, error) from error


def _batches(parquet: Any, stream: Any, columns: list[str]) -> Iterator[Any]:
    """Yield the rows of the columns in batches.

    Raises:
        ValueError: the file exceeds a limit.
    """
    limits = {
        "thrift_string_size_limit": archives.HEADER_LIMIT,
        "thrift_container_size_limit": MOST_VALUES,
    }
    metadata = parquet.ParquetFile(stream, **limits).metadata
    if metadata.num_rows > MOST_ROWS:
        raise ValueError(f"it has more than {MOST_ROWS:,} episodes")
    texts = set()
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in range(group.num_columns)]
        chunks = [
            c
            for c in chunks
            if c.path_in_schema in columns or c.path_in_schema.startswith("tasks.")
        ]
        if any(chunk.num_values > MOST_VALUES for chunk in chunks):
            raise ValueError(f"a row group has more than {MOST_VALUES:,} values")
        if sum(chunk.total_uncompressed_size for chunk in chunks) > MOST_BYTES:
            raise ValueError(f"a row group takes more than {MOST_BYTES:,} bytes")
        texts |= {c.path_in_schema for c in chunks if c.physical_type == "BYTE_ARRAY"}
    # Read texts as dictionaries, so that a text that the file repeats is in memory only once.
    reader = parquet.ParquetFile(stream, read_dictionary=sorted(texts), **limits)
    yield from reader.iter_batches(ROWS_AT_ONCE, columns=columns)


def _contents(batch: Any, names: dict[str, str]) -> Iterator[Any]:
    """Yield each row as a dict of its values, or its problem as a string.

    The value of a cell that cannot be read is the exception.
    """
    import pyarrow
    from pyarrow import compute

    columns = {names[name]: batch.column(name) for name in batch.schema.names if name in names}
    tasks: Any = columns.get("tasks")
    listed = tasks is not None and pyarrow.types.is_list(tasks.type)
    bytes_of = None
    if listed and pyarrow.types.is_dictionary(tasks.values.type):
        bytes_of = compute.binary_length(tasks.values.dictionary)
    for i in range(batch.num_rows):
        row = {name: column[i] for name, column in columns.items()}
        if bytes_of is not None and row["tasks"].is_valid:
            texts = row["tasks"].values
            if len(texts) > MOST_TASKS:
                yield f"tasks: there are more than {MOST_TASKS}"
                continue
            if (compute.max(bytes_of.take(texts.indices)).as_py() or 0) > 4 * LONGEST_TASK:
                yield f"tasks: one is longer than {LONGEST_TASK:,} characters"
                continue
        content: dict[str, Any] = {}
        for name, value in row.items():
            try:
                content[name] = value.as_py()
            except (ValueError, OverflowError) as error:
                # A text that is not UTF-8, or a date that Python cannot hold.
                content[name] = error
        yield content


def _damaged(path: Path, why: object) -> UserError:
    fix = "download the dataset again"
    return dataset_error(path, f"is not part of a valid LeRobot dataset: {why}", fix)
