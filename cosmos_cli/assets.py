"""What a recipe needs from the hub: files of repositories, and where they go. No torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, layout
from cosmos_cli.errors import ExitCode, UserError

if TYPE_CHECKING:
    from cosmos_cli.keys import Recipe

DIT_PATTERNS = ("README.md", "LICENSE*", "model.pt", "config.json")
GUARD_PATTERNS = (
    "guardrail/blocklist/*", "guardrail/video_content_safety_filter/safety_filter.pt",
)  # fmt: skip
SIGLIP_PATTERNS = ("README.md", "config.json", "preprocessor_config.json", "model.safetensors")
TOKENIZER_PATTERNS = ("README.md", "config.json", "encoder.jit", "decoder.jit", "mean_std.pt")
UPSAMPLER_PATTERNS = ("README.md", "*.json", "tokenizer*", "model.pt")
TEXT_PATTERNS = ("config.json", "spiece.model", "tokenizer*.json")
TEXT_ORIGINAL = "pytorch_model.bin"
TEXT_THIRD_PARTY = "text_encoders/oldt5_xxl_fp16.safetensors"
TEXT_WEIGHTS = "model.safetensors"

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
        return self.folder / layout.CACHE_DIR / "cosmos"

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
        if self.kind == "dataset" and Path(name).suffix.lower() in layout.VIDEO_SUFFIXES:
            return self.folder / "videos" / Path(name).name
        return self.folder / (self.target or name)


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub describes it; `digest` is its sha256, or for small files the git hash."""

    name: str
    size: int
    digest: str
    is_git_hash: bool


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
    files = layout.model_files(r.spec, r.checkpoints_dir)
    repo, text, coded = f"nvidia/{r.spec.name}", files.text_encoder, ("prep", "generate")
    tokenizer = f"nvidia/{layout.TOKENIZER_DIR}"
    yield Asset(tokenizer, "model", files.tokenizer, TOKENIZER_PATTERNS, stages=coded)
    if r.text_encoder_repo == r.spec.text.name:
        original = (*TEXT_PATTERNS, TEXT_ORIGINAL)
        yield Asset(r.spec.text.name, "model", text, original, stages=coded)
    else:
        yield Asset(r.spec.text.name, "model", text, TEXT_PATTERNS, stages=coded)
        third, encoder = r.text_encoder_repo, (TEXT_THIRD_PARTY,)
        yield Asset(third, "model", text, encoder, stages=coded, target=TEXT_WEIGHTS)
    yield Asset(repo, "model", files.dit.parent, DIT_PATTERNS, stages=("train", "generate"))
    if r.guardrails == "on":
        yield Asset(repo, "model", files.dit.parent, GUARD_PATTERNS, stages=("generate",))
        siglip = Path(r.checkpoints_dir).absolute() / layout.SIGLIP_DIR
        yield Asset(layout.SIGLIP_DIR, "model", siglip, SIGLIP_PATTERNS, stages=("generate",))


def _upsampler(r: Recipe) -> Iterator[Asset]:
    folder = Path(r.upsampler).absolute()
    if folder.name == layout.UPSAMPLER_DIR:
        repo = f"nvidia/{folder.name}"
        yield Asset(repo, "model", folder, UPSAMPLER_PATTERNS, stages=("generate",))


# --- T5 -------------------------------------------------------------------------------------------


def require_t5(path: Path, asset: Asset) -> None:
    """Refuses a file that is not the encoder that `config.json` beside it describes.

    transformers would fill in what is missing with random numbers. What is there beyond it is
    ignored.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    header = _safetensors_header(path)
    for name, shape in _t5_shapes(layout.read_json(asset.folder / "config.json")).items():
        found = header.get(name, {}).get("shape")
        if found != shape:
            path.unlink()
            raise UserError(
                f"{name} has the shape {found}, T5's encoder has {shape}; the file was removed",
                code=ExitCode.ASSET,
                where=asset.url,
                fix="set text_encoder_repo to google-t5/t5-11b",
            )


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Names, types and shapes of a file's tensors; nothing for what is no such file.

    Source: huggingface/safetensors, README.md, which also limits the header's length.
    """
    with path.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header: dict[str, Any] = json.loads(stream.read(min(length, 10**8)))
        except (struct.error, ValueError):
            return {}
    return header


def _t5_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    """Names and shapes of the encoder's tensors, as transformers has them for T5 1.0."""
    width, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes = {
        "shared.weight": [config["vocab_size"], width],
        "encoder.final_layer_norm.weight": [width],
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": [
            config["relative_attention_num_buckets"],
            config["num_heads"],
        ],
    }
    for i in range(config["num_layers"]):
        attention, feed = (f"encoder.block.{i}.layer.{layer}" for layer in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{part}.weight": [inner, width] for part in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = [width, inner]
        shapes[f"{feed}.DenseReluDense.wi.weight"] = [hidden, width]
        shapes[f"{feed}.DenseReluDense.wo.weight"] = [width, hidden]
        shapes |= {f"{layer}.layer_norm.weight": [width] for layer in (attention, feed)}
    return shapes


def require_one_encoder(asset: Asset) -> None:
    """Two files of T5's weights in one folder: transformers would read the safetensors."""
    original, other = asset.folder / TEXT_ORIGINAL, asset.folder / TEXT_WEIGHTS
    if TEXT_ORIGINAL in asset.patterns and other.exists():
        raise UserError(
            f"would be read instead of {TEXT_ORIGINAL}",
            code=ExitCode.ASSET,
            where=str(other),
            fix="delete it, or set text_encoder_repo to where it came from",
        )
    if asset.target and original.exists():
        size = console.size(layout.size_of(original))
        console.say(f"{original} is not read any more and may be deleted: {size}")
