"""List the repository files that a recipe needs from the hub, and where they go. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import files, hashes, paths
from cosmos_cli.errors import asset_error

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

# Where a person reads a licence and asks for access.
HOME = "https://huggingface.co"
DIT_PATTERNS = ("README.md", "LICENSE*", "model.pt", "config.json")
GUARD_PATTERNS = (
    "guardrail/blocklist/*", "guardrail/video_content_safety_filter/safety_filter.pt",
    "guardrail/face_blur_filter/Resnet50_Final.pth",
)  # fmt: skip
# The key is the repository and also the name of its folder.
OTHER_GUARDS = {
    paths.LLAMA_GUARD_DIR: ("README.md", "*.json", "tokenizer.*", "model*.safetensors"),
    paths.AEGIS_DIR: ("README.md", "adapter_config.json", "adapter_model.safetensors"),
    paths.SIGLIP_DIR: (
        "README.md", "config.json", "preprocessor_config.json", "model.safetensors",
    ),
}  # fmt: skip
TOKENIZER_PATTERNS = ("README.md", "config.json", "encoder.jit", "decoder.jit", "mean_std.pt")
UPSAMPLER_PATTERNS = ("README.md", "*.json", "tokenizer*", "model.pt")
UPSAMPLER_FIX = "run `cosmos download RECIPE --for generate`, or add `--set upsampler=off`"
TEXT_PATTERNS = ("config.json", "spiece.model", "tokenizer*.json")
TEXT_ORIGINAL = "pytorch_model.bin"
TEXT_THIRD_PARTY = "text_encoders/oldt5_xxl_fp16.safetensors"
TEXT_WEIGHTS = "model.safetensors"
# The recipe keys of the models of evaluate's scores, and their files. Only SigLIP has texts.
FEATURE_KEYS = ("likeness_model", "match_model", "distance_model")
FEATURE_PATTERNS = ("README.md", "LICENSE*", "*config.json", "tokenizer.json", "model.safetensors")
# Suffixes of the files that a repository must have. Its texts and settings may change.
WEIGHTS = (".bin", ".jit", ".pt", ".pth", ".safetensors")

# MD5s of the released weights that this code was written for, by file name.
# Source: nvidia-cosmos/cosmos-transfer1, scripts/download_checkpoints.py, for the tokenizer;
# nvidia-cosmos/cosmos-predict2 for SigLIP and the face detector; nvidia-cosmos/cosmos-predict1 at
# 4ed35fa, scripts/download_diffusion_checkpoints.py, for the others.
PUBLISHED_MD5 = {
    "nvidia/Cosmos-Predict1-7B-Text2World": {
        "model.pt": "fe9ed68e16cf37b10e7414c9b3ee81e1",
        "safety_filter.pt": "b46dc2ad821fc3b0d946549d7ade19cf",
        "Resnet50_Final.pth": "bce939bc22d8cec91229716dd932e56e",
    },
    "nvidia/Cosmos-Predict1-7B-Video2World": {
        "model.pt": "ebcdb19c4c4a6a0e1e0bb65e346f6867",
        "safety_filter.pt": "b46dc2ad821fc3b0d946549d7ade19cf",
        "Resnet50_Final.pth": "bce939bc22d8cec91229716dd932e56e",
    },
    "nvidia/Cosmos-Tokenize1-CV8x8x8-720p": {
        "encoder.jit": "f5834d03645c379bc0f8ad14b9bc0299",
        "decoder.jit": "ff21a63ed817ffdbe4b6841111ec79a8",
        "mean_std.pt": "f07680ad7eefae57d698778e2a0c7c96",
    },
    "nvidia/Cosmos-UpsamplePrompt1-12B-Text2World": {
        "model.pt": "52d7a6b8b1ac44d856b4c1ea3f8c8c74"
    },
    "google-t5/t5-11b": {"pytorch_model.bin": "f890878d8a162e0045a25196e27089a3"},
    "google/siglip-so400m-patch14-384": {"model.safetensors": "f4c887e55e159f96453e18a1d6ca984f"},
}

# The commands that need files from the hub, in the order in which they are run.
STAGES = ("prep", "train", "generate")
# No other command needs its models, so they are fetched only for it.
EVALUATE = "evaluate"


@dataclass(frozen=True)
class Asset:
    """Some files of one hub repository and the folder they go to.

    `stages` are the commands that read them. `target` is the new name of a single-file asset.
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
        """The repository's page on huggingface.co, whichever hub is asked."""
        middle = "datasets/" if self.kind == "dataset" else ""
        return f"{HOME}/{middle}{self.repo}"

    @property
    def notes(self) -> Path:
        """The subfolder for the records, lock and unfinished files of downloads."""
        return self.folder / files.CACHE_DIR / "cosmos"

    @property
    def arrivals(self) -> Path:
        """The folder for unfinished downloads. A file moves to its place once its hash is right."""
        return self.notes / "arriving"

    @property
    def record(self) -> Path:
        """The record of a download: its commit, and the files with sizes and hashes."""
        return self.notes / f"{self.repo.replace('/', '--')}.json"

    def path(self, name: str) -> Path:
        """Return the local path of a file. The videos of a dataset all go to `videos`."""
        if self.kind == "dataset" and Path(name).suffix.lower() in paths.VIDEO_SUFFIXES:
            return self.folder / "videos" / Path(name).name
        return self.folder / (self.target or name)


