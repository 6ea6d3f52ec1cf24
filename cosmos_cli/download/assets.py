"""What a recipe needs from the hub: files of repositories, and where they go. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_cli import files, paths

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

DIT_PATTERNS = ("README.md", "LICENSE*", "model.pt", "config.json")
GUARD_PATTERNS = (
    "guardrail/blocklist/*", "guardrail/video_content_safety_filter/safety_filter.pt",
    "guardrail/face_blur_filter/Resnet50_Final.pth",
)  # fmt: skip
# By repository, which is their folder's name too.
OTHER_GUARDS = {
    paths.LLAMA_GUARD_DIR: ("README.md", "*.json", "tokenizer.*", "model*.safetensors"),
    paths.AEGIS_DIR: ("README.md", "adapter_config.json", "adapter_model.safetensors"),
    paths.SIGLIP_DIR: (
        "README.md", "config.json", "preprocessor_config.json", "model.safetensors",
    ),
}  # fmt: skip
TOKENIZER_PATTERNS = ("README.md", "config.json", "encoder.jit", "decoder.jit", "mean_std.pt")
UPSAMPLER_PATTERNS = ("README.md", "*.json", "tokenizer*", "model.pt")
TEXT_PATTERNS = ("config.json", "spiece.model", "tokenizer*.json")
TEXT_ORIGINAL = "pytorch_model.bin"
TEXT_THIRD_PARTY = "text_encoders/oldt5_xxl_fp16.safetensors"
TEXT_WEIGHTS = "model.safetensors"
# What a repository must have when it is asked for; texts and settings beside it come and go.
WEIGHTS = (".bin", ".jit", ".pt", ".pth", ".safetensors")

# MD5s of released weights by file name: what this code was written for. The tokenizer's are of
# nvidia-cosmos/cosmos-transfer1, scripts/download_checkpoints.py, SigLIP's and the face detector's
# of nvidia-cosmos/cosmos-predict2, the others of nvidia-cosmos/cosmos-predict1 at 4ed35fa,
# scripts/download_diffusion_checkpoints.py.
PUBLISHED_MD5 = {
    "nvidia/Cosmos-Predict1-7B-Text2World": {
        "model.pt": "fe9ed68e16cf37b10e7414c9b3ee81e1",
        "safety_filter.pt": "b46dc2ad821fc3b0d946549d7ade19cf",
        "Resnet50_Final.pth": "bce939bc22d8cec91229716dd932e56e",
    },
    "nvidia/Cosmos-Tokenize1-CV8x8x8-720p": {
        "encoder.jit": "f5834d03645c379bc0f8ad14b9bc0299",
        "decoder.jit": "ff21a63ed817ffdbe4b6841111ec79a8",
        "mean_std.pt": "f07680ad7eefae57d698778e2a0c7c96",
    },
    "nvidia/Cosmos-UpsamplePrompt1-12B-Text2World": {
        "model.pt": "52d7a6b8b1ac44d856b4c1ea3f8c8c74",
    },
    "google-t5/t5-11b": {"pytorch_model.bin": "f890878d8a162e0045a25196e27089a3"},
    "google/siglip-so400m-patch14-384": {"model.safetensors": "f4c887e55e159f96453e18a1d6ca984f"},
}

# The verbs that need something from the hub, in the order in which they are run.
STAGES = ("prep", "train", "generate")


@dataclass(frozen=True)
class Asset:
    """Some files of one hub repository and the folder they go to.

    `stages` are the verbs that read them. `target` renames the file of an asset that is one file.
    """

    repo: str
    kind: str
    folder: Path
    patterns: tuple[str, ...]
    revision: str | None = None
    stages: tuple[str, ...] = STAGES
    target: str = ""

    @property
    def url(self) -> str:
        """The page where a person reads the licence and asks for access."""
        middle = "datasets/" if self.kind == "dataset" else ""
        return f"https://huggingface.co/{middle}{self.repo}"

    @property
    def notes(self) -> Path:
        """Where the folder keeps what belongs to its downloads alone."""
        return self.folder / files.CACHE_DIR / "cosmos"

    @property
    def arrivals(self) -> Path:
        """Where files arrive; each moves to its place when it is whole and has the right hash."""
        return self.notes / "arriving"

    @property
    def record(self) -> Path:
        """What the hub said of the repository when these files were fetched."""
        return self.notes / f"{self.repo.replace('/', '--')}.json"

    def path(self, name: str) -> Path:
        """Where a file goes: as the hub has it, but the videos of a dataset all into `videos`."""
        if self.kind == "dataset" and Path(name).suffix.lower() in paths.VIDEO_SUFFIXES:
            return self.folder / "videos" / Path(name).name
        return self.folder / (self.target or name)


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it; `digest` is its sha256, or for small files the git hash."""

    name: str
    size: int
    digest: str
    is_git_hash: bool

    def is_at(self, path: Path) -> bool:
        """Whether what lies there is the hub's file, by size and hash."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if not self.is_git_hash:
            return files.sha256_file(path) == self.digest
        content = files.read_bytes(path, files.HUB_TEXT)
        header = f"blob {len(content)}\0".encode()
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == self.digest


def of_recipe(r: Recipe, stage: str = "all") -> list[Asset]:
    """What the hub has for a recipe, what is needed first first; for one of `STAGES` or all."""
    wanted = [*_dataset(r), *_models(r), *_upsampler(r)]
    wanted.sort(key=lambda asset: STAGES.index(asset.stages[0]))
    return [asset for asset in wanted if stage == "all" or stage in asset.stages]


def _dataset(r: Recipe) -> Iterator[Asset]:
    if r.dataset_repo and r.dataset_repo != "embedded":
        root, patterns = Path(r.dataset_dir).absolute(), (r.dataset_include or "*",)
        yield Asset(r.dataset_repo, "dataset", root, patterns, r.dataset_revision, ("prep",))


def _models(r: Recipe) -> Iterator[Asset]:
    if r.spec.embedded:
        return
    places = paths.model_files(r.spec, r.checkpoints_dir)
    repo, text, coded = f"nvidia/{r.spec.name}", places.text_encoder, ("prep", "generate")
    tokenizer = f"nvidia/{paths.TOKENIZER_DIR}"
    yield Asset(tokenizer, "model", places.tokenizer, TOKENIZER_PATTERNS, stages=coded)
    if r.text_encoder_repo == r.spec.text.name:
        original = (*TEXT_PATTERNS, TEXT_ORIGINAL)
        yield Asset(r.spec.text.name, "model", text, original, stages=coded)
    else:
        yield Asset(r.spec.text.name, "model", text, TEXT_PATTERNS, stages=coded)
        third, encoder = r.text_encoder_repo, (TEXT_THIRD_PARTY,)
        yield Asset(third, "model", text, encoder, stages=coded, target=TEXT_WEIGHTS)
    yield Asset(repo, "model", places.dit.parent, DIT_PATTERNS, stages=("train", "generate"))
    if r.guardrails == "on":
        yield Asset(repo, "model", places.dit.parent, GUARD_PATTERNS, stages=("generate",))
        for name, patterns in OTHER_GUARDS.items():
            folder = Path(r.checkpoints_dir).absolute() / name
            yield Asset(name, "model", folder, patterns, stages=("generate",))


def _upsampler(r: Recipe) -> Iterator[Asset]:
    folder = Path(r.upsampler).absolute()
    if folder.name == paths.UPSAMPLER_DIR:
        repo = f"nvidia/{folder.name}"
        yield Asset(repo, "model", folder, UPSAMPLER_PATTERNS, stages=("generate",))
