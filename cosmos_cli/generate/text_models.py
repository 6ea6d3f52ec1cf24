"""Turn prompts into text embeddings with the upsampler, the prompt guards and the text encoder."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from cosmos_cli import console
from cosmos_cli.generate.answers import Answers
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.guards.aegis import Aegis
from cosmos_cli.generate.upsampler import Upsampler
from cosmos_cli.model import text
from cosmos_cli.model.device import default_dtype, gpu_memory_errors
from cosmos_cli.prep import embedding_files
from cosmos_cli.recipe.keys import Recipe


@dataclass(frozen=True)
class Conditioning:
    """Hold the encoded prompt, its embedding (M, D) and that of the negative prompt.

    `frames` are the latents of the given frames, CTHW, for a Video2World model.
    """

    prompt: str
    cond: Tensor
    uncond: Tensor
    frames: Tensor | None = None


class TextModels:
    """Hold the models that read a prompt; each is loaded when it is first needed."""

    def __init__(self, r: Recipe, device: str) -> None:
        self.r = r
        self.device = device
        self.dtype = default_dtype(device)
        self.block_list = guardrail.block_list(r)
        self.encoder_dir = r.model_files.text_encoder
        chip = device if device == "cpu" else torch.cuda.get_device_name()
        about = chip, self.dtype
        self.embeddings = Answers(self.encoder_dir, text.TextEncoder, r.spec.text, *about)
        self.longer_prompts = Answers(Path(r.upsampler), Upsampler, *about)

    @cached_property
    def upsampler(self) -> Upsampler:
        with gpu_memory_errors("add `--set upsampler=off`, or choose a smaller upsampler"):
            return Upsampler(Path(self.r.upsampler), self.device, self.dtype)

    @cached_property
    def aegis(self) -> Aegis:
        with gpu_memory_errors("free 14 GB of GPU memory for the guard Aegis"):
            return guardrail.aegis(self.r, self.device, self.dtype)

    @cached_property
    def encoder(self) -> text.TextEncoder:
        return text.TextEncoder(self.encoder_dir, self.r.spec.text, self.device, self.dtype)

    def free(self, model: str) -> None:
        """Free the memory of a model until it is needed again."""
        self.__dict__.pop(model, None)
        gc.collect()

    def require_allowed(self, words: str) -> str:
        """Return the words.

        Raises:
            UserError: (BLOCKED) the block list has one of them.
        """
        if self.block_list and (reason := self.block_list.reason(words)):
            raise guardrail.blocked("block list", reason, words)
        return words

    def upsample(self, words: str) -> str:
        """Return the upsampled prompt, or a prompt over `upsampler_word_limit` as it is."""
        if len(words.split()) > self.r.upsampler_word_limit:
            return words
        made = self.longer_prompts.get(words, lambda: self.upsampler.upsample(words).encode())
        longer = made.decode()
        console.say(f"upsampled: {longer}")
        return longer or words

    def require_safe(self, prompt: str, words: str, reasons: dict[str, str]) -> str:
        """Return the words that a prompt became.

        Raises:
            UserError: (BLOCKED) `reasons` has one for Aegis to block the words or the prompt.
        """
        for version in (prompt, words):
            if reasons[version]:
                raise guardrail.blocked("guard Aegis", reasons[version], version)
        return words

    def embed(self, words: str) -> Tensor:
        """Return the embedding (M, D), padded with zeros. It may hold NaN or infinity.

        Texts are encoded one at a time, as in the reference. In a batch, padding to the longest
        text changes the last bits, and a video must not depend on its batch.
        """
        spec = self.r.spec.text
        if not words:
            return torch.zeros(spec.tokens, spec.channels)
        made = self.embeddings.get(words, lambda: save({"text": self.encoder.encode([words])[0]}))
        embedding = load(made)["text"].float()
        if len(embedding) == spec.tokens and (cut := self.encoder.cut([words])):
            read = f"the text encoder reads only the first {spec.tokens} of {cut[words]} tokens"
            console.warn(f"{read} of this prompt: {words[:60]} ...")
        return embedding_files.pad(embedding, spec)

    def conditioning(self, words: str, uncond: str, embeddings: dict[str, Tensor]) -> Conditioning:
        """Return the conditioning of a prompt and a negative prompt from their embeddings.

        Raises:
            UserError: (ASSET) one is not finite.
        """
        for one in (words, uncond):
            if not embeddings[one].isfinite().all():
                raise text.no_embedding(one, self.encoder_dir)
        return Conditioning(words, embeddings[words], embeddings[uncond])


def negative_prompt(r: Recipe) -> str:
    """Return the recipe's negative prompt, else the model's default ("" for the tiny model)."""
    if r.negative_prompt is not None:
        return r.negative_prompt
    if r.spec.embedded:
        return ""
    path = Path(__file__).with_name("negative_prompt.txt")
    # The default of nvidia-cosmos/cosmos-predict1 (Apache-2.0), `inference_utils.py`.
    return path.read_text(encoding="utf-8").strip()
