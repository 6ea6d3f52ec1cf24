"""Write missing captions with a vision-language model that sees frames of each video.

Each description is stored in a file of its own in the dataset. So prep can be killed and run again,
and several processes can share the videos.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from cosmos_cli import console, files
from cosmos_cli.errors import asset_error
from cosmos_cli.model import pretrained, video
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.finite import require_finite
from cosmos_cli.paths import Dataset
from cosmos_cli.prep import caption_choice, captions, processes, work_sharing
from cosmos_cli.prep.sources import Source
from cosmos_cli.recipe.keys import Recipe

INSTRUCTION = (
    "These are frames of one video, in order. Describe the video in one paragraph of plain text: "
    "who or what is in it, what happens, the place, the light, and how the camera moves."
)
# The model sees this many evenly spaced frames, of this width in pixels.
FRAMES, WIDTH = 6, 448
# Together with a prompt in front, the answer fits into the text encoder's token limit.
MAX_NEW_TOKENS = 256


class Captioner:
    """A vision-language model from a local folder or the hub's cache. It decodes greedily."""

    def __init__(self, name: str, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device, self.dtype = device, dtype
        folder = Path(name)
        source = str(folder.absolute()) if folder.is_dir() else name
        what = "is not a readable vision-language model"
        fix = f"run `hf download {name}`, or use `--set caption_model=FOLDER`"
        try:
            with pretrained.reading_pretrained(source, what, fix):
                self.processor = pretrained.load_pretrained(AutoProcessor, source)
                model = pretrained.load_model(AutoModelForImageTextToText, source, dtype)
        except ImportError as error:
            # Some models resize images with torchvision, which this project does not depend on.
            why = " ".join(str(error).split())[:200]
            raise asset_error(source, f"{what}: {why}", "run `pip install torchvision`") from error
        if not getattr(self.processor, "chat_template", None):
            fix = "choose a model that was trained to chat"
            raise asset_error(source, "has no chat template", fix)
        self.model = model.to(device)
        require_finite(self.model.state_dict(), Path(source))

    @torch.inference_mode()
    def describe(self, source: Source) -> str:
        """Return the model's description of a video, cleaned. It may be empty.

        Raises:
            VideoError: a frame does not decode.
        """
        assert source.info
        frames = video.read_small(source.path, source.info, FRAMES, WIDTH)
        pictures = [Image.fromarray(frame.numpy()) for frame in frames.permute(1, 2, 3, 0)]
        content = [{"type": "image", "image": picture} for picture in pictures]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": INSTRUCTION}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device, self.dtype)
        output = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return captions.clean(self.processor.decode(answer, skip_special_tokens=True))


def describe_videos(
    r: Recipe, dataset: Dataset, videos: list[Source], job: str, device: str
) -> None:
    """Describe every video that has no other caption, with the recipe's captioning model.

    A video whose frames do not decode gets no description.

    Raises:
        UserError: the model cannot be used, or other processes are working on another job.
    """
    if r.caption != "vlm":
        return
    unseen = caption_choice.find_captions(r, dataset, videos)
    if not unseen:
        return
    with work_sharing.workers(_lock(dataset), job) as workers:
        workers.start()
        pieces = len(unseen) if workers.can_share else 1
        with processes.helping(r, pieces, _help_to_describe, (r, dataset, videos, job)):
            _share(r, dataset, videos, workers, device)
            finished = workers.wait_for_others()
        if not finished:
            # Another process may have been killed before it finished its videos.
            _share(r, dataset, videos, workers, device)
            workers.finished()


def _help_to_describe(
    r: Recipe, dataset: Dataset, videos: list[Source], job: str, device: str
) -> None:
    """Describe videos in a helper process until another process works on each that is left."""
    with work_sharing.workers(_lock(dataset), job) as workers:
        # If it is the first, `describe_videos` has ended.
        if not workers.first:
            _share(r, dataset, videos, workers, device)


def _lock(dataset: Dataset) -> Path:
    return dataset.descriptions / "prep.lock"


def _share(
    r: Recipe, dataset: Dataset, videos: list[Source], workers: work_sharing.Workers, device: str
) -> None:
    """Describe the videos that no other process has described or is working on."""
    assert r.caption_model
    captioner, dtype = None, default_dtype(device)
    unseen = {source.name for source in caption_choice.find_captions(r, dataset, videos)}
    with console.progress("describe", len(unseen), "videos") as bar:
        for number, source in enumerate(videos):
            if source.name not in unseen:
                continue
            with workers.piece(number) as ours:
                if ours and caption_choice.read_description(r, dataset, source) is None:
                    captioner = captioner or Captioner(r.caption_model, device, dtype)
                    _describe_one(r, dataset, source, captioner)
            bar.advance(source.name)


def _describe_one(r: Recipe, dataset: Dataset, source: Source, captioner: Captioner) -> None:
    try:
        words = captioner.describe(source)
    except video.VideoError as error:
        console.warn(f"{source.path}: cannot be described: {error}")
        return
    value = {
        "key": caption_choice.description_key(r, source),
        "content": caption_choice.content_key(r, source),
        "model": r.caption_model,
        "caption": words,
    }
    files.write_json(dataset.descriptions / f"{source.stem}.json", value)
