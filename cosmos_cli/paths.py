"""Name every file and folder that cosmos reads or writes. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import files
from cosmos_cli.errors import dataset_error

if TYPE_CHECKING:
    from cosmos_cli.spec import ModelSpec

EMBEDDED_DIR = Path(__file__).parent / "model" / "tiny"
VIDEO_SUFFIXES = frozenset({
    ".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".flv", ".wmv", ".ogv", ".mxf", ".gif",
    ".y4m", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob",
})  # fmt: skip
# Folders that hold no videos of the user: macOS puts one into its archives, ext4 into each disk.
_NO_VIDEOS = frozenset({"__MACOSX", "lost+found"})
# The file by which a LeRobot dataset is known. `prep.lerobot` finds its episodes.
LEROBOT_INFO = Path("meta") / "info.json"
MODEL_FILE = "model.pt"
# The denoiser's file name in a model folder, by format.
MODEL_FORMATS = {"pt": MODEL_FILE, "safetensors": "model.safetensors", "diffusers": "transformer"}
MANIFEST_FILE = "manifest.json"
# The LoRA file next to a promoted model that was trained as one. Then the file names that peft,
# diffusers and cosmos use for a LoRA.
LORA_FILE = "lora.safetensors"
# The same LoRA for ComfyUI and diffusion-pipe.
COMFYUI_LORA_FILE = "lora_comfyui.safetensors"
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
    """The folder `datasets/<name>/`.

    It has the reference's `videos`, `metas` and `t5_xxl`, and the latents and manifest that prep
    writes.
    """

    root: Path
    videos: Path

    @classmethod
    def at(cls, dataset_dir: str, videos_dir: str | None) -> Dataset:
        """Return the dataset of a recipe.

        If `dataset_dir` has no folder `videos` but holds video files, it is its own `videos`.
        """
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
        """The source of each caption. It tells prep which files in `metas` are its own."""
        return self.root / "prep_captions.json"

    @property
    def descriptions(self) -> Path:
        """Descriptions of the videos by a vision-language model, `<stem>.json`."""
        return self.root / "vlm"

    @property
    def lock(self) -> Path:
        """The lock file that keeps two processes from preparing the dataset at once."""
        return self.root / "prep.lock"

    @property
    def report(self) -> Path:
        """Prep's report for people: what it found and wrote."""
        return self.root / "report.html"

    @property
    def manifest(self) -> Path:
        """Prep's report for programs. If it exists, prep has finished."""
        return self.root / MANIFEST_FILE

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest that prep wrote.

        Raises:
            UserError: there is no manifest, or prep did not write it.
        """
        if not self.manifest.exists():
            fix = "run `cosmos prep RECIPE` first"
            raise dataset_error(self.manifest, "the dataset is not prepared", fix)
        manifest = files.read_json(self.manifest, files.MANIFEST)
        if not isinstance(manifest, dict) or not {"settings", "videos", "clips"} <= manifest.keys():
            fix = "move it away and run `cosmos prep RECIPE`"
            raise dataset_error(self.manifest, "was not written by cosmos prep", fix)
        return manifest

    def video_files(self) -> list[Path]:
        """Return every file with a video suffix in the folder and below it, sorted by path.

        A LeRobot dataset has none, since a file in it may be many episodes or a part of one.

        Raises:
            UserError: the folder or one in it does not exist or cannot be read.
        """
        if any((folder / LEROBOT_INFO).is_file() for folder in (self.root, self.videos)):
            return []
        try:
            return sorted(_videos_in(self.videos))
        except OSError as error:
            what = f"cannot be read: {os.strerror(error.errno or 0)}"
            fix = "put the videos there, or use `--set videos_dir=FOLDER`"
            raise dataset_error(error.filename or str(self.videos), what, fix) from error

    def name_of(self, video: Path) -> str:
        """Return the name of a video: its path in the folder, with "__" for each slash."""
        return "__".join(video.relative_to(self.videos).parts)


def _videos_in(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the videos in a folder and below it, except hidden ones."""
    real = folder.resolve()
    if real in above:
        # A link leads back to a folder above it.
        return
    with os.scandir(folder) as entries:
        shown = [folder / entry.name for entry in entries if not entry.name.startswith(".")]
    for path in shown:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            yield path
        elif path.name not in _NO_VIDEOS and path.is_dir():
            yield from _videos_in(path, (*above, real))


