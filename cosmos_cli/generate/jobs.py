"""Read prompts from options, files and standard input, and plan a job for each. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# The keys that a line of a batch may have, and the recipe keys that they set.
LINE_KEYS = {
    "seed": "sampling_seed",
    "negative_prompt": "negative_prompt",
    "num_steps": "num_steps",
    "guidance": "guidance",
}
# The recipe keys that a video depends on. The rest is its prompt and its weights.
SETTINGS = (
    "model", "num_frames", "height", "width", "fps", "sampler", "num_steps", "guidance",
    "negative_prompt", "sampling_seed", "video_crf", "upsampler", "upsampler_word_limit",
    "guardrails",
)  # fmt: skip
# The text encoder reads about 2,500 characters. A far longer prompt is a file given by mistake.
MAX_CHARACTERS = 20_000


@dataclass(frozen=True)
class Lora:
    """A LoRA file, the strength it is applied with, and its hash.

    `config_sha256` is the hash of the adapter_config.json next to the file, which holds its scale.
    """

    path: Path
    strength: float
    sha256: str
    config_sha256: str = ""


@dataclass(frozen=True)
class Weights:
    """A denoiser's weights and the LoRAs that are applied to them without merging."""

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
class Wish:
    """One requested video: its prompt, its changes to sampling keys, and where it was read."""

    prompt: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    where: str = "--prompt"


@dataclass(frozen=True)
class Job:
    """One video to generate; `r` includes the changes that its own line makes."""

    prompt: str
    r: Recipe
    weights: Weights
    path: Path

    @property
    def key(self) -> str:
        """Return a hash that is equal for jobs that produce the same video."""
        return _key(self.prompt, self.r, self.weights)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the paths of a finished job, in the order of writing."""
        return tuple(self.path.with_suffix(suffix) for suffix in (".json", ".txt", ".jpg", ".mp4"))


def _key(prompt: str, r: Recipe, weights: Weights) -> str:
    settings = json.dumps([getattr(r, name) for name in SETTINGS])
    return files.sha256_text(prompt, weights.identity, settings)


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


# --- from text to requests ------------------------------------------------------------------------


def read_batch(path: Path) -> list[Wish | UserError]:
    """Return the request of each line of a JSONL file, or its error; blank lines are skipped.

    Raises:
        UserError: the file is missing, or holds no prompts.
    """
    lines = files.read_text(path, files.BATCH).split("\n")
    requests = [
        _from_object(line, f"{path}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise UserError("holds no prompts", code=ExitCode.USAGE, where=str(path))
    return requests


def read_lines(lines: Iterable[str]) -> Iterator[Wish | UserError]:
    """Yield the request of each line as it arrives, or its error; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        where = f"standard input:{number}"
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            yield Wish(line.strip(), where=where)
            continue
        yield _from_object(line, where)


def _from_object(line: str, where: str) -> Wish | UserError:
    """Return the request of a line like {"prompt": "...", "seed": 1}, or its error."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        return UserError(
            'is not an object like {"prompt": "...", "seed": 1}', code=ExitCode.USAGE, where=where
        )
    changes = {key: value for key, value in entry.items() if key != "prompt"}
    if unknown := sorted(changes.keys() - LINE_KEYS.keys()):
        return UserError(
            f"has the unknown key {unknown[0]!r}", code=ExitCode.USAGE, where=where,
            fix=f"a line may have prompt, {', '.join(LINE_KEYS)}",
        )  # fmt: skip
    return Wish(entry["prompt"], {LINE_KEYS[key]: value for key, value in changes.items()}, where)


# --- from requests to jobs ------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The state of a request: a job, done or still to do, or an error."""

    prompt: str
    job: Job | None = None
    error: UserError | None = None
    done: bool = False

    def record(self) -> dict[str, Any]:
        """Return the outcome as a JSON object for scripts."""
        code = self.error.code if self.error else ExitCode.OK
        about = {"status": "error" if code else "ok", "exit_code": int(code), "prompt": self.prompt}
        if self.job:
            about |= {"seed": self.job.r.sampling_seed, "path": str(self.job.path)}
        return {**about, "error": str(self.error)} if self.error else about


