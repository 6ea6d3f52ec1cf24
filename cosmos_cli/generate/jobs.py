"""Read requests from options, files and standard input, and resolve each to a job. No torch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.paths import VIDEO_SUFFIXES
from cosmos_cli.spec import FAST_EXTRAPOLATION, FAST_GUIDED_ABOVE, FAST_LOG_SIGMAS

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# The keys that a line of a batch may have, and the recipe keys that they set.
LINE_KEYS = {
    "seed": "sampling_seed",
    "negative_prompt": "negative_prompt",
    "num_steps": "num_steps",
    "guidance": "guidance",
}
# The keys that were added to the hash of a video, and the values of the videos made before.
LATER_KEYS = {"speed": "exact", "sampling_precision": "bf16"}
# The text encoder reads about 2,500 characters. A far longer prompt is a file given by mistake.
MAX_CHARACTERS = 20_000


@dataclass(frozen=True)
class Lora:
    """Name a LoRA file, the strength it is applied with, and its hash.

    `config_sha256` is the hash of the adapter_config.json next to the file, which holds its scale.
    """

    path: Path
    strength: float
    sha256: str
    config_sha256: str = ""


@dataclass(frozen=True)
class Weights:
    """Name a denoiser's weights and the LoRAs that are applied to them without merging."""

    path: Path
    sha256: str
    loras: tuple[Lora, ...] = ()

    @property
    def identity(self) -> str:
        """Return the sha256 of the weights, combined with the hash and strength of every LoRA."""
        if not self.loras:
            return self.sha256
        applied = (
            f"{lora.sha256} {lora.strength!r} {lora.config_sha256}".rstrip() for lora in self.loras
        )
        return files.sha256_text(self.sha256, *applied)


@dataclass(frozen=True)
class Request:
    """Hold one line of a batch as the user wrote it: a prompt, or a JSON object with one."""

    text: str
    where: str = "--prompt"
    is_object: bool = False

    def read(self) -> tuple[str, dict[str, Any], str]:
        """Return the prompt, the recipe keys that the request changes, and the name of its file.

        The name is "" if the request has none.

        Raises:
            UserError: the text is not an object like {"prompt": "...", "seed": 1}.
        """
        if not self.is_object:
            return self.text, {}, ""
        try:
            entry = json.loads(self.text)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise self.error('is not an object like {"prompt": "...", "seed": 1}')
        known = ["prompt", "output", *LINE_KEYS]
        if unknown := sorted(entry.keys() - set(known)):
            close = difflib.get_close_matches(unknown[0].lower(), known, 1)
            fix = f"did you mean {close[0]!r}?" if close else f"a line may have {', '.join(known)}"
            raise self.error(f"has the unknown key {unknown[0]!r}", fix)
        if not isinstance(prompt := entry.pop("prompt", None), str):
            what = "has no prompt" if prompt is None else f"has the prompt {json.dumps(prompt)}"
            raise self.error(what, 'write it as in {"prompt": "...", "seed": 1}')
        output = entry.pop("output", "")
        return prompt, {LINE_KEYS[key]: value for key, value in entry.items()}, self._name(output)

    def _name(self, output: Any) -> str:
        """Return the name of the file that a line asks for.

        Raises:
            UserError: it is not the name of an mp4 file inside the folder of --output.
        """
        name = output if isinstance(output, str) else "/"
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not name.isprintable():
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
            return self.read()[0]
        except UserError:
            return ""

    def error(self, what: str, fix: str = "") -> UserError:
        """Return an error that names the place of the request."""
        return UserError(what, code=ExitCode.USAGE, where=self.where, fix=fix)


@dataclass(frozen=True)
class Settings:
    """Hold what all videos of a command share; `output` is an .mp4 file or a folder.

    `side` is what --compare calls these videos: base, post-trained, exact, fast or fp8.
    """

    r: Recipe
    weights: Weights
    output: Path
    overwrite: bool
    side: str = ""


@dataclass(frozen=True)
class Job:
    """Describe one video to generate; `r` includes the changes that its request makes."""

    prompt: str
    r: Recipe
    weights: Weights
    path: Path

    @property
    def key(self) -> str:
        """Return a hash that is equal for jobs that produce the same video."""
        names = self.r.deciding("video")
        values = [getattr(self.r, name) for name in names]
        # A video that was made before a key existed keeps its hash.
        while (name := names[len(values) - 1]) in LATER_KEYS and values[-1] == LATER_KEYS[name]:
            values.pop()
        if self.r.speed == "fast":
            # Videos of other levels, as of another version, are others.
            values += [FAST_LOG_SIGMAS, FAST_GUIDED_ABOVE, FAST_EXTRAPOLATION]
        return files.sha256_text(self.prompt, self.weights.identity, json.dumps(values))

    @property
    def stem(self) -> str:
        """Return a readable file name.

        Six digits of the key tell apart videos that differ in more than prompt and seed.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:48].strip("-")
        return "-".join(filter(None, [slug, self.key[:6], f"seed{self.r.sampling_seed}"]))

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the paths of a finished job, in the order of writing."""
        return tuple(self.path.with_suffix(suffix) for suffix in (".json", ".txt", ".jpg", ".mp4"))


