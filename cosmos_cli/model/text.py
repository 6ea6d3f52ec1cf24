"""Encode captions with T5.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `auxiliary/t5_text_encoder.py` and
`scripts/get_t5_embeddings.py`.

Dimension letters: B captions of one length, M tokens of a caption, S tokens of all captions,
D width, N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.model import kernels, pretrained
from cosmos_cli.model.finite import require_finite
from cosmos_cli.spec import TextSpec

# The most tokens in a batch: 16 captions of maximum length.
BATCH_TOKENS = 8192

_INCOMPLETE = ("is not a complete T5 encoder", "run `cosmos download RECIPE`")


class TextEncoder:
    """The encoder half of a T5 model from a local folder."""

    def __init__(self, folder: Path, spec: TextSpec, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoTokenizer

        if not (folder / "config.json").is_file():
            raise asset_error(folder, "has no T5 encoder", "run `cosmos download RECIPE`")
        self.folder, self.spec, self.device, self.dtype = folder, spec, device, dtype
        with pretrained.reading_pretrained(folder, *_INCOMPLETE):
            self.tokenizer = pretrained.load_pretrained(AutoTokenizer, folder)

    @cached_property
    def encoder(self) -> Any:
        """The network, loaded on first use."""
        from transformers import T5EncoderModel

        with pretrained.reading_pretrained(self.folder, *_INCOMPLETE):
            encoder = pretrained.load_model(T5EncoderModel, self.folder, self.dtype)
            if encoder.config.feed_forward_proj != "relu":
                raise ValueError(
                    f"feed_forward_proj is {encoder.config.feed_forward_proj}, not relu"
                )
        encoder = encoder.to(self.device)
        require_finite(encoder.state_dict(), self.folder)
        return encoder

    @cached_property
    def bias_NMM(self) -> Tensor:
        """The relative position bias; shorter captions use its upper left corner."""
        first = self.encoder.encoder.block[0].layer[0].SelfAttention
        # Fused attention takes it only if it is contiguous with rows of a multiple of 8 numbers.
        bias: Tensor = first.compute_bias(self.spec.tokens, self.spec.tokens)[0].contiguous()
        return bias

    def cut(self, captions: Iterable[str]) -> dict[str, int]:
        """Return the captions that the encoder truncates, with their numbers of tokens."""
        distinct = list(dict.fromkeys(captions))
        if not distinct:
            return {}
        ids = self.tokenizer(distinct, verbose=False).input_ids
        lengths = zip(distinct, map(len, ids), strict=True)
        return {caption: length for caption, length in lengths if length > self.spec.tokens}

    def batches(self, captions: list[str]) -> list[list[str]]:
        """Group the captions into batches of similar length and at most `BATCH_TOKENS` tokens."""
        ids = self.tokenizer(captions, truncation=True, max_length=self.spec.tokens).input_ids
        lengths = dict(zip(captions, map(len, ids), strict=True))
        batches: list[list[str]] = [[]]
        tokens = 0
        for caption in sorted(lengths, key=lambda caption: (-lengths[caption], caption)):
            tokens += lengths[caption]
            if tokens > BATCH_TOKENS:
                batches.append([])
                tokens = lengths[caption]
            batches[-1].append(caption)
        return batches

    @torch.inference_mode()
    def encode(self, captions: list[str]) -> list[Tensor]:
        """Return a (real tokens, channels) fp16 tensor on the CPU for each caption.

        An embedding depends slightly on the other captions of the batch: in fp32 by at most the
        last bit of each number, in bf16 by its rounding error, 2^-8 of the number.
        """
        ids = self.tokenizer(captions, truncation=True, max_length=self.spec.tokens).input_ids
        # Longest first, so that captions of equal length are adjacent and attend in one call.
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        lengths = [len(ids[i]) for i in order]
        ids_S = torch.tensor([token for i in order for token in ids[i]], device=self.device)
        parts = self.forward(ids_S, lengths).half().cpu().split(lengths)
        embeddings = dict(zip(order, parts, strict=True))
        return [embeddings[i] for i in range(len(ids))]

    def forward(self, ids_S: Tensor, lengths: list[int]) -> Tensor:
        """Return the T5 output (S, D) for concatenated captions of these lengths.

        The forward of transformers pads all captions to the longest and materialises the attention
        scores: with it, an H100 encodes 38 captions of 512 tokens a second.
        """
        x_SD = self.encoder.shared(ids_S)
        for block in self.encoder.encoder.block:
            attention, feed = block.layer
            u_SD = kernels.rms_norm(x_SD, attention.layer_norm.weight)
            x_SD = x_SD + self._attend(attention.SelfAttention, u_SD, lengths)
            u_SD = kernels.rms_norm(x_SD, feed.layer_norm.weight)
            hidden = kernels.linear_relu(u_SD, feed.DenseReluDense.wi.weight)
            x_SD = x_SD + feed.DenseReluDense.wo(hidden)
        return kernels.rms_norm(x_SD, self.encoder.encoder.final_layer_norm.weight)

    def _attend(self, layer: Any, u_SD: Tensor, lengths: list[int]) -> Tensor:
        """Return attention within each caption, (S, D); one call per run of equal lengths."""
        q, k, v = layer.q(u_SD), layer.k(u_SD), layer.v(u_SD)
        runs = [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]
        ends = list(accumulate(length * count for length, count in runs))
        read = []
        for (length, count), end in zip(runs, ends, strict=True):
            rows = slice(end - length * count, end)
            q_BMNK, k_BMNK, v_BMNK = (
                rearrange(x[rows], "(B M) (N K) -> B M N K", M=length, N=layer.n_heads)
                for x in (q, k, v)
            )
            bias = self.bias_NMM[:, :length, :length]
            often = length == self.spec.tokens
            out = kernels.biased_attention(q_BMNK, k_BMNK, v_BMNK, bias, often=often)
            read.append(rearrange(out, "B M N K -> (B M) (N K)"))
        return layer.o(read[0] if len(read) == 1 else torch.cat(read))


def no_embedding(caption: str, folder: Path) -> UserError:
    """Return the error for a text whose embedding is not finite although all weights are."""
    what = f"returns numbers that are not finite (NaN or infinity) for the text {caption[:60]!r}"
    return asset_error(folder, what, "reword the text")
