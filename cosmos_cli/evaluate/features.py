"""Score videos by the features of pretrained vision models.

These are the likeness to training clips, the match with the prompt and the distance to held-out
clips. transformers' processors of tensors need torchvision, which has no wheel for a CPU build of
torch. So frames are prepared here, with the values of the model's preprocessor_config.json.

Letters: C channels, T frames, H height, W width, D features.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_cli import console, files
from cosmos_cli.download import assets
from cosmos_cli.model import pretrained
from cosmos_cli.model.finite import require_finite
from cosmos_cli.prep.holdout import spread
from cosmos_cli.recipe.keys import Recipe

LIKENESS, MATCH, DISTANCE = "likeness", "prompt match", "held-out distance"
# The recipe key of each score's model.
KEYS = dict(zip((LIKENESS, MATCH, DISTANCE), assets.FEATURE_KEYS, strict=True))
# What each score means, and which direction is better.
MEANINGS = {
    LIKENESS: (
        "mean cosine similarity of a video's frames to frames of the training clips, in features "
        "of DINOv2; 1 for equal frames", "higher",
    ),
    MATCH: (
        "mean cosine similarity of a video's frames to its prompt, in features of SigLIP, which "
        "reads the first 64 tokens of a prompt", "higher",
    ),
    DISTANCE: (
        "kernel distance between all videos and the held-out clips as the tokenizer decodes them, "
        "in features of V-JEPA 2; about 0 if they cannot be told apart, with p above 0.05", "lower",
    ),
}  # fmt: skip
# Evenly spaced frames of a video, and of each training clip.
FRAMES, CLIP_FRAMES = 8, 4
# From a larger dataset only this many clips are read.
TRAINING_CLIPS, HELD_OUT_CLIPS = 64, 256
# SigLIP was trained on texts padded to this many tokens.
TOKENS = 64
FIX = "run `cosmos download RECIPE --for evaluate`"


@dataclass(frozen=True)
class Plan:
    """The scores that can be measured, with their models, and why the others cannot."""

    folders: dict[str, Path]
    reasons: dict[str, str]
    missing: tuple[str, ...]


def plan_scores(r: Recipe, videos: int, training: int, held_out: int) -> Plan:
    """Return which scores can be measured on these numbers of videos and clips.

    A score whose model is off is not mentioned. With the embedded model, whose world has a scorer
    of its own, neither are scores whose default models are missing.
    """
    lacks = {
        LIKENESS: "" if training else "there are no training clips",
        MATCH: "",
        DISTANCE: "it needs 2 held-out clips" if held_out < 2 else
        "it needs 2 videos" if videos < 2 else "it needs videos of 2 frames" * (r.num_frames < 2),
    }  # fmt: skip
    found = Plan({}, {}, ())
    missing = []
    for score, key in KEYS.items() if videos else ():
        folder = assets.feature_folder(r, key)
        if folder is None:
            continue
        if lacks[score]:
            found.reasons[score] = lacks[score]
        elif (folder / "config.json").is_file():
            found.folders[score] = folder
        elif Path(getattr(r, key)).is_absolute():
            found.reasons[score] = f"there is no model in {folder}"
        elif not r.spec.embedded or getattr(r, key) != Recipe.model_fields[key].default:
            found.reasons[score] = f"{folder} is missing"
            missing.append(score)
    return Plan(found.folders, found.reasons, tuple(missing))


# --- the models -----------------------------------------------------------------------------------


class Preparation:
    """Resize, crop and normalise frames as a model's preprocessor_config.json says.

    Raises:
        KeyError, TypeError, ValueError, BadFile: the settings are missing or of another form.
    """

    def __init__(self, folder: Path) -> None:
        own = folder / "video_preprocessor_config.json"
        path = own if own.is_file() else folder / "preprocessor_config.json"
        about = files.read_json(path, files.MODEL_SETTINGS)
        self.size: dict[str, int] = about["size"]
        crop = about.get("crop_size") if about.get("do_center_crop", True) else None
        self.crop = (crop, crop) if isinstance(crop, int) else crop and _sides(crop)
        # The numbers are those of Pillow.
        self.mode = {2: "bilinear", 3: "bicubic"}[about["resample"]]
        self.mean, self.std = torch.tensor([about["image_mean"], about["image_std"]])
        if self.crop and min(self.resized(*self.crop)) < max(self.crop):
            raise ValueError(f"its frames are resized to {self.size}, below crop_size {self.crop}")

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width that frames of a size are resized to."""
        if "shortest_edge" not in self.size:
            return _sides(self.size)
        edge = self.size["shortest_edge"]
        if height <= width:
            return edge, int(edge * width / height)
        return int(edge * height / width), edge

    @property
    def shape(self) -> tuple[int, int]:
        """The height and width of prepared frames of a square video."""
        return self.crop or self.resized(1, 1)

    def __call__(self, frames_TCHW: Tensor) -> Tensor:
        """Return uint8 frames as the model reads them, (T, C, height, width) in fp32."""
        size = self.resized(*frames_TCHW.shape[-2:])
        x = F.interpolate(
            frames_TCHW.float(), size, mode=self.mode, antialias=True, align_corners=False
        )
        # Pillow rounds to bytes, also between rows and columns, so a value may differ by one level.
        x = x.round().clamp(0, 255)
        if self.crop:
            top, left = ((old - new) // 2 for old, new in zip(size, self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (values.to(x)[:, None, None] for values in (self.mean, self.std))
        return (x / 255 - mean) / std


def _sides(size: dict[str, int]) -> tuple[int, int]:
    return size["height"], size["width"]


class Encoder:
    """A model of transformers with the preparation of its frames, in fp32.

    Raises:
        UserError: (ASSET) a file is missing or damaged.
    """

    def __init__(self, kind: Any, folder: Path) -> None:
        self.folder = folder
        with pretrained.reading_pretrained(folder, "is not a complete model", FIX):
            self.prepare = Preparation(folder)
            self.model = pretrained.load_model(kind, folder, torch.float32).eval()
        require_finite(self.model.state_dict(), folder)

    def to(self, device: str) -> Encoder:
        """Move the model to a device and return it."""
        self.model.to(device)
        return self

    def frames(self, pixels_CTHW: Tensor, count: int) -> Tensor:
        """Return evenly spaced frames of a uint8 video, prepared, on the model's device."""
        chosen = spread(pixels_CTHW.shape[1], count)
        return self.prepare(pixels_CTHW[:, chosen].movedim(0, 1).to(self.model.device))


class Likeness(Encoder):
    """The likeness of a video to the training clips, in features of DINOv2.

    It is the mean cosine similarity of all pairs of frames.

    Source: Ruiz et al. 2023, DreamBooth, metric DINO.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import Dinov2Model

        super().__init__(Dinov2Model, folder)
        self.clips_D: Tensor | None = None

    def learn(self, clips: Iterable[Tensor]) -> None:
        """Set the training clips, uint8 (3, T, H, W)."""
        self.clips_D = torch.stack([self._mean(clip, CLIP_FRAMES) for clip in clips]).mean(0)

    def score(self, pixels_CTHW: Tensor, prompt: str) -> float:
        """Return the likeness of a uint8 video, from -1 to 1."""
        # The mean of the products of all pairs is the product of the means.
        return float(self._mean(pixels_CTHW, FRAMES) @ self.clips_D)

    def _mean(self, pixels_CTHW: Tensor, count: int) -> Tensor:
        """Return the mean of the unit feature vectors of some frames."""
        frames = self.frames(pixels_CTHW, count)
        return F.normalize(self.model(pixel_values=frames).pooler_output, dim=1).mean(0)


class Match(Encoder):
    """The match of a video with its prompt: mean cosine similarity of frames and text in SigLIP.

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import PreTrainedTokenizerFast, SiglipModel

        super().__init__(SiglipModel, folder)
        with pretrained.reading_pretrained(folder, "has no complete tokenizer", FIX):
            if not (folder / "tokenizer.json").is_file():
                raise ValueError("it has no tokenizer.json")
            self.tokenizer = pretrained.load_pretrained(PreTrainedTokenizerFast, folder)
            if self.tokenizer("a").input_ids[-1:] != [self.tokenizer.eos_token_id]:
                raise ValueError("its tokenizer does not end a text")

    def cut(self, prompts: Iterable[str]) -> int:
        """Return the number of prompts of which only the first tokens are read."""
        return sum(len(self.tokenizer(_plain(words)).input_ids) > TOKENS for words in prompts)

    def score(self, pixels_CTHW: Tensor, prompt: str) -> float:
        """Return the match of a uint8 video with its prompt, from -1 to 1."""
        padded = self.tokenizer(
            _plain(prompt), padding="max_length", max_length=TOKENS, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = padded.input_ids.to(self.model.device)
        text_D = self.model.get_text_features(input_ids=ids).pooler_output[0]
        frames = self.model.get_image_features(self.frames(pixels_CTHW, FRAMES)).pooler_output
        return float((F.normalize(frames, dim=1) @ F.normalize(text_D, dim=0)).mean())


def _plain(prompt: str) -> str:
    """Return a prompt as SigLIP's training texts are: lower case, no punctuation, single spaces.

    Source: google-research/big_vision, `evaluators/proj/image_text/prompt_engineering.py`.
    """
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", "", prompt.lower()).split())


class Distance(Encoder):
    """The features of whole videos in V-JEPA 2: the mean of its encoder's outputs.

    A kernel distance on features of V-JEPA needs fewer videos than the Frechet distance of I3D.

    Source: Luo et al. 2025, Beyond FVD: Enhanced Evaluation Metrics for Video Generation Quality.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import VJEPA2Model

        super().__init__(VJEPA2Model, folder)
        # The positions of its tokens are computed for frames of this size, whatever it is given.
        side = self.model.config.crop_size
        with pretrained.reading_pretrained(folder, "is not a complete model", FIX):
            if self.prepare.shape != (side, side):
                raise ValueError(f"it reads {side}x{side} pixels, not {self.prepare.shape}")

    def embed(self, pixels_CTHW: Tensor) -> np.ndarray:
        """Return the features (D,) of a uint8 video."""
        settings = self.model.config
        most = min(pixels_CTHW.shape[1], settings.frames_per_clip)
        count = most // settings.tubelet_size * settings.tubelet_size
        frames = self.frames(pixels_CTHW, count)[None]
        tokens = self.model(pixel_values_videos=frames, skip_predictor=True).last_hidden_state
        return tokens[0].mean(0).double().cpu().numpy()


@dataclass
class Models:
    """The feature models that are installed."""

    frames: dict[str, Likeness | Match]
    distance: Distance | None

    def learn(self, clips: Iterable[Tensor], prompts: Sequence[str], device: str) -> None:
        """Move the models to a device and set the training clips; warn about long prompts."""
        for model in (*self.frames.values(), self.distance):
            if model:
                model.to(device)
        if likeness := self.frames.get(LIKENESS):
            likeness.learn(clips)
        match = self.frames.get(MATCH)
        if match and (count := match.cut(prompts)):
            console.warn(
                f"{MATCH}: SigLIP reads only the first {TOKENS} tokens, and {count} of "
                f"{len(prompts)} prompts are longer"
            )


def load_models(found: Plan) -> Models:
    """Load the models of a plan into CPU memory.

    Raises:
        UserError: (ASSET) a file is missing or damaged.
    """
    kinds = {LIKENESS: Likeness, MATCH: Match}
    frames = {score: kind(found.folders[score]) for score, kind in kinds.items()
              if score in found.folders}  # fmt: skip
    return Models(frames, Distance(found.folders[DISTANCE]) if DISTANCE in found.folders else None)
