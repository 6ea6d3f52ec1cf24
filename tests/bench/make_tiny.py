"""Makes the weights of the embedded models: `python tests/bench/make_tiny.py PART`.

t5         a small encoder of the real T5 class with seeded random weights, and a tokenizer of
           words that falls back to letters and bytes, so that any text in any script has tokens.
tokenizer  trains the video tokenizer on rendered scenes and moving colour noise.
dit        trains the denoiser on rendered scenes and their captions with the package's own loss.
video2world  starts from that denoiser, trains one that is given frames, and measures where things
           are in the frames that follow.
measure    measures that again.

Each part is deterministic by its seed on one machine. `tiny/training.json` keeps the
settings, device, time, first and last loss of the shipped weights. The first three runs of the
tokenizer saw things of one colour only. The first run of video2world saw faster scenes, circles of
other turning rates, two captioned scenes in five, and two given latent frames in half the samples.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as SubwordTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from cosmos_cli import files, paths
from cosmos_cli.evaluate import continuation, samples
from cosmos_cli.generate.video_models import load_denoiser
from cosmos_cli.model import cond_frames, edm, weights
from cosmos_cli.model.cond_frames import CondFrames
from cosmos_cli.model.device import default_dtype
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.ema import PowerEMA
from cosmos_cli.model.text import TextEncoder
from cosmos_cli.model.tiny import world
from cosmos_cli.model.tokenizer import Tokenizer, load_tokenizer
from cosmos_cli.prep.embedding_files import pad
from cosmos_cli.recipe import loading
from cosmos_cli.spec import GIVEN_FRAMES, TINY, TINY_VIDEO2WORLD, ModelSpec

CAPTIONS = 20_000


# --- text encoder ---------------------------------------------------------------------------------


def make_t5(folder: Path, seed: int) -> None:
    """Writes a T5 encoder of about a quarter of a million weights and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [world.caption(world.sample_scene(i), i) for i in range(CAPTIONS)]
    captions += [caption for _, caption in world.concept_scenes(12, seed=0)]
    tokenizer = word_tokenizer(captions)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TINY.text.channels,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = T5EncoderModel(config)
    look_at_neighbours(encoder)
    encoder.save_pretrained(folder)


@torch.no_grad()
def look_at_neighbours(encoder: T5EncoderModel) -> None:
    """Has each head look at one neighbour, up to three words back or the next one.

    A random encoder has no word order: of two things in a caption nobody could tell which one has
    which colour.
    """
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    bias = attention.relative_attention_bias.weight
    ahead = encoder.config.relative_attention_num_buckets // 2
    for head, offset in enumerate((-1, -2, -3, 1)):
        bias[abs(offset) + (ahead if offset > 0 else 0), head] += 4.0


def word_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of the captions' words, letters for other words, bytes for the rest."""
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    counts = Counter(
        piece
        for caption in captions
        for piece, _ in split.pre_tokenize_str(normalizer.normalize_str(caption))
    )
    total = sum(counts.values())
    vocabulary = {"<pad>": 0.0, "</s>": 0.0, "<unk>": -40.0}
    vocabulary |= {word: math.log(count / total) for word, count in sorted(counts.items())}
    for character in ["▁", *map(chr, range(33, 127))]:
        vocabulary.setdefault(character, -15.0)
    vocabulary |= {f"<0x{byte:02X}>": -30.0 for byte in range(256)}

    tokenizer = SubwordTokenizer(
        models.Unigram(list(vocabulary.items()), unk_id=2, byte_fallback=True)
    )
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TINY.text.tokens,
    )


# --- video tokenizer ------------------------------------------------------------------------------

FULL = (TINY.num_frames, TINY.height, TINY.width)
CROP = (9, 64, 96)


def draw_videos(scenes: Sequence[world.Scene], device: str) -> torch.Tensor:
    """The scenes as uint8 BCTHW on `device`."""
    drawn = [
        world.render_batch(scenes[first : first + 32], *FULL, TINY.fps, device)
        for first in range(0, len(scenes), 32)
    ]
    return torch.cat(drawn)


def plain_scenes(seeds: range) -> list[world.Scene]:
    """Return scenes to train the denoiser on: things of one colour."""
    return [world.sample_scene(seed) for seed in seeds]


