"""Rules between keys: which values cannot work together, and which are odd."""

from __future__ import annotations

import math
from collections.abc import Iterator

from cosmos_cli.recipe.keys import FP8_MULTIPLE, SET_BY_FAST, Recipe
from cosmos_cli.spec import GIVEN_FRAMES

# Videos with a smaller share of a recipe's pixels should keep their size: enlarging adds no detail.
LEAST_SHARE_OF_PIXELS = 0.5


def conflicts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the keys, the problem and the fix of each set of values that cannot work together."""
    spec = recipe.spec
    if recipe.caption == "vlm" and not recipe.caption_model:
        fix = "name a vision-language model with `--set caption_model=FOLDER`"
        yield ("caption", "caption_model"), "caption vlm needs caption_model", fix
    yield from _length_conflicts(recipe)
    for key, size in (("height", recipe.height), ("width", recipe.width)):
        if size % spec.size_multiple or size > spec.max_size:
            rule = f"must be a multiple of {spec.size_multiple} and at most {spec.max_size}"
            fix = _nearest(key, size, spec.size_multiple, spec.max_size)
            yield (key,), f"{rule}, found {size}", fix
    yield from _speed_conflicts(recipe)
    if recipe.offload == "weights":
        yield from _streaming_conflicts(recipe)
    least_stage = {"optimizer": 1, "parameters": 3}.get(recipe.offload, 0)
    if recipe.zero_stage < least_stage:
        what = f"offload {recipe.offload} needs zero_stage {least_stage} or above, "
        what += f"found {recipe.zero_stage}"
        yield ("offload", "zero_stage"), what, f"use `--set zero_stage={least_stage}`"
    if recipe.hpz_partition_size not in ("auto", 1) and recipe.zero_stage < 3:
        what = "hpz_partition_size needs the sharded weights of zero_stage 3, "
        what += f"found zero_stage {recipe.zero_stage}"
        yield ("hpz_partition_size", "zero_stage"), what, "use `--set zero_stage=3`"
    group_size = recipe.sequence_parallel
    tokens = recipe.tokens
    if spec.dit.heads % group_size or tokens % group_size:
        what = f"must divide {spec.dit.heads} heads and {tokens} tokens, found {group_size}"
        yield (
            ("sequence_parallel",),
            what,
            f"use `--set sequence_parallel={math.gcd(group_size, spec.dit.heads, tokens)}`",
        )
    if recipe.transformer_engine != "off":
        yield from engine_conflicts(recipe, recipe.micro_batch_size * tokens // group_size)
    if recipe.num_processes == "auto":
        return
    if recipe.num_processes % group_size:
        what = f"must be a multiple of sequence_parallel {group_size}, found {recipe.num_processes}"
        fix = _nearest("num_processes", recipe.num_processes, group_size)
        fix += f" or `--set sequence_parallel={math.gcd(recipe.num_processes, group_size)}`"
        yield ("num_processes", "sequence_parallel"), what, fix
        return
    micro, total = recipe.micro_batch_size, recipe.global_batch_size
    clips_at_once = micro * (groups := recipe.num_processes // group_size)
    if total % clips_at_once:
        counted = "num_processes" if group_size == 1 else "(num_processes / sequence_parallel)"
        what = f"global_batch_size {total} is not a multiple of micro_batch_size x {counted} = "
        what += f"{micro} x {groups} = {clips_at_once}"
        keys = ("global_batch_size", "num_processes", "micro_batch_size", "sequence_parallel")
        yield keys, what, _nearest("global_batch_size", total, clips_at_once)


def _length_conflicts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the conflict of a clip's length with the model, like `conflicts`."""
    spec, tok = recipe.spec, recipe.spec.tokenizer
    if (recipe.num_frames - 1) % tok.temporal or recipe.num_frames > tok.chunk_frames:
        rule = f"must be {tok.temporal}k + 1 and at most {tok.chunk_frames}"
        fix = _nearest(
            "num_frames", recipe.num_frames - 1, tok.temporal, tok.chunk_frames - 1, add=1
        )
        yield ("num_frames",), f"{rule}, found {recipe.num_frames}", fix
    least = GIVEN_FRAMES[-1] + tok.temporal
    if spec.takes_frames and recipe.num_frames < least:
        what = f"must be at least {least}, since {spec.name} is given up to {GIVEN_FRAMES[-1]}"
        fix = f"use `--set num_frames={least}`"
        yield ("num_frames",), f"{what}, found {recipe.num_frames}", fix


def _speed_conflicts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the conflict of `speed: fast` with each key that it overrides, like `conflicts`."""
    for key, value in SET_BY_FAST.items():
        if recipe.speed == "fast" and (found := getattr(recipe, key)) != value:
            what = f"{key} {found} has no effect with speed fast, which uses {value}"
            yield (key, "speed"), what, f"leave {key} out, or use `--set speed=exact`"


def _streaming_conflicts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the conflict of `offload: weights`: all that it needs, like `conflicts`."""
    found = list(_streaming_needs(recipe))
    if found:
        keys = ("offload", *(key for key, _, _ in found))
        ways = " ".join(f"--set {way}" for _, _, way in found)
        other = "none" if recipe.zero_stage < 3 else "parameters"
        what = f"offload weights {'; it '.join(what for _, what, _ in found)}"
        yield keys, what, f"use `{ways}` or `--set offload={other}`"