@dataclass(frozen=True)
class Result:
    """Say what was made of a request: a video, or none because of an error or a dry run."""

    prompt: str
    job: Job | None = None
    error: UserError | None = None
    made: bool = False

    def record(self) -> dict[str, Any]:
        """Return the result as a JSON object for scripts."""
        code = self.error.code if self.error else ExitCode.OK
        about = {"status": "error" if code else "ok", "exit_code": int(code), "prompt": self.prompt}
        if self.job:
            about |= {"seed": self.job.r.sampling_seed, "path": str(self.job.path)}
            about["weights"] = str(self.job.weights.path)
        return {**about, "error": str(self.error)} if self.error else about


def to_json(job: Job) -> dict[str, Any]:
    """Return the job as JSON, for another process."""
    value = {"prompt": job.prompt, "r": job.r.model_dump(mode="json"), "path": str(job.path)}
    weights = asdict(job.weights)
    return {**value, "weights": json.loads(json.dumps(weights, default=str))}


def from_json(value: dict[str, Any]) -> Job:
    """Return the job that `to_json` wrote."""
    from cosmos_cli.recipe.keys import Recipe

    weights = value["weights"]
    loras = tuple(Lora(**{**lora, "path": Path(lora["path"])}) for lora in weights["loras"])
    return Job(
        value["prompt"],
        Recipe.model_validate(value["r"]),
        Weights(Path(weights["path"]), weights["sha256"], loras),
        Path(value["path"]),
    )


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
        raise UserError("holds no prompts", code=ExitCode.USAGE, where=str(path))
    return requests


def read_lines(lines: Iterable[str]) -> Iterator[Request]:
    """Yield the request of each line as it arrives; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if text := line.strip():
            yield Request(text, f"standard input:{number}", is_object=text.startswith("{"))


def resolve(request: Request, settings: Settings) -> Job:
    """Return the job of a request.

    Raises:
        UserError: the request cannot be read, its prompt is empty, not UTF-8 or too long, or a
            value is out of range.
    """
    prompt, changes, name = request.read()
    try:
        (prompt + str(changes.get("negative_prompt"))).encode()
    except UnicodeEncodeError as error:
        raise request.error("is not text", "write it as UTF-8") from error
    if not prompt.strip():
        raise request.error("the prompt is empty", "describe the video")
    if len(prompt) > MAX_CHARACTERS:
        fix = f"shorten it to at most {MAX_CHARACTERS:,}; the model reads far fewer"
        raise request.error(f"the prompt has {len(prompt):,} characters", fix)
    r = _with_changes(request, settings.r, changes)
    job = Job(prompt, r, settings.weights, settings.output.absolute())
    if job.path.suffix.lower() == ".mp4":
        if name:
            what = "names a file, and so does --output"
            raise request.error(what, "use `--output FOLDER`")
        return replace(job, path=job.path.with_suffix(".mp4"))
    return replace(job, path=job.path / (name or f"{job.stem}.mp4"))


def _with_changes(request: Request, r: Recipe, changes: dict[str, Any]) -> Recipe:
    from pydantic import ValidationError

    from cosmos_cli.recipe.keys import Recipe
    from cosmos_cli.recipe.rules import conflicts

    if not changes:
        return r
    try:
        changed = Recipe.model_validate({**r.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = next(k for k, name in LINE_KEYS.items() if name == first["loc"][0])
        raise request.error(f"{key} is {first['input']!r}: {first['msg']}") from error
    for _, what, fix in conflicts(changed):
        raise request.error(what, fix)
    return changed


def is_made(wanted: Job) -> bool:
    """True if the job's video exists and is complete.

    Raises:
        UserError: files of another video or program have the same names.
    """
    try:
        about = files.read_json(wanted.files[0])
    except UserError:
        about = None
    ours = isinstance(about, dict) and {"key", "mp4_sha256"} <= about.keys()
    if ours and about["key"] == wanted.key:
        return wanted.path.is_file() and files.sha256_file(wanted.path) == about["mp4_sha256"]
    if taken := next((path for path in wanted.files if path.exists()), None):
        raise UserError(
            "belongs to another video" if ours else "was not written by cosmos generate",
            code=ExitCode.USAGE, where=str(taken),
            fix="choose another --output, or replace it with `--overwrite`",
        )  # fmt: skip
    return False
