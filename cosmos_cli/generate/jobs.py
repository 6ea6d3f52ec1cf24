"""Resolve requests to jobs: the videos to generate, each with all that decides it. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import files, hashes
from cosmos_cli.errors import ExitCode, UserError, usage_error
from cosmos_cli.generate.hash_cache import cached_sha256
from cosmos_cli.generate.requests import LINE_KEYS, Given, Request
from cosmos_cli.paths import VIDEO_SUFFIXES
from cosmos_cli.spec import (
    FAST_EXTRAPOLATION,
    FAST_GUIDED_ABOVE,
    FAST_LOG_SIGMAS,
    GIVEN_FRAMES,
    MODELS,
)

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Keys that were added to the hash later, with the values that earlier videos were made with.
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
        return hashes.sha256_text(self.sha256, *applied)


@dataclass(frozen=True)
class Settings:
    """Hold what all videos of a command share; `output` is an .mp4 file or a folder.

    `side` is what --compare calls these videos: base, post-trained, exact, fast or fp8. `given` is
    the input of requests that name none.
    """

    r: Recipe
    weights: Weights
    output: Path
    overwrite: bool
    side: str = ""
    given: Given | None = None
    segments: int = 1


@dataclass(frozen=True)
class Job:
    """Describe one video to generate; `r` includes the changes that its request makes.

    It has `segments` parts, each but the first the continuation of the one before.
    """

    prompt: str
    r: Recipe
    weights: Weights
    path: Path
    given: Given | None = None
    segments: int = 1

    @property
    def denoiser(self) -> tuple[Weights, str]:
        """Return what decides the denoiser's weights in memory: their files and the precision."""
        return self.weights, self.r.sampling_precision

    @property
    def key(self) -> str:
        """Return a hash that is equal for jobs that produce the same video."""
        names = self.r.deciding("video")
        values = [getattr(self.r, name) for name in names]
        # A video that was made before a key existed keeps its hash.
        while (name := names[len(values) - 1]) in LATER_KEYS and values[-1] == LATER_KEYS[name]:
            values.pop()
        if self.r.speed == "fast":
            # A later version may have other levels, which give other videos.
            values += [FAST_LOG_SIGMAS, FAST_GUIDED_ABOVE, FAST_EXTRAPOLATION]
        more = []
        if self.given:
            # Two keys of prep also decide what is seen of the input.
            more = [self.given.sha256, self.given.frames, self.r.resize, self.r.fps_policy]
            if self.given.is_video != (self.given.path.suffix.lower() in VIDEO_SUFFIXES):
                # An animated picture can also be read as a video.
                more.append("video" if self.given.is_video else "picture")
        if self.segments > 1:
            more.append(self.segments)
        parts = (self.prompt, self.weights.identity, json.dumps(values), *map(str, more))
        return hashes.sha256_text(*parts)

    @property
    def num_frames(self) -> int:
        """Return the frames of the whole video; a segment repeats the last ones before it."""
        own = self.r.num_frames
        return own + (self.segments - 1) * (own - GIVEN_FRAMES[-1])

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
            if self.job.given:
                about["input"] = str(self.job.given.path)
            if self.job.segments > 1:
                about |= {"segments": self.job.segments, "num_frames": self.job.num_frames}
        return {**about, "error": str(self.error)} if self.error else about


def to_json(job: Job) -> dict[str, Any]:
    """Return the job as JSON, for another process."""
    value = {
        "prompt": job.prompt,
        "r": job.r.model_dump(mode="json"),
        "path": job.path,
        "given": asdict(job.given) if job.given else None,
        "segments": job.segments,
        "weights": asdict(job.weights),
    }
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain


def from_json(value: dict[str, Any]) -> Job:
    """Return the job that `to_json` wrote."""
    from cosmos_cli.recipe.keys import Recipe

    weights = value["weights"]
    loras = tuple(Lora(**{**lora, "path": Path(lora["path"])}) for lora in weights["loras"])
    given = value["given"] and Given(**{**value["given"], "path": Path(value["given"]["path"])})
    return Job(
        value["prompt"],
        Recipe.model_validate(value["r"]),
        Weights(Path(weights["path"]), weights["sha256"], loras),
        Path(value["path"]),
        given,
        value["segments"],
    )


def resolve(request: Request, settings: Settings) -> Job:
    """Return the job of a request.

    Raises:
        UserError: the request cannot be read, its prompt is empty, not UTF-8 or too long, a value
            is out of range, or its input is missing or of no use to the model.
    """
    prompt, changes, name, given = request.read()
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
    given = _with_hash(request, r, given or settings.given)
    output, segments = settings.output.absolute(), settings.segments
    if segments > 1 and not r.spec.takes_frames:
        what = f"{r.model} cannot continue a video, so it has no --rollout"
        raise request.error(what, _other_model(r))
    job = Job(prompt, r, settings.weights, output, given, segments)
    if job.path.suffix.lower() == ".mp4":
        if name:
            what = "names a file, and so does --output"
            raise request.error(what, "use `--output FOLDER`")
        return replace(job, path=job.path.with_suffix(".mp4"))
    return replace(job, path=job.path / (name or f"{job.stem}.mp4"))


def _other_model(r: Recipe) -> str:
    """Return a fix: the Video2World model that shares the networks of the recipe's model."""
    twin = next((name for name, spec in MODELS.items() if spec.shared_with == r.spec), None)
    return f"use `--set model={twin}`" if twin else "use a recipe of a Video2World model"


def _with_hash(request: Request, r: Recipe, given: Given | None) -> Given | None:
    if given is None:
        return None
    if not r.spec.takes_frames:
        what = f"{r.model} cannot continue a picture or a video"
        raise request.error(what, _other_model(r))
    try:
        files.require_regular(given.path, files.INPUT)
    except UserError as error:
        if request.is_object:
            error.where = f"{request.where}: {error.where}"
        raise
    return replace(given, sha256=cached_sha256(given.path))


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
        return wanted.path.is_file() and hashes.sha256_file(wanted.path) == about["mp4_sha256"]
    if taken := next((path for path in wanted.files if path.exists()), None):
        what = "belongs to another video" if ours else "was not written by cosmos generate"
        raise usage_error(taken, what, "choose another --output, or replace it with `--overwrite`")
    return False
