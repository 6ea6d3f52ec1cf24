"""Read requests for videos from options, files and standard input. No torch."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from cosmos_cli import files
from cosmos_cli.errors import UserError, usage_error
from cosmos_cli.paths import VIDEO_SUFFIXES
from cosmos_cli.spec import GIVEN_FRAMES

# The keys that a line of a batch may have, and the recipe keys that they set.
LINE_KEYS = {
    "seed": "sampling_seed",
    "negative_prompt": "negative_prompt",
    "num_steps": "num_steps",
    "guidance": "guidance",
}
# The keys of a line that name a picture or a video to continue; the last is that of NVIDIA's
# command.
_INPUT_KEYS = ("image", "video", "visual_input")


@dataclass(frozen=True)
class Given:
    """Name the picture, or the last `frames` frames of the video, that a video continues."""

    path: Path
    is_video: bool
    frames: int
    sha256: str = ""


class Wanted(NamedTuple):
    """Hold what a request asks for: the prompt, recipe keys that it changes, a file name, an input.

    The name is "" and the input None if the request has none.
    """

    prompt: str
    changes: dict[str, Any]
    name: str = ""
    given: Given | None = None


class _Twice(ValueError):
    """A JSON object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict.

    Raises:
        _Twice: a key is there twice, of which Python would take the last.
    """
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise _Twice(name)
    return dict(pairs)


@dataclass(frozen=True)
class Request:
    """Hold one line of a batch as the user wrote it: a prompt, or a JSON object with one."""

    text: str
    where: str = "--prompt"
    is_object: bool = False

    def read(self) -> Wanted:
        """Return what the request asks for.

        Raises:
            UserError: the text is not an object like {"prompt": "...", "seed": 1}.
        """
        if not self.is_object:
            return Wanted(self.text, {})
        try:
            entry = json.loads(self.text, object_pairs_hook=_object)
        except _Twice as error:
            raise self.error(f"has the key {str(error)!r} twice", "leave one out") from error
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise self.error('is not an object like {"prompt": "...", "seed": 1}')
        known = ["prompt", "output", *_INPUT_KEYS, "num_input_frames", *LINE_KEYS]
        if unknown := sorted(entry.keys() - set(known)):
            close = difflib.get_close_matches(unknown[0].lower(), known, 1)
            fix = f"did you mean {close[0]!r}?" if close else f"a line may have {', '.join(known)}"
            raise self.error(f"has the unknown key {unknown[0]!r}", fix)
        if not isinstance(prompt := entry.pop("prompt", None), str):
            what = "has no prompt" if prompt is None else f"has the prompt {json.dumps(prompt)}"
            raise self.error(what, 'write it as in {"prompt": "...", "seed": 1}')
        name, given = self._name(entry.pop("output", "")), self._input(entry)
        changes = {LINE_KEYS[key]: value for key, value in entry.items() if key in LINE_KEYS}
        return Wanted(prompt, changes, name, given)

    def _input(self, entry: dict[str, Any]) -> Given | None:
        """Return the picture or video that a line names.

        Raises:
            UserError: it names two, or something else than a file.
        """
        named = {key: entry[key] for key in _INPUT_KEYS if key in entry}
        count = entry.get("num_input_frames")
        if len(named) > 1:
            raise self.error(f"names both {' and '.join(named)}", "name one of them")
        if not named:
            if count is not None:
                raise self.error("num_input_frames needs a video", 'add "video": "FILE"')
            return None
        key, path = next(iter(named.items()))
        if not isinstance(path, str) or not path:
            raise self.error(f"{key} is {json.dumps(path)[:60]}", f'write it as "{key}": "FILE"')
        is_video = key == "video" or Path(path).suffix.lower() in VIDEO_SUFFIXES
        return self.given(files.expand(path), is_video and key != "image", count)

    def given(self, path: Path, is_video: bool, count: Any) -> Given:
        """Return an input of which `count` frames are used; None takes as many as it can give.

        Raises:
            UserError: `count` is not 1 or 9, or is above 1 for a picture.
        """
        most = GIVEN_FRAMES[-1] if is_video else 1
        count = most if count is None else count
        if type(count) is not int or count not in GIVEN_FRAMES:
            fix = f"use {' or '.join(map(str, GIVEN_FRAMES))}"
            raise self.error(f"the number of input frames is {count!r}", fix)
        if count > most:
            raise self.error(f"a picture is one frame, not {count}", "give a video, or 1 frame")
        return Given(path.absolute(), is_video, count)

    def _name(self, output: Any) -> str:
        """Return the name of the file that a line asks for.

        Raises:
            UserError: it is not the name of an mp4 file inside the folder of --output.
        """
        name = output if isinstance(output, str) else "/"
        path = PurePosixPath(name)
        nameless = name and path.name.lower() in ("", ".mp4")
        if nameless or path.is_absolute() or ".." in path.parts or not name.isprintable():
            shown = json.dumps(output)
            fix = 'write it as in {"prompt": "...", "output": "robot/pour.mp4"}'
            raise self.error(f"output {shown[:60]} is not a file inside --output", fix)
        if path.suffix.lower() == ".mp4":
            path = path.with_suffix("")
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            raise self.error(f"{path.suffix} files are not written", "name an .mp4 file")
        return f"{path}.mp4" if path.name else ""

    @property
    def prompt(self) -> str:
        """Return the prompt, or "" if the text cannot be read."""
        try:
            return self.read().prompt
        except UserError:
            return ""

    @property
    def has_input(self) -> bool:
        """True if the request names a picture or a video, as far as it can be read."""
        try:
            return self.read().given is not None
        except UserError:
            return False

    def error(self, what: str, fix: str = "") -> UserError:
        """Return an error that names the place of the request."""
        return usage_error(self.where, what, fix)


def read_batch(path: Path) -> list[Request]:
    """Return the request of each line of a JSONL file; blank lines are skipped.

    Raises:
        UserError: the file is missing, or holds no prompts.
    """
    lines = files.read_text(path, files.BATCH).split("\n")
    requests = [
        Request(line, f"{path}:{number}", is_object=True)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise usage_error(path, "holds no prompts")
    return requests


def read_lines(lines: Iterable[str]) -> Iterator[Request]:
    """Yield the request of each line as it arrives; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if text := line.strip():
            yield Request(text, f"standard input:{number}", is_object=text.startswith("{"))
