"""Turn prompts into videos.

The networks are loaded one after another, each once for all prompts, or all are kept in memory.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from cosmos_cli import __version__, console, files, paths
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate.answers import Answers
from cosmos_cli.generate.guards import guardrail
from cosmos_cli.generate.guards.aegis import Aegis
from cosmos_cli.generate.jobs import Job, Lora, Weights
from cosmos_cli.generate.upsampler import Upsampler
from cosmos_cli.model import edm, kernels, lora, rgb, sampler, tensor_names, text, video, weights
from cosmos_cli.model.device import gpu_memory_errors, why_not_compiled
from cosmos_cli.model.dit import DiT, Prompt, patch_grid
from cosmos_cli.model.finite import require_finite
from cosmos_cli.model.sequence import SequenceGroup
from cosmos_cli.prep import latent_files
from cosmos_cli.recipe.keys import Recipe

# Passes x blocks x tokens x width of a video from which compiling pays. Compiling takes 10 s. At
# 121 frames of 704x1280 the 7B has 6.5e9 values per pass, and compiled blocks save 0.34 s of it.
WORTH_COMPILING = 2e11
# Peak memory of a pass of the denoiser without its weights, in units of one activation of all
# tokens. Measured: 14.2, and 10.3 with compiled blocks. The two passes of guidance share one more.
PASS_ACTIVATIONS = 16


@dataclass(frozen=True)
class Conditioning:
    """The encoded prompt, its embedding (M, D) and the embedding of the negative prompt."""

    prompt: str
    cond: Tensor
    uncond: Tensor


@dataclass(frozen=True)
class Pair:
    """This rank's part in classifier-free guidance that two ranks run together for one video.

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


def generate(
    jobs: list[Job], device: str, pair: Pair | None = None
) -> Iterator[tuple[Job, UserError | None]]:
    """Generate the jobs phase by phase; yield each when its files are written, or with its error.

    An error of one job does not stop the others. All jobs must share a model and its sizes, and
    jobs with the same weights must be adjacent.
    """
    if jobs[0].r.memory == "together":
        yield from _with_all_in_memory(jobs, device, pair)
        return
    console.say(f"in memory in turn: {'; '.join(_phases(jobs[0].r))}")
    prepared = TextModels(jobs[0].r, device, in_turn=True).prepare(jobs)
    gc.collect()
    for weights_, group in groupby(jobs, lambda job: job.weights):
        studio: Studio | None = None
        for job in group:
            text_emb = prepared[job]
            if isinstance(text_emb, UserError):
                yield job, text_emb
                continue
            studio = studio or Studio(job.r, weights_, device, pair)
            yield job, studio.make(job, text_emb)
        del studio


def _with_all_in_memory(
    jobs: list[Job], device: str, pair: Pair | None
) -> Iterator[tuple[Job, UserError | None]]:
    for weights_, group in groupby(jobs, lambda job: job.weights):
        networks = Resident(jobs[0].r, weights_, device, pair)
        for job in group:
            yield job, networks.make(job)
        del networks


def one_by_one(r: Recipe, weights_: Weights, device: str) -> Callable[[Job], UserError | None]:
    """Return a function that generates one job and returns its error, or None."""
    if keeps_all(r, device):
        return Resident(r, weights_, device).make
    return lambda job: dict(generate([job], device))[job]


def keeps_all(r: Recipe, device: str) -> bool:
    """True if all networks stay in memory between prompts.

    `memory: auto` keeps them on a CPU, and on a GPU if they fit. A batch loads each network once
    either way.
    """
    if r.memory != "auto" or device == "cpu":
        return r.memory != "in_turn"
    needed, (free, _) = bytes_together(r), torch.cuda.mem_get_info()
    console.say(
        f"all networks need {console.size(needed)} of GPU memory, {console.size(free)} are free"
    )
    return needed < free


