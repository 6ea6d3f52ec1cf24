"""Sample videos with the denoiser and decode them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_cli import console
from cosmos_cli.generate import memory, precision
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.guards.faces import FaceBlur
from cosmos_cli.generate.guards.guardrail import FrameFilter
from cosmos_cli.generate.jobs import Job, Lora, Weights
from cosmos_cli.generate.text_models import Conditioning
from cosmos_cli.model import (
    cond_frames,
    edm,
    fp8_sampling,
    kernels,
    lora,
    rgb,
    sampler,
    streaming,
    tensor_names,
    weights,
)
from cosmos_cli.model.cond_frames import CondFrames
from cosmos_cli.model.device import default_dtype, why_not_compiled
from cosmos_cli.model.dit import DiT, Prompt, patch_grid
from cosmos_cli.model.finite import require_finite
from cosmos_cli.model.sequence import SequenceGroup
from cosmos_cli.model.shared_weights import SharedWeights
from cosmos_cli.model.tokenizer import load_tokenizer
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.recipe.residence import Residence

# Passes x blocks x tokens x width of a video from which compiling pays. Compiling takes 10 s. At
# 121 frames of 704x1280 the 7B has 6.5e9 values per pass, and compiled blocks save 0.34 s of it.
WORTH_COMPILING = 2e11
# In fp8 compiling pays sooner, since an uncompiled pass quantises in several kernels. Estimated.
FP8_SHARE = 1 / 3


@dataclass(frozen=True)
class Pair:
    """Share the classifier-free guidance of one video between two ranks.

    Index 0 runs the conditional pass, index 1 the unconditional pass. Each pass may be run by a
    sequence-parallel group; the first rank of the conditional one writes the video.
    """

    index: int
    group: dist.ProcessGroup
    sequence: SequenceGroup

    @property
    def writes(self) -> bool:
        """True if this rank decodes and writes the video."""
        return self.index == self.sequence.index == 0

    def both(self, own: Tensor) -> list[Tensor]:
        """Return the conditional and the unconditional output, gathered from both ranks."""
        estimates = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(estimates, own.contiguous(), group=self.group)
        return estimates


class VideoModels:
    """Hold the denoiser and the decoder, with the guards of the video."""

    def __init__(
        self,
        r: Recipe,
        weights_: Weights,
        device: str,
        pair: Pair | None = None,
        shared: memory.Shared | None = None,
    ) -> None:
        self.weights, self.precision = weights_, r.sampling_precision
        self.device = device
        self.pair = pair
        self.frame_filter: FrameFilter | None = None
        self.face_blur: FaceBlur | None = None
        if guardrail.has_all(r):
            guards = guardrail.guard_files(r)
            self.frame_filter = FrameFilter(guards.classifier, guards.siglip, device)
            self.face_blur = FaceBlur(guards.faces, device)
        self.dtype = default_dtype(device)
        self.streamed = memory.streamed_blocks(r, device) if r.memory != "together" else 0
        console.say(memory.weights_line(r, self.streamed, shared))
        copy = (shared or {}).get((weights_, r.sampling_precision))
        self.net = load_denoiser(r, weights_.path, device, weights_.loras, self.streamed, copy)
        self.tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, self.dtype)
        if pair:
            self.net.share(pair.sequence)
        self.attention = self_attention_backend(r, self.net)
        self.fp8 = precision.fp8_parts(r)

    def holds(self, r: Recipe, weights_: Weights) -> bool:
        """True if these are the weights and the precision that a video needs."""
        return (self.weights, self.precision) == (weights_, r.sampling_precision)

    @cached_property
    def compiles(self) -> bool:
        """True once the blocks are compiled. The first access compiles them."""
        return compile_blocks(self.net)

    def sample(self, job: Job, text_emb: Conditioning) -> tuple[Tensor, bool]:
        """Return the latent (1, C, T, H, W) of a job, and True if compiled blocks made it."""
        compiled = worth_compiling(job.r, self.device) and self.compiles
        # An earlier video may have compiled the blocks.
        plain = not compiled and "compiles" in self.__dict__
        seeds, label = [job.r.sampling_seed], job.path.stem[:40]
        with torch.compiler.set_stance("force_eager") if plain else nullcontext():
            return sample_latents(job.r, self.net, [text_emb], seeds, label, self.pair), compiled

    def encode(self, pixels_CTHW: Tensor) -> Tensor:
        """Return the latents of given frames at the scale of x0, CTHW in fp32.

        The tokenizer is causal, so they are those of a whole clip that begins with these frames, up
        to the rounding of kernels for another size.
        """
        pixels = rgb.to_model(pixels_CTHW)[None].to(self.device, self.dtype)
        latent_CTHW: Tensor = self.tokenizer.encode(pixels)[0]
        return latent_CTHW.float()

    def decode(self, x0: Tensor) -> Tensor | None:
        """Return the pixels of a latent, uint8 CTHW on the CPU, or None if they are not finite."""
        decoded = self.tokenizer.decode(x0.to(self.dtype))[0]
        return rgb.to_uint8(decoded).cpu() if decoded.isfinite().all() else None


def load_denoiser(
    r: Recipe,
    base: Path,
    device: str,
    loras: tuple[Lora, ...] = (),
    streamed: int = 0,
    shared: Path | None = None,
) -> DiT:
    """Load the denoiser from a model file, with unmerged LoRAs, onto `device`.

    The weights of `streamed` blocks stay in CPU memory, in the file `shared` if several processes
    stream the same. With `sampling_precision: fp8`, those of most linears are quantised.

    Raises:
        UserError: a file is missing, damaged or of another model, or holds NaN or infinity.
    """
    with torch.device("meta"):
        net = DiT(r.spec.dit)
    state = weights.load_dit_state(base)
    if remark := cond_frames.add_mask_columns(state, r.spec.dit):
        console.say(remark)
    state = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    net = net.to(default_dtype(device)).requires_grad_(False)
    on_cpu = Residence(streamed).streamed_blocks(r.spec.dit.blocks)
    copy = SharedWeights(shared) if shared and on_cpu else None
    own = copy.lock_missing(on_cpu) if copy else on_cpu
    absent = set(on_cpu).difference(own)
    streaming.allocate(net, net.blocks, own, torch.device(device), absent)
    weights.load_strict(net, state, base)
    loaded = {f"net.{name}": w for name, w in net.state_dict().items() if not w.is_meta}
    require_finite(loaded, base, tensor_names.name_in_file(base))
    del loaded
    for about, remarks in lora.apply_files(net, ((used.path, used.strength) for used in loras)):
        console.say(about)
        for remark in remarks:
            console.warn(remark)
    if parts := precision.fp8_parts(r):
        fp8_sampling.use_fp8(net.blocks, attention="attention" in parts)
    if on_cpu:
        net.weights = streaming.WeightStream(net.blocks, on_cpu, torch.device(device), copy)
        if net.weights.pageable:
            console.warn(streaming.PAGEABLE)
    kernels.put_cudnn_first()
    return net.eval()


def worth_compiling(r: Recipe, device: str) -> bool:
    """True if a video is generated with compiled blocks.

    This depends on the video alone: its last bits must not depend on its batch.
    """
    if r.compile != "auto":
        return r.compile == "on"
    tokens = r.tokens
    values = r.passes * tokens * r.spec.dit.width * r.spec.dit.blocks
    share = FP8_SHARE if r.sampling_precision == "fp8" else 1
    return device != "cpu" and values > share * WORTH_COMPILING


def compile_blocks(net: DiT) -> bool:
    """Compile the blocks at their first call. Return False, with a warning, without a compiler."""
    if reason := why_not_compiled(next(net.parameters()).device):
        console.warn(f"nothing is compiled here, so a video takes a tenth longer: {reason}")
        return False
    for block in net.blocks:
        block.compile()
    net.blocks[0].attend = torch.compile(net.blocks[0].attend)
    return True


def self_attention_backend(r: Recipe, net: DiT) -> str:
    """Return the backend of self-attention at the recipe's video size: cudnn, flash, ..."""
    size = r.tokens, net.spec.heads, net.spec.head_width
    q_BLNK = next(net.parameters()).new_empty(1, *size)
    return kernels.attention_backend(q_BLNK, q_BLNK, q_BLNK)