def colour_noise(count: int, size: tuple[int, int, int], device: str) -> torch.Tensor:
    """Moving smooth noise in [-1, 1], BCTHW, so that more than rendered scenes survives."""
    layers = []
    for cells in (2, 4, 8, 12):
        shape = (count, 3, max(2, size[0] // 8), cells, cells * 5 // 3)
        layer = F.interpolate(torch.randn(shape, device=device), size, mode="trilinear")
        layers.append(layer * (2 / cells))
    return torch.tanh(sum(layers))


def cut(pool: torch.Tensor, count: int, size: tuple[int, int, int]) -> torch.Tensor:
    """Random pieces of (frames, height, width) from random videos, in [-1, 1], BCTHW."""
    pieces = []
    for index in torch.randint(len(pool), (count,)).tolist():
        start = [
            int(torch.randint(whole - part + 1, ())) for whole, part in zip(FULL, size, strict=True)
        ]
        t, h, w = (slice(first, first + part) for first, part in zip(start, size, strict=True))
        pieces.append(pool[index, :, t, h, w])
    return torch.stack(pieces).float() / 127.5 - 1


def motley_scene(seed: int) -> world.Scene:
    """A training scene whose thing is of several colours, for a tokenizer to see such things too.

    Four of six are robots, whose parts are the smallest.
    """
    rng = random.Random(f"motley/{seed}")
    scene = world.sample_scene(seed)
    shape = rng.choice(("robot", "robot", "robot", "robot", "ball", "cube"))
    accents = tuple((part, rng.choice(list(world.COLOURS))) for part in world.PARTS[shape])
    return replace(scene, thing=replace(scene.thing, shape=shape, accents=accents))


def make_tokenizer(path: Path, device: str, options: argparse.Namespace) -> dict[str, object]:
    """Trains the autoencoder, measures mean and std of its latents and writes both.

    The first `--pieces` of the steps see pieces of clips, the rest whole clips.
    """
    torch.manual_seed(0)
    started = time.monotonic()
    half = options.clips // 2
    motley = [motley_scene(seed) for seed in range(half)]
    pool = draw_videos([*plain_scenes(range(half, options.clips)), *motley], device)
    net = Tokenizer(TINY.tokenizer, TINY.sigma_data)
    if options.resume:
        weights.load_strict(net, weights.load_tokenizer_state(path), path)
    net = net.to(device)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, options.steps, pct_start=0.05)
    losses = []
    for step in range(options.steps):
        whole = step >= options.steps * options.pieces
        size, count = (FULL, max(2, options.batch // 4)) if whole else (CROP, options.batch)
        noise = max(1, count // 8)
        video = torch.cat([cut(pool, count - noise, size), colour_noise(noise, size, device)])
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            z = net.encode_raw(video)
            decoded = net.decode_raw(z + 0.03 * torch.randn_like(z))
        error = decoded.float() - video
        edges = sum(error.diff(dim=d).abs().mean() for d in (-1, -2))
        size_of_z = z.float().square().mean()
        # The logarithm of each video's error is its PSNR: no video is too good to improve.
        error_B = error.square().flatten(1).mean(1)
        loss = 0.1 * (error_B + 1e-5).log().mean() + 0.2 * edges + 5e-4 * size_of_z
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps - 1:
            psnr = -10 * torch.log10(error_B[:-noise] / 4).mean().item()
            losses.append((step, round(loss.item(), 5), round(psnr, 2)))
            print("tokenizer", *losses[-1], f"{time.monotonic() - started:.0f}s", flush=True)
    seconds = round(time.monotonic() - started)
    measure_latents(net, draw_videos(plain_scenes(range(10**6, 10**6 + 128)), device))
    state = {k: v.bfloat16() if v.ndim > 2 else v for k, v in net.state_dict().items()}
    weights.write_safetensors(path, state)
    return {"seconds": seconds, "first_loss": losses[0][1], "last_loss": losses[-1][1]}


@torch.no_grad()
def measure_latents(net: Tokenizer, videos: torch.Tensor) -> None:
    """Sets mean and std per channel and latent frame; later frames repeat the last one measured."""
    z = torch.cat([net.encode_raw(v.float() / 127.5 - 1) for v in videos.split(8)]).float()
    for buffer, value in ((net.mean, z.mean(dim=(0, 3, 4))), (net.std, z.std(dim=(0, 3, 4)))):
        known = value.shape[1]
        buffer[:, :known] = value
        buffer[:, known:] = value[:, -1:]


# --- denoisers ------------------------------------------------------------------------------------

FILES = {"dit": "model.safetensors", "video2world": "video2world.safetensors"}


def given_scene(seed: int) -> world.Scene:
    """Return a scene to train Video2World on; in a quarter, the caption tells the motion."""
    return world.sample_scene(seed) if seed // 8 % 4 == 0 else world.free_scene(seed)


def draw_pool(
    folder: Path, device: str, wanted: range, scene_of: Callable[[int], world.Scene]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (bf16) and padded text embeddings (fp16) of scenes rendered once for all steps."""
    tokenizer = Tokenizer(TINY.tokenizer, TINY.sigma_data)
    path = folder / "tokenizer.safetensors"
    weights.load_strict(tokenizer, weights.load_tokenizer_state(path), path)
    tokenizer = tokenizer.to(device).eval()
    encoder = TextEncoder(folder / "t5", TINY.text, device, torch.float32)
    latents, texts = [], []
    for first in range(0, len(wanted), 64):
        seeds = wanted[first : first + 64]
        scenes = [scene_of(seed) for seed in seeds]
        captions = [world.caption(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
        with torch.no_grad():
            video = draw_videos(scenes, device).float() / 127.5 - 1
            latents.append(tokenizer.encode(video).bfloat16())
        texts += [pad(embedding, TINY.text).half() for embedding in encoder.encode(captions)]
    return torch.cat(latents), torch.stack(texts).to(device)


def load_start(loss_of: edm.EDMLoss, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Loads the weights that training starts from, if any."""
    if options.resume:
        path = options.out / FILES[options.part]
    elif spec.takes_frames:
        path = options.folder / FILES["dit"]
    else:
        return
    state = weights.load_dit_state(path)
    cond_frames.add_mask_columns(state, spec.dit)
    weights.load_strict(loss_of, state, path)


def draw_frames(x0: torch.Tensor) -> CondFrames:
    """The given frames of a batch. Two latent frames, which show motion, are the hardest task."""
    batch, device = len(x0), x0.device
    shares = torch.tensor([0.1, 0.15, 0.75], device=device)
    count_B = torch.multinomial(shares, batch, replacement=True)
    ln_sigma_B = cond_frames.AUG_MEAN + cond_frames.AUG_STD * torch.randn(batch, device=device)
    return CondFrames.of(x0, count_B, ln_sigma_B.exp(), torch.randn_like(x0))


def make_dit(device: str, options: argparse.Namespace) -> dict[str, object]:
    """Trains a denoiser on rendered scenes and writes its EMA: now and then, and at the end."""
    steps, batch, clips = options.steps, options.batch, options.clips
    spec = TINY_VIDEO2WORLD if options.part == "video2world" else TINY
    started = time.monotonic()
    torch.manual_seed(0)
    scene_of = given_scene if spec.takes_frames else world.sample_scene
    # The steps with much noise decide where a thing is.
    spread = 1.4 if spec.takes_frames else 1.2
    wanted = range(options.first, options.first + clips)
    latents, texts = draw_pool(options.folder, device, wanted, scene_of)
    print(options.part, f"{clips} clips rendered in {time.monotonic() - started:.0f}s", flush=True)
    net = DiT(spec.dit)
    net.init_weights(torch.Generator().manual_seed(0))
    loss_of = edm.EDMLoss(net, spec)
    load_start(loss_of, spec, options)
    loss_of = loss_of.to(device)
    if device == "cuda":
        for block in net.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(
        loss_of.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=device == "cuda"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, steps, pct_start=0.05)
    ema = PowerEMA(list(loss_of.parameters()), 0.05)
    fps_B = torch.full((batch,), spec.fps, device=device)
    losses = []
    for step in range(steps):
        chosen = torch.randint(clips, (batch,), device=device)
        x0, text_emb = latents[chosen].float(), texts[chosen].float()
        text_emb = text_emb * (torch.rand(batch, 1, 1, device=device) >= 0.15)
        sigma_B = spec.sigma_scale * torch.exp(spread * torch.randn(batch, device=device))
        noise = torch.randn_like(x0)
        frames = draw_frames(x0) if spec.takes_frames else None
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss, edm_B = loss_of(x0, sigma_B, noise, text_emb, fps_B, frames)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(loss_of.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.update(list(loss_of.parameters()), step)
        last = step == steps - 1
        if step % 200 == 0 or last:
            losses.append((step, round(loss.item(), 4), round(edm_B.mean().item(), 4)))
            print(options.part, *losses[-1], f"{time.monotonic() - started:.0f}s", flush=True)
        if step % 1000 == 999 or last:
            save_average(loss_of, ema, options.out / FILES[options.part])
    seconds = round(time.monotonic() - started)
    return {"seconds": seconds, "first_loss": losses[0][1], "last_loss": losses[-1][1]}


def save_average(loss_of: edm.EDMLoss, ema: PowerEMA, path: Path) -> None:
    """Writes the EMA in bf16."""
    named = zip(loss_of.named_parameters(), ema.shards, strict=True)
    averaged = {name: shard.bfloat16() for (name, _), shard in named}
    weights.save_dit(path, {**dict(loss_of.named_buffers()), **averaged}, "safetensors")


def measure_continuations(path: Path, device: str, count: int) -> None:
    """Prints a Video2World model's position errors on held-out scenes of free motion.

    The errors are medians in pixels, one for each of the first 16 new frames. `cosmos evaluate
    tiny_video2world` measures more.
    """
    dtype = default_dtype(device)
    r = loading.load("tiny_video2world").recipe
    tokenizer = load_tokenizer(r.model_files.tokenizer, r.spec, device, dtype)
    net = load_denoiser(r, path, device)
    scenes = [world.free_scene(seed, "heldout") for seed in range(count)]
    with torch.inference_mode():
        clips = [continuation.world_clip(r, tokenizer, scene, i) for i, scene in enumerate(scenes)]
    trials = [samples.Trial(clip.caption, 0) for clip in clips]
    texts = samples.read_prompts(r, trials, device)
    for given in reversed(GIVEN_FRAMES):
        made = continuation.continue_clips(r, net, tokenizer, clips, texts, given)
        print_errors(f"{given} given", clips, made, given)
    print_errors("round trip", clips, continuation.round_trips(tokenizer, clips), GIVEN_FRAMES[-1])


def print_errors(
    name: str, clips: Sequence[continuation.Clip], videos: Sequence[torch.Tensor], given: int
) -> None:
    """Prints the median position error of each of the first 16 new frames."""
    end = given + 16
    errors = [
        continuation.position_error(
            clip.pixels[:, given:end], video[:, given:end], clip.scene.thing.colour
        )
        for clip, video in zip(clips, videos, strict=True)
    ]
    print(name, [round(e, 2) for e in torch.stack(errors).nanmedian(0).values.tolist()], flush=True)


def main() -> None:
    """Makes one part."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["t5", "tokenizer", *FILES, "measure"])
    parser.add_argument("--folder", type=Path, default=paths.EMBEDDED_DIR)
    parser.add_argument("--out", type=Path, help="folder of the denoiser; default: --folder")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--clips", type=int, default=4096, help="scenes rendered to train on")
    parser.add_argument("--first", type=int, default=0, help="number of the first of these scenes")
    parser.add_argument("--resume", action="store_true", help="from the weights that are there")
    parser.add_argument("--pieces", type=float, default=0.5, help="tokenizer: share of the steps")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="largest learning rate")
    parser.add_argument("--measured", type=int, default=100, help="held-out scenes of video2world")
    options = parser.parse_args()
    options.out = options.out or options.folder
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    if options.part == "t5":
        make_t5(options.folder / "t5", seed=0)
        return
    if options.part == "measure":
        measure_continuations(options.out / FILES["video2world"], device, options.measured)
        return
    if options.part == "tokenizer":
        about = make_tokenizer(options.folder / "tokenizer.safetensors", device, options)
    else:
        about = make_dit(device, options)
    log = options.out / "training.json"
    known = files.read_json(log) if log.exists() else {}
    runs = known.get(options.part, []) if options.resume else []
    unsaid = ("part", "folder", "out", "measured")
    settings = {key: value for key, value in vars(options).items() if key not in unsaid}
    runs.append({"device": device, **settings, **about})
    files.write_json(log, {**known, options.part: runs})
    if options.part == "video2world":
        measure_continuations(options.out / FILES[options.part], device, options.measured)


if __name__ == "__main__":
    main()