# --- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The folder of a training run, `${OUTPUT_ROOT}/<project>/<group>/<name>/`."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """The model files of every save and the resume states of the last few."""
        return self.root / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.root / "metrics.jsonl"

    @property
    def log(self) -> Path:
        """Everything that the run printed."""
        return self.root / "log" / "train.log"

    @property
    def status(self) -> Path:
        """The current progress of the run, and the process that reports it."""
        return self.root / "status.json"

    @property
    def result(self) -> Path:
        """The outcome of the run."""
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        """Curves, settings and provenance on one page."""
        return self.root / "report.html"

    @property
    def scores(self) -> Path:
        """The scores of its saves, as of `cosmos evaluate --steps`."""
        return self.root / "scores.json"

    @property
    def save_request(self) -> Path:
        """Create this file to make the run save its next step."""
        return self.root / "SAVE"

    @property
    def sample_request(self) -> Path:
        """Create this file to make the run generate samples after its next step."""
        return self.root / "SAMPLE"

    @property
    def samples(self) -> Path:
        """Previews and sample videos generated during training."""
        return self.root / "samples"

    def preview(self, step: int) -> Path:
        """Return the preview: dataset clips, and one denoising step from their noised latents."""
        return self.samples / f"step_{step:09d}_preview.jpg"

    def sample(self, step: int, index: int) -> Path:
        """Return the sample video of a step. Its contact sheet has the same name, with .jpg."""
        return self.samples / f"step_{step:09d}_sample{index}.mp4"

    def sample_prompts(self, step: int) -> Path:
        """Return the file of the prompts of a step's samples, in the order of their indices."""
        return self.samples / f"step_{step:09d}_prompts.json"

    @property
    def resolved(self) -> Path:
        """The recipe with every value filled in."""
        return self.root / "resolved.yaml"

    def picture_steps(self, kind: str) -> list[int]:
        """Return the steps with pictures of a kind, such as "preview" or "sample0", ascending."""
        names = (path.name for path in self.samples.glob(f"step_*_{kind}.jpg"))
        return sorted(int(name.split("_")[1]) for name in names)

    def model(self, step: int, weights: str) -> Path:
        """Return the model file of a save. `weights` is "reg" or "ema"."""
        return self.checkpoints / f"iter_{step:09d}_{weights}_model.pt"

    def lora(self, step: int, weights: str) -> Path:
        """Return the LoRA file of a save. Only runs that train a LoRA have one."""
        return self.checkpoints / f"iter_{step:09d}_{weights}_lora.safetensors"

    def resume_state(self, step: int) -> Path:
        """Return the folder that a resume at `step` reads, complete once it has a manifest."""
        return self.checkpoints / f"iter_{step:09d}"

    def resumable_steps(self) -> list[int]:
        """Return the steps whose resume state is complete, ascending."""
        found = self.checkpoints.glob(f"iter_*/{MANIFEST_FILE}")
        names = (re.fullmatch(r"iter_(\d{9})", path.parent.name) for path in found)
        return sorted(int(name[1]) for name in names if name)

    @property
    def last_step(self) -> int:
        """The step that the run resumes from, 0 if it has no resume state."""
        return max(self.resumable_steps(), default=0)

    def saved_steps(self, weights: str) -> list[int]:
        """Return the steps that have a model or LoRA file, ascending."""
        found = self.checkpoints.glob(f"iter_*_{weights}_*")
        pattern = rf"iter_(\d{{9}})_{weights}_(model\.pt|lora\.safetensors)"
        names = (re.fullmatch(pattern, path.name) for path in found)
        return sorted(int(name[1]) for name in names if name)

    def weight_files(self, after: int = 0) -> dict[int, list[Path]]:
        """Return the model and LoRA files by step, for steps above `after`, ascending.

        Within a step, the EMA files come first.
        """
        saved = sorted({*self.saved_steps("ema"), *self.saved_steps("reg")})
        steps = [step for step in saved if step > after]
        named = {
            step: [name(step, kind) for kind in ("ema", "reg") for name in (self.model, self.lora)]
            for step in steps
        }
        # `lexists`: a broken link is still a file of the run.
        return {step: [p for p in paths if os.path.lexists(p)] for step, paths in named.items()}


# --- models ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFiles:
    """The paths of a model's three networks and of its guardrail."""

    dit: Path
    tokenizer: Path
    text_encoder: Path
    guardrail: Path


def model_files(spec: ModelSpec, checkpoints_dir: str, base: str | None = None) -> ModelFiles:
    """Return the paths of a downloaded or embedded model.

    `base` replaces the denoiser's: a file, or a folder that holds one in any format.
    """
    if spec.embedded:
        found = ModelFiles(
            EMBEDDED_DIR
            / ("video2world.safetensors" if spec.takes_frames else "model.safetensors"),
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
    return replace(found, dit=weights_in(Path(base).absolute())) if base else found


def promoted_dir(spec: ModelSpec, checkpoints_dir: str, name: str | None = None) -> Path:
    """Return the folder of a promoted model. `name` is the value of `cosmos promote --name`."""
    folder = f"{spec.name}_post-trained" + (f"_{name}" if name else "")
    return Path(checkpoints_dir).absolute() / folder


def weights_in(path: Path) -> Path:
    """Return the denoiser in a model folder, in any format, or `path` itself if it has none."""
    found = (path / name for name in MODEL_FORMATS.values())
    # `lexists`: a broken link must be reported as missing weights, not as a folder without any.
    return next((file for file in found if os.path.lexists(file)), path)