def given_frames(
    r: Recipe, text_embs: Sequence[Conditioning], seeds: Sequence[int], device: torch.device
) -> CondFrames | None:
    """Return the given frames of a batch, equally many per video; None for a Text2World model.

    A Video2World model that is given none generates from the text alone.
    """
    if not r.spec.takes_frames:
        return None
    channels, frames, *size = r.latent_shape
    none = torch.zeros(channels, 0, *size)
    x0 = [none if text.frames is None else text.frames.float().cpu() for text in text_embs]
    return cond_frames.for_sampling(torch.stack(x0).to(device), frames, list(seeds))


def sample_latents(
    r: Recipe,
    net: DiT,
    text_embs: Sequence[Conditioning],
    seeds: Sequence[int],
    label: str,
    pair: Pair | None = None,
) -> Tensor:
    """Sample B videos; return their latents x0 (B, C, T, H, W) in fp32, equal on a pair's ranks.

    The noise of a seed does not depend on the other seeds; the last bits of a result may.
    """
    weight = next(net.parameters())
    shape = (1, *r.latent_shape)
    noise = torch.cat([sampler.start_noise(seed, shape) for seed in seeds]).to(weight.device)
    fps_B = torch.full((len(seeds),), r.fps, device=weight.device)
    place = net.locate(patch_grid(net.spec, noise), fps_B)
    words = [[t.cond for t in text_embs], [t.uncond for t in text_embs]]
    texts_BMD = [torch.stack(embeddings).to(weight) for embeddings in words]
    prompts = [Prompt(*place, net.read(text_emb_BMD)) for text_emb_BMD in texts_BMD]

    def passes(*inputs: Tensor) -> list[Tensor]:
        if not sampler.is_guided(r, inputs[1]):
            alone = net(*inputs, prompt=prompts[0])
            # Both ranks of a pair compute the same, and continue from the same bits.
            return pair.both(alone)[:1] if pair else [alone]
        if pair:
            return pair.both(net(*inputs, prompt=prompts[pair.index]))
        first = net.first_attention(*inputs[:2], prompts[0])
        return [net(*inputs, prompt=prompt._replace(first_BLD=first)) for prompt in prompts]

    guided_net = sampler.guide(passes, r.guidance)

    given = given_frames(r, text_embs, seeds, weight.device)

    def denoise(xt: Tensor, sigma_B: Tensor) -> Tensor:
        inputs = (xt, sigma_B, texts_BMD[0], fps_B, r.spec.sigma_data)
        if not given:
            return edm.denoise(guided_net, *inputs)
        frames = given.at(sigma_B)
        told = frames.shown_to(guided_net, r.spec.sigma_data)
        return frames.restore(edm.denoise(told, *inputs))

    with console.progress(label, r.evaluations, "steps") as bar:
        return sampler.sample(denoise, noise, r, lambda _: bar.advance())