@dataclass(frozen=True)
class RemoteFile:
    """One file as listed by the hub. `digest` is its sha256, or the git hash of a small file."""

    name: str
    size: int
    digest: str
    is_git_hash: bool

    @classmethod
    def of_sibling(cls, sibling: Any) -> RemoteFile:
        """Return the file that an entry of huggingface_hub's `siblings` describes."""
        if lfs := sibling.lfs:
            return cls(sibling.rfilename, lfs.size, lfs.sha256, is_git_hash=False)
        return cls(sibling.rfilename, sibling.size or 0, sibling.blob_id or "", is_git_hash=True)

    def is_at(self, path: Path) -> bool:
        """True if the file at `path` has the hub's size and hash."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if not self.is_git_hash:
            return hashes.sha256_file(path) == self.digest
        content = files.read_bytes(path, files.HUB_TEXT)
        header = f"blob {len(content)}\0".encode()
        return hashlib.sha1(header + content, usedforsecurity=False).hexdigest() == self.digest


def require_networks(r: Recipe, *networks: Path) -> None:
    """Check, without reading them, that the files or folders of networks exist.

    A dry run ends with the same code as the command, which finds out when it loads them.

    Raises:
        UserError: one is missing.
    """
    for path in networks:
        if not path.exists():
            fix = "run `cosmos download RECIPE`"
            raise asset_error(path.absolute(), f"a file that {r.model} needs is missing", fix)


def require_upsampler(folder: Path) -> None:
    """Check, without reading it, that a folder holds a released or a transformers chat model.

    Raises:
        UserError: there is none.
    """
    if not any((folder / name).is_file() for name in (paths.MODEL_FILE, "config.json")):
        raise asset_error(folder.absolute(), "there is no prompt upsampler", UPSAMPLER_FIX)


def of_recipe(r: Recipe, stage: str = "all") -> list[Asset]:
    """Return the assets of a recipe for one of `STAGES` or "all", ordered by first use.

    The models of evaluate's scores are those of the stage `EVALUATE` alone.
    """
    if stage == EVALUATE:
        return list(_features(r))
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


def feature_folder(r: Recipe, key: str) -> Path | None:
    """Return the folder of the model that one of `FEATURE_KEYS` names, None if it is off."""
    name = str(getattr(r, key))
    if name == "off":
        return None
    given = Path(name)
    return (given if given.is_dir() else Path(r.checkpoints_dir) / given).absolute()


def _features(r: Recipe) -> Iterator[Asset]:
    for key in FEATURE_KEYS:
        name, folder = getattr(r, key), feature_folder(r, key)
        own = folder and Path(name).is_absolute() and folder.is_dir()
        if folder and not own and folder == (Path(r.checkpoints_dir) / name).absolute():
            yield Asset(name, "model", folder, FEATURE_PATTERNS, stages=(EVALUATE,))


def _upsampler(r: Recipe) -> Iterator[Asset]:
    folder = Path(r.upsampler).absolute()
    if folder.name == paths.UPSAMPLER_DIR:
        repo = f"nvidia/{folder.name}"
        yield Asset(repo, "model", folder, UPSAMPLER_PATTERNS, stages=("generate",))
