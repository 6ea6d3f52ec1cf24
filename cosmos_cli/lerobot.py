"""LeRobot datasets, v2.1 and v3.0, as they lie on disk: which frames of which file an episode has.

v2.1 has one mp4 for each episode and camera; v3.0 puts many episodes into one mp4 and their places
into parquet files. Source: huggingface/lerobot, docs/source/lerobot-dataset-v3.mdx. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_cli import layout
from cosmos_cli.errors import ExitCode, UserError

INFO = Path("meta") / "info.json"
VERSIONS = ("v2.1", "v3.0")


@dataclass(frozen=True)
class Episode:
    """One episode as one camera saw it: `frames` frames of a file from number `first` on."""

    name: str
    path: Path
    first: int
    frames: int
    task: str


def is_lerobot(folder: Path) -> bool:
    """Whether a folder is a LeRobot dataset."""
    return (folder / INFO).is_file()


def episodes(folder: Path, camera: str | None) -> list[Episode]:
    """Every episode of a dataset in order, seen by `camera`, or by the only one it has.

    Raises:
        UserError: the camera must be chosen or does not exist, a file is damaged, or pyarrow is
            missing.
    """
    info = _info(folder)
    key = _choose(folder, camera, info["cameras"])
    rows = _v3_rows(folder, key) if info["version"] == "v3.0" else _v2_rows(folder)
    try:
        found = [_episode(folder, info, key, row) for row in rows]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise _damaged(folder / "meta", error) from error
    return sorted(found, key=lambda episode: episode.name)


def _episode(folder: Path, info: dict[str, Any], key: str, row: dict[str, Any]) -> Episode:
    index, length = int(row["episode_index"]), int(row["length"])
    names = {"video_key": key, "episode_index": index}
    first = 0
    if info["version"] == "v3.0":
        # Frames of a file are evenly spaced, so a time is a number of frames.
        first = round(row[f"videos/{key}/from_timestamp"] * info["fps"])
        names |= {"chunk_index": int(row[f"videos/{key}/chunk_index"])}
        names |= {"file_index": int(row[f"videos/{key}/file_index"])}
    else:
        names |= {"episode_chunk": index // info["chunk"]}
    return Episode(
        name=f"episode_{index:06d}",
        path=folder / info["video_path"].format(**names),
        first=first,
        frames=length,
        task="; ".join(str(task).strip() for task in row["tasks"] if str(task).strip()),
    )


def _info(folder: Path) -> dict[str, Any]:
    path = folder / INFO
    content = layout.read_json(path)
    try:
        version = content["codebase_version"]
        found = {
            "version": version,
            "fps": float(content["fps"]),
            "video_path": str(content["video_path"]),
            "chunk": int(content.get("chunks_size", 1000)),
            "cameras": [k for k, v in content["features"].items() if v["dtype"] == "video"],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    if version not in VERSIONS:
        raise UserError(
            f"is a LeRobot dataset of version {version}, {' and '.join(VERSIONS)} are read",
            code=ExitCode.DATASET,
            where=str(folder),
            fix="convert it with the scripts of lerobot",
        )
    return found


def _choose(folder: Path, camera: str | None, names: list[str]) -> str:
    if camera is None and len(names) == 1:
        return names[0]
    # The last part of a key is what people call the camera.
    matches = [name for name in names if camera in (name, name.rpartition(".")[2])]
    if len(matches) == 1:
        return matches[0]
    what = f"has no camera {camera!r}" if camera else f"has {len(names)} cameras"
    raise UserError(
        what,
        code=ExitCode.DATASET,
        where=str(folder),
        fix=f"set camera to one of {', '.join(sorted(names))}" if names else "it has no videos",
    )


def _v2_rows(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "meta" / "episodes.jsonl"
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                yield json.loads(line)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _v3_rows(folder: Path, key: str) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            "reading a LeRobot dataset of version v3.0 needs pyarrow",
            code=ExitCode.ENVIRONMENT,
            where=str(folder),
            fix='run pip install -e ".[lerobot]" in the clone',
        ) from error
    place = ("chunk_index", "file_index", "from_timestamp")
    columns = ["episode_index", "length", "tasks", *(f"videos/{key}/{name}" for name in place)]
    paths = sorted((folder / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not paths:
        raise _damaged(folder / "meta" / "episodes", "no parquet files")
    for path in paths:
        try:
            yield from parquet.read_table(path, columns=columns).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"is no part of a LeRobot dataset: {why!r}",
        code=ExitCode.DATASET,
        where=str(path),
        fix="fetch the dataset again",
    )
