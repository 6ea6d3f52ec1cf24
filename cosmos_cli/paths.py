"""Names of everything on disk. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmos_cli import files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.spec import ModelSpec

EMBEDDED_DIR = Path(__file__).parent / "model" / "tiny"
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".ogv", ".mxf", ".gif",
    ".y4m", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob",
})  # fmt: skip
MODEL_FILE = "model.pt"
# What a denoiser is called in a folder of ours, by format.
MODEL_FORMATS = {"pt": MODEL_FILE, "safetensors": "model.safetensors", "diffusers": "transformer"}
MANIFEST_FILE = "manifest.json"
# The LoRA beside a promoted model, if it was trained as one, and what LoRA folders of others hold.
LORA_FILE = "lora.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", LORA_FILE)
ADAPTER_CONFIG_FILE = "adapter_config.json"
TOKENIZER_DIR = "Cosmos-Tokenize1-CV8x8x8-720p"
TEXT_ENCODER_DIR = "google-t5/t5-11b"
SIGLIP_DIR = "google/siglip-so400m-patch14-384"
LLAMA_GUARD_DIR = "meta-llama/LlamaGuard-7b"
AEGIS_DIR = "nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0"
UPSAMPLER_DIR = "Cosmos-UpsamplePrompt1-12B-Text2World"


# --- a dataset ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """`datasets/<name>/`: the reference's videos, metas, t5_xxl; latents and manifest from prep."""

    root: Path
    videos: Path

    @classmethod
    def at(cls, dataset_dir: str, videos_dir: str | None) -> Dataset:
        """The dataset of a recipe; a folder of bare videos counts as its own `videos`."""
        root = Path(dataset_dir).absolute()
        if videos_dir:
            return cls(root, Path(videos_dir).absolute())
        below = root / "videos"
        with files.disk_errors(root):
            bare = not below.is_dir() and root.is_dir() and any(_videos_in(root))
        return cls(root, root if bare else below)

    @property
    def metas(self) -> Path:
        """Captions, `<stem>.txt`."""
        return self.root / "metas"

    @property
    def embeddings(self) -> Path:
        """Text embeddings, `<stem>.pickle`."""
        return self.root / "t5_xxl"

    @property
    def latents(self) -> Path:
        """Cached latents, `<stem>.<clip>.safetensors`."""
        return self.root / "latents"

    @property
    def captions(self) -> Path:
        """Where prep took each caption from, so that it knows its own files in `metas`."""
        return self.root / "prep_captions.json"

    @property
    def descriptions(self) -> Path:
        """What a vision-language model wrote about each video, `<stem>.json`."""
        return self.root / "vlm"

    @property
    def lock(self) -> Path:
        """By which the processes that prepare the dataset know one another."""
        return self.root / "prep.lock"

    @property
    def report(self) -> Path:
        """What prep found and made, to look at."""
        return self.root / "report.html"

    @property
    def manifest(self) -> Path:
        """What prep found and made; its presence means that prep finished."""
        return self.root / MANIFEST_FILE

    def read_manifest(self) -> dict[str, Any]:
        """What prep wrote.

        Raises:
            UserError: there is none, or it is not prep's.
        """
        if not self.manifest.exists():
            raise UserError(
                "the dataset is not prepared",
                code=ExitCode.DATASET,
                where=str(self.manifest),
                fix="run cosmos prep first",
            )
        manifest = files.read_json(self.manifest, files.MANIFEST)
        if not isinstance(manifest, dict) or not {"settings", "videos", "clips"} <= manifest.keys():
            raise UserError(
                "was not written by cosmos prep",
                code=ExitCode.DATASET,
                where=str(self.manifest),
                fix="move it away and run cosmos prep",
            )
        return manifest

    def video_files(self) -> list[Path]:
        """Every file whose suffix says video, by name.

        Raises:
            UserError: the folder does not exist or cannot be read.
        """
        try:
            return sorted(_videos_in(self.videos))
        except OSError as error:
            raise UserError(
                f"cannot be read: {os.strerror(error.errno or 0)}",
                code=ExitCode.DATASET,
                where=str(self.videos),
                fix="put the videos there, or set videos_dir or dataset_dir",
            ) from error