def bytes_together(r: Recipe) -> int:
    """Estimate the GPU memory of all networks at once and of a pass of the denoiser, in bytes.

    The denoiser counts in bf16, the other networks by the size of their files.
    """
    root = Path(r.checkpoints_dir)
    folders = [paths.model_files(r.spec, r.checkpoints_dir).text_encoder]
    if r.upsampler != "off":
        folders.append(Path(r.upsampler))
    if guardrail.has_all(r):
        folders += [root / paths.LLAMA_GUARD_DIR, root / paths.SIGLIP_DIR]
    others = sum(
        files.size_of(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix == ".safetensors" or path.name == paths.MODEL_FILE
    )
    tokens = r.spec.tokens(r.num_frames, r.height, r.width)
    activations = PASS_ACTIVATIONS * tokens * r.spec.dit.width
    return others + torch.bfloat16.itemsize * (r.spec.dit.parameters + activations)


def _phases(r: Recipe) -> list[str]:
    """Return the names of the networks in the order in which they are loaded."""
    guarded = guardrail.has_all(r)
    return [
        *(["prompt upsampler"] if r.upsampler != "off" else []),
        *(["Aegis"] if guarded else []),
        "text encoder",
        "denoiser and decoder" + (", frame filter and face blur" if guarded else ""),
    ]


@contextmanager
def phase(name: str, device: str) -> Iterator[None]:
    """Report how long the enclosed code took, and its peak GPU memory."""
    began = time.monotonic()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield
    used = "" if device == "cpu" else f", peak {console.size(torch.cuda.max_memory_allocated())}"
    console.say(f"{name}: {console.duration(time.monotonic() - began)}{used}")


def number_format(device: str) -> torch.dtype:
    """Return the dtype of weights and activations: float32 on a CPU, bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


class TextModels:
    """Turns prompts into conditionings; each model is loaded when it is first needed.

    Args:
        r: the recipe that the jobs share.
        device: cpu or cuda.
        in_turn: free the upsampler and Aegis before the next model is loaded.
    """

    def __init__(self, r: Recipe, device: str, *, in_turn: bool) -> None:
        self.r = r
        self.device = device
        self.in_turn = in_turn
        self.block_list = guardrail.block_list(r)
        chip = device if device == "cpu" else torch.cuda.get_device_name()
        encoder = paths.model_files(r.spec, r.checkpoints_dir).text_encoder
        about = chip, number_format(device)
        self.embeddings = Answers(encoder, text.TextEncoder, r.spec.text, *about)
        self.longer_prompts = Answers(Path(r.upsampler), Upsampler, *about)

    @cached_property
    def upsampler(self) -> Upsampler:
        with gpu_memory_errors("add `--set upsampler=off`, or choose a smaller upsampler"):
            return Upsampler(Path(self.r.upsampler), self.device, number_format(self.device))

    @cached_property
    def aegis(self) -> Aegis | None:
        with gpu_memory_errors("free 14 GB of GPU memory for the guard Aegis"):
            return guardrail.aegis(self.r, self.device, number_format(self.device))

    @cached_property
    def encoder(self) -> text.TextEncoder:
        folder = paths.model_files(self.r.spec, self.r.checkpoints_dir).text_encoder
        return text.TextEncoder(folder, self.r.spec.text, self.device, number_format(self.device))

    def prepare(self, jobs: list[Job]) -> dict[Job, Conditioning | UserError]:
        """Return the conditioning of each job, or the error of its prompt."""
        words = {job: self._guarded(job.prompt) for job in jobs}
        if self.r.upsampler != "off":
            with phase("prompt upsampler", self.device):
                longer = cache(self._longer)
                words = {
                    job: w if isinstance(w, UserError) else longer(w) for job, w in words.items()
                }
            self._forget("upsampler")
        if guardrail.has_all(self.r):
            with phase("Aegis", self.device):
                judged = cache(self._judged)
                words = {
                    job: w if isinstance(w, UserError) else judged(job.prompt, w)
                    for job, w in words.items()
                }
            self._forget("aegis")
        # Encode one prompt at a time, as the reference does. In a batch, padding to the longest
        # prompt changes the last bits, and a video must not depend on its batch.
        embed = cache(self._embed)
        with phase("text encoder", self.device):
            return {
                job: w
                if isinstance(w, UserError)
                else _conditioning(w, embed(w), embed(negative_prompt(job.r)))
                for job, w in words.items()
            }

    def _forget(self, model: str) -> None:
        if self.in_turn:
            self.__dict__.pop(model, None)
            gc.collect()

    def _judged(self, prompt: str, words: str) -> str | UserError:
        """Return the words, or an error if Aegis blocks them or their original prompt."""
        for version in dict.fromkeys((prompt, words)):
            if self.aegis and (reason := self.aegis.reason(version)):
                return guardrail.blocked("guard Aegis", reason, version)
        return words

    def _guarded(self, words: str) -> str | UserError:
        reason = self.block_list.reason(words) if self.block_list else ""
        return guardrail.blocked("block list", reason, words) if reason else words

    def _longer(self, words: str) -> str | UserError:
        """Return the upsampled prompt, or an error if the block list blocks it."""
        if len(words.split()) > self.r.upsampler_word_limit:
            return words
        made = self.longer_prompts.get(words, lambda: self.upsampler.upsample(words).encode())
        longer = made.decode()
        console.say(f"upsampled: {longer}")
        return self._guarded(longer) if longer else words

    def _embed(self, words: str) -> Tensor | UserError:
        spec = self.r.spec.text
        if not words:
            return torch.zeros(spec.tokens, spec.channels)
        made = self.embeddings.get(words, lambda: save({"text": self.encoder.encode([words])[0]}))
        embedding = load(made)["text"].float()
        if not embedding.isfinite().all():
            folder = paths.model_files(self.r.spec, self.r.checkpoints_dir).text_encoder
            return text.no_embedding(words, folder)
        if len(embedding) == spec.tokens and (cut := self.encoder.cut([words])):
            read = f"the text encoder reads only the first {spec.tokens} of {cut[words]} tokens"
            console.warn(f"{read} of this prompt: {words[:60]} ...")
        return text.pad(embedding, spec)


def _conditioning(
    words: str, cond: Tensor | UserError, uncond: Tensor | UserError
) -> Conditioning | UserError:
    if isinstance(cond, UserError):
        return cond
    return uncond if isinstance(uncond, UserError) else Conditioning(words, cond, uncond)


class Studio:
    """The denoiser and the decoder in memory, with the guards of the video."""

    def __init__(self, r: Recipe, weights_: Weights, device: str, pair: Pair | None = None) -> None:
        self.device = device
        self.pair = pair
        self.frame_filter = guardrail.frame_filter(r, device)
        self.face_blur = guardrail.face_blur(r, device)
        self.dtype = number_format(device)
        with phase("loading denoiser and decoder", device):
            self.net = load_denoiser(r, weights_.path, device, self.dtype, weights_.loras)
            self.tokenizer = latent_files.load_tokenizer(r, device, self.dtype)
        if pair:
            self.net.share(pair.sequence)
        self.attention = attention_backend(r, self.net)
        console.say(f"attention: {self.attention}")

    @cached_property
    def compiles(self) -> bool:
        """True once the blocks are compiled. The first access compiles them."""
        return compile_blocks(self.net)

    def _plain_or(self, compiled: bool) -> AbstractContextManager[Any]:
        """Run the blocks eagerly if only an earlier video has compiled them."""
        plain = not compiled and "compiles" in self.__dict__
        return torch.compiler.set_stance("force_eager") if plain else nullcontext()

    @torch.inference_mode()
    def make(self, job: Job, text_emb: Conditioning) -> UserError | None:
        """Generate a job and write its files; return its error, or None."""
        began = time.monotonic()
        name, seed = job.path.stem, job.r.sampling_seed
        compiled = worth_compiling(job.r, self.device) and self.compiles
        with phase(f"{name}: denoiser", self.device), self._plain_or(compiled):
            x0 = sample(job.r, self.net, [text_emb], [seed], name[:40], self.pair)
        if self.pair and not self.pair.writes:
            return None
        if not x0.isfinite().all():
            return not_finite("denoiser's latent", job)
        with phase(f"{name}: decoder", self.device):
            decoded = self.tokenizer.decode(x0.to(self.dtype))[0]
            pixels = rgb.to_uint8(decoded).cpu() if decoded.isfinite().all() else None
        if pixels is None:
            return not_finite("decoded video", job)
        if self.frame_filter and (reason := self.frame_filter.reason(pixels)):
            return guardrail.blocked("frame filter", reason, job.prompt)
        faces = self.face_blur.blur(pixels) if self.face_blur else None
        seconds = round(time.monotonic() - began, 2)
        about = {"seconds": seconds, "attention": self.attention, "compiled": compiled}
        about["blurred_faces"] = faces
        try:
            _write(job, text_emb, pixels, about)
        except UserError as error:
            return error
        return None


class Resident:
    """All networks in memory at once, for prompts that arrive one by one."""

    def __init__(self, r: Recipe, weights_: Weights, device: str, pair: Pair | None = None) -> None:
        console.say(f"in memory together: {', '.join(_phases(r))}")
        self.texts = TextModels(r, device, in_turn=False)
        self.studio = Studio(r, weights_, device, pair)

    def make(self, job: Job) -> UserError | None:
        """Generate a job and write its files; return its error, or None."""
        text_emb = self.texts.prepare([job])[job]
        return text_emb if isinstance(text_emb, UserError) else self.studio.make(job, text_emb)


def not_finite(what: str, job: Job) -> UserError:
    """Return the error of a video whose values overflowed although all weights are finite.

    Its code is ASSET: the weights, or a LoRA's strength, are too large for this prompt.
    """
    return UserError(
        f"the {what} is not finite (NaN or infinity), so no video was written",
        code=ExitCode.ASSET, where=job.path.stem,
        fix="use another checkpoint, or lower the strength of a LoRA: `--lora FILE:0.8`",
    )  # fmt: skip


def load_denoiser(
    r: Recipe, base: Path, device: str, dtype: torch.dtype, loras: tuple[Lora, ...] = ()
) -> DiT:
    """Load the denoiser from a model file, with unmerged LoRAs, in `dtype` on `device`.

    Raises:
        UserError: a file is missing, damaged or of another model, or holds NaN or infinity.
    """
    with torch.device("meta"):
        net = DiT(r.spec.dit)
    state = weights.load_dit_state(base)
    state = {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
    net = net.to(dtype).to_empty(device=device)
    weights.load_strict(net, state, base)
    loaded = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    require_finite(loaded, base, tensor_names.name_in_file(base))
    del loaded
    for about, remarks in lora.load_beside(net, ((used.path, used.strength) for used in loras)):
        console.say(about)
        for remark in remarks:
            console.warn(remark)
    kernels.put_cudnn_first()
    return net.eval()


def worth_compiling(r: Recipe, device: str) -> bool:
    """True if a video is generated with compiled blocks.

    This depends on the video alone: its last bits must not depend on its batch.
    """
    if r.compile != "auto":
        return r.compile == "on"
    passes = r.num_steps * (2 if r.guidance else 1)
    tokens = r.spec.tokens(r.num_frames, r.height, r.width)
    values = passes * tokens * r.spec.dit.width * r.spec.dit.blocks
    return device != "cpu" and values > WORTH_COMPILING


def compile_blocks(net: DiT) -> bool:
    """Compile the blocks at their first call. Return False, with a warning, without a compiler."""
    if reason := why_not_compiled(next(net.parameters()).device):
        console.warn(f"nothing is compiled here, so a video takes a tenth longer: {reason}")
        return False
    for block in net.blocks:
        block.compile()
    net.blocks[0].attend = torch.compile(net.blocks[0].attend)
    return True


def attention_backend(r: Recipe, net: DiT) -> str:
    """Return the backend of self-attention at the recipe's video size: cudnn, flash, ..."""
    size = r.spec.tokens(r.num_frames, r.height, r.width), net.spec.heads, net.spec.head_width
    q_BLNK = next(net.parameters()).new_empty(1, *size)
    return kernels.attention_backend(q_BLNK, q_BLNK, q_BLNK)


def sample(
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
    spec = r.spec
    device = next(net.parameters()).device
    fps_B = torch.full((len(seeds),), r.fps, device=device)
    shape = (1, *spec.latent_shape(r.num_frames, r.height, r.width))
    noise = torch.cat([sampler.start_noise(seed, shape) for seed in seeds])
    place = net.locate(patch_grid(spec.dit, noise), fps_B)
    words = [[t.cond for t in text_embs], [t.uncond for t in text_embs]]
    texts_BMD = [torch.stack(embeddings).to(next(net.parameters())) for embeddings in words]
    cond_prompt, uncond_prompt = (
        Prompt(*place, net.read(text_emb_BMD)) for text_emb_BMD in texts_BMD
    )

    def guided(x: Tensor, *inputs: Tensor) -> Tensor:
        """Return the guided network output; preconditioning is linear, so x0 is guided alike."""
        if r.guidance == 0:
            return net(x, *inputs, prompt=cond_prompt)
        if pair:
            own = (cond_prompt, uncond_prompt)[pair.index]
            cond, uncond = pair.both(net(x, *inputs, prompt=own))
        else:
            first = net.first_attention(x, inputs[0], cond_prompt)
            cond, uncond = (
                net(x, *inputs, prompt=prompt._replace(first_BLD=first))
                for prompt in (cond_prompt, uncond_prompt)
            )
        return sampler.guided(cond.float(), uncond.float(), r.guidance)

    def denoiser(xt: Tensor, sigma: float) -> Tensor:
        sigma_B = torch.full((len(xt),), sigma, device=device)
        return edm.denoise(guided, xt, sigma_B, texts_BMD[0], fps_B, spec.sigma_data)

    # res evaluates the denoiser once more, at the end, to get the result.
    evaluations = r.num_steps + (r.sampler == "res")
    with console.progress(label, evaluations, "steps") as bar:
        sigmas = spec.sigma_min, spec.sigma_max
        return sampler.solve(
            r.sampler, r.num_steps, sigmas, denoiser, noise.to(device), lambda _: bar.advance()
        )


def negative_prompt(r: Recipe) -> str:
    """Return the recipe's negative prompt, else the model's default ("" for the tiny model)."""
    if r.negative_prompt is not None:
        return r.negative_prompt
    if r.spec.embedded:
        return ""
    path = Path(__file__).with_name("negative_prompt.txt")
    # The default of nvidia-cosmos/cosmos-predict1 (Apache-2.0), `inference_utils.py`.
    return path.read_text(encoding="utf-8").strip()


def _write(job: Job, text_emb: Conditioning, pixels: Tensor, about: dict[str, Any]) -> None:
    """Write the files of a job, the sidecar first and the mp4 last.

    The sidecar marks the files as ours if the process is killed halfway.
    """
    sidecar, words, sheet, mp4 = job.files
    with files.atomic_file(mp4) as temporary:
        video.write_mp4(temporary, pixels, job.r.fps, job.r.video_crf)
        digest = files.sha256_file(temporary)
        files.write_json(
            sidecar, {**_provenance(job, text_emb.prompt), "mp4_sha256": digest, **about}
        )
        files.write_text(words, text_emb.prompt + "\n")
        with files.atomic_file(sheet) as picture:
            rgb.contact_sheet(pixels).save(picture, quality=90)


def _provenance(job: Job, words: str) -> dict[str, Any]:
    return {
        "prompt": job.prompt,
        "upsampled_prompt": None if words == job.prompt else words,
        "guardrails": guardrail.names(job.r),
        "seed": job.r.sampling_seed,
        "key": job.key,
        "model": job.r.model,
        "weights": {"path": str(job.weights.path), "sha256": job.weights.sha256},
        "loras": [{**asdict(used), "path": str(used.path)} for used in job.weights.loras],
        "negative_prompt": negative_prompt(job.r),
        "recipe": json.loads(job.r.model_dump_json()),
        "versions": {
            "cosmos": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