@dataclass(frozen=True)
class Order:
    """The settings that the videos of one command share; `output` is an .mp4 file or a folder."""

    r: Recipe
    weights: Weights
    output: Path
    overwrite: bool

    def place(self, request: Wish | UserError) -> Outcome:
        """Return the job of a request, done if its video exists already, or its error."""
        if isinstance(request, UserError):
            return Outcome("", error=request)
        try:
            job = self._job(request)
            with files.disk_errors(job.path):
                done = not self.overwrite and is_made(job)
        except UserError as error:
            return Outcome(request.prompt, error=error)
        if done:
            console.say(f"generated before, not again: {job.path}")
        return Outcome(request.prompt, job, done=done)

    def _job(self, request: Wish) -> Job:
        """Return the job of a request.

        Raises:
            UserError: the prompt is empty, not UTF-8 or too long, or a value is out of range.
        """
        _check_prompt(request)
        r = _with_changes(request, self.r)
        path = self.output.absolute()
        if path.suffix.lower() != ".mp4":
            stem = file_stem(request.prompt, _key(request.prompt, r, self.weights), r.sampling_seed)
            path /= f"{stem}.mp4"
        return Job(request.prompt, r, self.weights, path.with_suffix(".mp4"))


def _check_prompt(request: Wish) -> None:
    def bad(what: str, fix: str) -> UserError:
        return UserError(what, code=ExitCode.USAGE, where=request.where, fix=fix)

    try:
        (request.prompt + str(request.changes.get("negative_prompt"))).encode()
    except UnicodeEncodeError as error:
        raise bad("is not text", "write it as UTF-8") from error
    if not request.prompt.strip():
        raise bad("the prompt is empty", "describe the video")
    if len(request.prompt) > MAX_CHARACTERS:
        what = f"the prompt has {len(request.prompt):,} characters"
        raise bad(what, f"shorten it to at most {MAX_CHARACTERS:,}; the model reads far fewer")


def _with_changes(request: Wish, r: Recipe) -> Recipe:
    from pydantic import ValidationError

    from cosmos_cli.recipe.keys import Recipe

    if not request.changes:
        return r
    try:
        return Recipe.model_validate({**r.model_dump(), **request.changes})
    except ValidationError as error:
        first = error.errors()[0]
        key = next(k for k, name in LINE_KEYS.items() if name == first["loc"][0])
        what = f"{key} is {first['input']!r}: {first['msg']}"
        raise UserError(what, code=ExitCode.USAGE, where=request.where) from error


def file_stem(prompt: str, key: str, seed: int) -> str:
    """Return a readable file name.

    Six digits of the key tell apart videos that differ in other settings than prompt and seed.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return "-".join(filter(None, [slug, key[:6], f"seed{seed}"]))


# --- finished videos ------------------------------------------------------------------------------


def is_made(wanted: Job) -> bool:
    """True if the job's video exists and is complete.

    Raises:
        UserError: files of another video or program have the same names.
    """
    sidecar = wanted.files[0]
    about = _sidecar(sidecar)
    if about.get("key") == wanted.key:
        path = wanted.path
        return path.is_file() and files.sha256_file(path) == about["mp4_sha256"]
    if taken := next((path for path in wanted.files if path.exists()), None):
        what = (
            "belongs to another video" if "key" in about else "was not written by cosmos generate"
        )
        raise UserError(
            what, code=ExitCode.USAGE, where=str(taken),
            fix="choose another --output, or replace it with --overwrite",
        )  # fmt: skip
    return False


def _sidecar(path: Path) -> dict[str, Any]:
    """Return the sidecar of an earlier run, or {} if there is no valid one."""
    try:
        about = files.read_json(path)
    except UserError:
        return {}
    ours = isinstance(about, dict) and {"key", "mp4_sha256"} <= about.keys()
    return about if ours else {}