def split_clips(manifest: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The clips of a dataset to train on, and those of the videos that are held out."""
    held_out = {video["file"] for video in manifest["videos"] if video.get("split") == "heldout"}
    clips = manifest["clips"]
    return (
        [clip for clip in clips if clip["video"] not in held_out],
        [clip for clip in clips if clip["video"] in held_out],
    )


def _videos_in(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            yield path


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """`${OUTPUT_ROOT}/<project>/<group>/<name>/`: one training run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Model files of every save and the resume states of the last ones."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """What the run printed."""
        return self.root / "log" / "train.log"

    @property
    def status(self) -> Path:
        """Where the run stands now."""
        return self.root / "status.json"

    @property
    def result(self) -> Path:
        """How the run ended."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """Curves, settings and provenance on one page."""
        return self.root / "report.html"

    @property
    def save_request(self) -> Path:
        """Whoever makes this file has the run save its next step."""
        return self.root / "SAVE"

    @property
    def sample_request(self) -> Path:
        """Whoever makes this file has the run make samples after its next step."""
        return self.root / "SAMPLE"

    @property
    def samples(self) -> Path:
        """What the model made while it was trained."""
        return self.root / "samples"

    def preview(self, step: int) -> Path:
        """Clips of the dataset, and what one step of the denoiser makes of their noised latents."""
        return self.samples / f"step_{step:09d}_preview.jpg"

    def sample(self, step: int, index: int) -> Path:
        """A whole video by the model at a step; its contact sheet lies beside it, as .jpg."""
        return self.samples / f"step_{step:09d}_sample{index}.mp4"

    @property
    def sample_prompts(self) -> Path:
        """What the samples of every step were asked to show, in their order."""
        return self.samples / "prompts.json"

    @property
    def resolved(self) -> Path:
        """The recipe with every value filled in."""
        return self.root / "resolved.yaml"

    def picture_steps(self, kind: str) -> list[int]:
        """Steps that have pictures of a kind, "preview" or "sample0", ascending."""
        names = (path.name for path in self.samples.glob(f"step_*_{kind}.jpg"))
        return sorted(int(name.split("_")[1]) for name in names)

    def model(self, step: int, weights: str) -> Path:
        """The model file of a save; `weights` is reg or ema."""
        return self.checkpoints / f"iter_{step:09d}_{weights}_model.pt"

    def lora(self, step: int, weights: str) -> Path:
        """The LoRA file of a save, where the run trains one."""
        return self.checkpoints / f"iter_{step:09d}_{weights}_lora.safetensors"

    def resume_state(self, step: int) -> Path:
        """The folder a resume at `step` reads; complete when its manifest is there."""
        return self.checkpoints / f"iter_{step:09d}"

    def resumable_steps(self) -> list[int]:
        """Steps whose resume state is complete, ascending."""
        found = self.checkpoints.glob(f"iter_*/{MANIFEST_FILE}")
        names = (re.fullmatch(r"iter_(\d{9})", path.parent.name) for path in found)
        return sorted(int(name[1]) for name in names if name)

    @property
    def last_step(self) -> int:
        """The step that the run goes on from, 0 without a resume state."""
        return max(self.resumable_steps(), default=0)

    def saved_steps(self, weights: str) -> list[int]:
        """Steps that have a model or LoRA file, ascending."""
        found = self.checkpoints.glob(f"iter_*_{weights}_*")
        pattern = rf"iter_(\d{{9}})_{weights}_(model\.pt|lora\.safetensors)"
        names = (re.fullmatch(pattern, path.name) for path in found)
        return sorted(int(name[1]) for name in names if name)

    def weight_files(self, after: int = 0) -> dict[int, list[Path]]:
        """Return the model and LoRA files of later steps by step, ascending; first the EMA's."""
        saved = sorted({*self.saved_steps("ema"), *self.saved_steps("reg")})
        steps = [step for step in saved if step > after]
        named = {
            step: [name(step, kind) for kind in ("ema", "reg") for name in (self.model, self.lora)]
            for step in steps
        }
        # A link whose target is gone is still a file of the run.
        return {step: [p for p in paths if os.path.lexists(p)] for step, paths in named.items()}


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFiles:
    """Where the three networks of a model lie, and what guards them."""

    dit: Path
    tokenizer: Path
    text_encoder: Path
    guardrail: Path


def model_files(spec: ModelSpec, checkpoints_dir: str, base: str | None = None) -> ModelFiles:
    """The files of a model as downloaded, or inside the package; `base` replaces the denoiser."""
    if spec.embedded:
        found = ModelFiles(
            EMBEDDED_DIR / "model.safetensors",
            EMBEDDED_DIR / "tokenizer.safetensors",
            EMBEDDED_DIR / "t5",
            EMBEDDED_DIR / "guardrail",
        )
    else:
        root = Path(checkpoints_dir).absolute()
        found = ModelFiles(
            root / spec.name / MODEL_FILE,
            root / TOKENIZER_DIR,
            root / TEXT_ENCODER_DIR,
            root / spec.name / "guardrail",
        )
    return replace(found, dit=Path(base).absolute()) if base else found


def promoted_dir(spec: ModelSpec, checkpoints_dir: str, name: str | None = None) -> Path:
    """Return the folder of a promoted model; `name` is that of `cosmos promote --name`."""
    folder = f"{spec.name}_post-trained" + (f"_{name}" if name else "")
    return Path(checkpoints_dir).absolute() / folder


def weights_in(path: Path) -> Path:
    """The denoiser in a model folder, whichever its format; `path` itself where there is none."""
    found = (path / name for name in MODEL_FORMATS.values())
    # A link to nothing counts: weights that are missing must not pass for none.
    return next((file for file in found if os.path.lexists(file)), path)
