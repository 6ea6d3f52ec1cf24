"""Read the frames that a video continues: a picture, or the last frames of a video."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cosmos_cli import console, files
from cosmos_cli.generate.requests import Given
from cosmos_cli.model import rgb, video
from cosmos_cli.model.video import VideoError
from cosmos_cli.recipe.keys import Recipe

FORMATS = ("PNG", "JPEG", "WEBP")


def read_given(given: Given, r: Recipe) -> Tensor:
    """Return the given frames, resized as prep resizes clips, uint8 (3, T, height, width).

    Raises:
        UserError: (ASSET) the file is missing, damaged, too short, or neither picture nor video.
    """
    files.require_regular(given.path, files.INPUT)
    return read_last_frames(given, r) if given.is_video else read_picture(given.path, r)


def read_last_frames(given: Given, r: Recipe) -> Tensor:
    """Return the last frames of a video at the recipe's frame rate, as prep selects them."""
    try:
        info = video.probe(given.path)
        clips = video.select_clips(info, r.fps_policy, r.fps, given.frames, 1, None)
        _say_if_enlarged(given.path, info.width, info.height, r)
        return video.read_clip(given.path, clips[-1], r.height, r.width, r.resize)
    except VideoError as error:
        bad = files.bad(given.path, files.INPUT, str(error))
        if given.frames > 1 and "too short" in str(error):
            bad.fix = "give a longer video, or use its last frame: `--num-input-frames 1`"
        raise bad from error


def read_picture(path: Path, r: Recipe) -> Tensor:
    """Return a picture as shown: turned as its EXIF data says, on white if transparent."""
    try:
        # Pillow warns of pictures of over 89 million pixels and refuses twice as many.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as opened:
            picture = _opaque(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise files.bad(path, files.INPUT, "is not a png, jpeg or webp picture") from error
    except Image.DecompressionBombError as error:
        raise files.bad(path, files.INPUT, "has too many pixels") from error
    # Pillow reports damage with any of these.
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error) as error:
        raise files.bad(path, files.INPUT, f"is damaged: {error}") from error
    _say_if_enlarged(path, picture.width, picture.height, r)
    pixels_CTHW = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[:, None]
    return rgb.resize_frames(pixels_CTHW.contiguous(), r.height, r.width, r.resize)


def _opaque(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip at 255.
        return picture.point(lambda value: value * (1 / 257)).convert("L").convert("RGB")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")


def _say_if_enlarged(path: Path, width: int, height: int, r: Recipe) -> None:
    if width < r.width or height < r.height:
        sizes = f"{width}x{height}, smaller than the video's {r.width}x{r.height}"
        console.say(f"{path} is {sizes}: it is enlarged, which adds no detail")