def _streaming_needs(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield each key that `offload: weights` cannot work with, the problem and the setting."""
    if not recipe.lora_rank:
        yield "lora_rank", "streams frozen weights, but lora_rank 0 trains all", "lora_rank=16"
    if recipe.activation_checkpointing not in ("attention", "all"):
        what = "needs activation_checkpointing attention or all, found "
        what += recipe.activation_checkpointing
        yield "activation_checkpointing", what, "activation_checkpointing=attention"
    if recipe.zero_stage == 3:
        yield "zero_stage", "needs zero_stage 0 to 2, found 3", "zero_stage=1"
    if recipe.num_processes not in ("auto", 1):
        what = f"works in one process, found num_processes {recipe.num_processes}"
        yield "num_processes", what, "num_processes=1"


def engine_conflicts(recipe: Recipe, tokens: int) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield the conflicts of Transformer Engine, like `conflicts`.

    `tokens` is the number of tokens of a micro batch in each process.
    """
    key, mode = "transformer_engine", recipe.activation_checkpointing
    if recipe.precision != "bf16":
        what = f"{key} needs precision bf16, found {recipe.precision}"
        yield (key, "precision"), what, f"use `--set precision=bf16` or `--set {key}=off`"
    if recipe.transformer_engine == "all" and mode in ("attention", "most"):
        what = f"{mode} cannot store the attention of {key} all"
        yield ("activation_checkpointing", key), what, f"use `--set {key}=linears`"
    if tokens % FP8_MULTIPLE:
        what = f"needs a multiple of {FP8_MULTIPLE} tokens in each process, found {tokens}"
        yield (key,), what, f"use `--set {key}=off`, or change num_frames, height or width"


def _nearest(key: str, value: int, step: int, limit: float = float("inf"), add: int = 0) -> str:
    below = value // step * step
    near = [n + add for n in (below, below + step) if n <= limit and n + add > 0]
    ways = [f"`--set {key}={n}`" for n in near or [int(limit) + add]]
    return f"use {' or '.join(ways)}"


def oddities(recipe: Recipe) -> Iterator[str]:
    """Yield a warning for each value that works but is probably not intended."""
    spec = recipe.spec
    if recipe.warmup_steps >= recipe.max_steps:
        rise = (recipe.max_steps - 1) / recipe.warmup_steps
        share = recipe.lr_start_factor + (1 - recipe.lr_start_factor) * rise
        yield (
            f"warmup_steps {recipe.warmup_steps} is not below max_steps {recipe.max_steps}: the "
            f"learning rate never exceeds {share:.1%} of learning_rate"
        )
    if (recipe.height, recipe.width) not in spec.sizes:
        sizes = ", ".join(f"{width}x{height}" for height, width in spec.sizes)
        yield (
            f"{recipe.width}x{recipe.height} is not a size that {spec.name} was trained at "
            f"({sizes}): it may need more steps"
        )
    if recipe.num_frames != spec.num_frames:
        yield (
            f"num_frames {recipe.num_frames} is not the {spec.num_frames} that {spec.name} was "
            "trained at: it may need more steps"
        )
    if recipe.stride < recipe.num_frames:
        yield (
            f"clip_stride_frames {recipe.stride} is below num_frames {recipe.num_frames}: clips "
            f"overlap by {recipe.num_frames - recipe.stride} frames"
        )
    if recipe.save_every_steps > recipe.max_steps:
        yield (
            f"save_every_steps {recipe.save_every_steps} is above max_steps {recipe.max_steps}: "
            "a killed run starts again from step 0"
        )
    if recipe.keep_every_steps % recipe.save_every_steps:
        yield (
            f"keep_every_steps {recipe.keep_every_steps} is not a multiple of save_every_steps "
            f"{recipe.save_every_steps}: only saves at a common multiple of both are kept"
        )
    if recipe.log_every_steps > recipe.max_steps:
        yield (
            f"log_every_steps {recipe.log_every_steps} is above max_steps {recipe.max_steps}: "
            "only the metrics of the last step are written"
        )
    if recipe.keep_last == 1:
        yield "keep_last 1 keeps one resume state: there is no older one to fall back on"
    if recipe.caption_model and recipe.caption != "vlm":
        yield "caption_model has no effect without `--set caption=vlm`"
    needs = dict.fromkeys(("dataset_revision", "dataset_include"), "dataset_repo")
    for key, other in ({"lora_alpha": "lora_rank"} | needs).items():
        if getattr(recipe, key) and not getattr(recipe, other):
            yield f"{key} has no effect without {other}"
