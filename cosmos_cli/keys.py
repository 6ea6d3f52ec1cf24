"""Every key of the recipe: type, default and sentence, and which values do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cosmos_cli.model.spec import COSMOS_7B, LORA_TARGETS, MODELS, ModelSpec

# cuBLAS takes fp8 matrices whose rows are of as many bytes; backward, a row is all tokens.
FP8_MULTIPLE = 16
TEXT = r"^[^\x00]+$"
NAME = r"^\w[\w.-]{0,99}$"
REPO = r"^(embedded|[\w-][\w.-]*/[\w-][\w.-]*)$"
# As in the shell, ~/ is the home folder.
PATHS = (
    "checkpoints_dir", "base", "dataset_dir", "videos_dir", "captions_file", "output_root",
)  # fmt: skip
PATTERNS = {
    TEXT: "text that is not empty",
    NAME: "text of letters, digits, '.', '_' and '-'",
    REPO: "a hub name like owner/name, or embedded",
}

if TYPE_CHECKING:
    ModelName = str
    LoraTargets = str
else:
    ModelName = Literal[tuple(MODELS)]
    LoraTargets = Literal[tuple(LORA_TARGETS)]
THIRD_PARTY_T5 = "comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI"
TextEncoders = Literal["comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI", "google-t5/t5-11b"]
Processes = Annotated[int, Field(ge=1, le=65536)]


def _key(group: str, description: str, default: Any = ..., **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **bounds)


def _model_key(group: str, description: str, attribute: str, **bounds: Any) -> Any:
    def default(earlier: dict[str, Any]) -> Any:
        return getattr(MODELS[earlier.get("model", COSMOS_7B.name)], attribute)

    return Field(
        default_factory=default,
        description=description,
        json_schema_extra={"group": group},
        **bounds,
    )


_model = partial(_key, "model")
_data = partial(_key, "data")
_clip = partial(_model_key, "data")
_training = partial(_key, "training")
_sampling = partial(_key, "sampling")
_output = partial(_key, "output")


class Recipe(BaseModel):
    """One run from download to video. Each description is the reference of its key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: ModelName = _model("Model to post-train and to generate with.", COSMOS_7B.name)
    checkpoints_dir: str = _model(
        "Folder of the downloaded and promoted models.", "checkpoints", pattern=TEXT
    )
    text_encoder_repo: TextEncoders = _model(
        "Hub repository of T5's weights: a third party's copy of the encoder in fp16 (10 GB), or "
        "google-t5/t5-11b itself (45 GB, of which 19.5 GB are kept).",
        THIRD_PARTY_T5,
    )
    base: str | None = _model(
        "Weights to start from, a .pt or .safetensors file or a diffusers folder; "
        "null takes the model's own.",
        None,
        pattern=TEXT,
    )

    dataset_dir: str = _data(
        "Folder of the dataset: videos, captions, embeddings and latents.", pattern=TEXT
    )
    dataset_repo: str | None = _data(
        "Hub dataset that download fetches into dataset_dir; embedded draws clips instead.",
        None,
        pattern=REPO,
    )
    dataset_revision: str | None = _data(
        "Commit, tag or branch of dataset_repo; null takes the newest, and from then on that one.",
        None,
        pattern=TEXT,
    )
    dataset_include: str | None = _data(
        "Glob of the files to fetch from dataset_repo; null fetches all.", None, pattern=TEXT
    )
    videos_dir: str | None = _data(
        "Folder of the videos, or a LeRobot dataset; null means videos inside dataset_dir.",
        None,
        pattern=TEXT,
    )
    camera: str | None = _data(
        "Camera of a LeRobot dataset; null takes the only one.", None, pattern=TEXT
    )
    captions_file: str | None = _data(
        "CSV or JSONL file with the columns file and caption; null means there is none.",
        None,
        pattern=TEXT,
    )
    prompt: str | None = _data(
        "Caption of every video that has none; with caption vlm, the words in front of what the "
        "model writes.",
        None,
        pattern=TEXT,
    )
    caption: Literal["given", "vlm"] = _data(
        "Where missing captions come from: prompt, or a vision-language model that sees the video.",
        "given",
    )
    caption_model: str | None = _data(
        "Vision-language model for caption vlm: a folder, or a repository in the local hub cache.",
        None,
        pattern=TEXT,
    )
    num_frames: int = _clip("Frames of one clip, 8k + 1.", "num_frames", ge=1)
    height: int = _clip("Height of a clip in pixels, a multiple of 16.", "height", ge=16)
    width: int = _clip("Width of a clip in pixels, a multiple of 16.", "width", ge=16)
    fps: float = _clip("Frames per second of a clip.", "fps", gt=0, le=240)
    fps_policy: Literal["keep", "resample", "reject"] = _data(
        "What to do with a video of another rate: keep its frames and its own rate, resample it "
        "to fps, or reject it.",
        "resample",
    )
    resize: Literal["stretch", "crop", "pad"] = _data(
        "How a video of another shape becomes height x width: stretch it, crop its middle, or "
        "pad it with black.",
        "crop",
    )
    clip_stride_frames: int | None = _data(
        "Frames from the start of one clip to the next; null means num_frames, without overlap.",
        None,
        ge=1,
    )
    max_clips_per_video: int | None = _data(
        "Most clips taken from one video; null takes all.", None, ge=1
    )
    holdout_share: float = _data(
        "Share of the videos that train never sees, at least one when above 0, to measure on.",
        0.0,
        ge=0,
        le=0.5,
    )
    check_every_clips: int = _data(
        "One clip in so many is decoded back and shown in prep's report, at most 12.", 50, ge=1
    )
    strict: bool = _data("Fail prep when one video is rejected, instead of counting it.", False)

    learning_rate: float = _training(
        "Step size of AdamW once the warm-up is over; 2^-14.3 in the reference.",
        4.957595e-5,
        gt=0,
        le=1,
    )
    beta1: float = _training("Decay of AdamW's mean of the gradient.", 0.9, ge=0, lt=1)
    beta2: float = _training("Decay of AdamW's mean of the squared gradient.", 0.99, ge=0, lt=1)
    adam_eps: float = _training("Term that keeps AdamW's division finite.", 1e-10, gt=0, le=1)
    weight_decay: float = _training("Decoupled weight decay of every weight.", 0.1, ge=0, le=10)
    grad_clip: float = _training("Largest global norm of the gradient.", 1.0, gt=0)
    warmup_steps: int = _training(
        "Steps over which the learning rate rises to its value.", 100, ge=0
    )
    lr_start_factor: float = _training(
        "Share of learning_rate at the first step of the warm-up.", 1e-6, ge=0, le=1
    )
    lr_end_factor: float = _training(
        "Share of learning_rate at max_steps, reached in a line from the end of the warm-up.",
        1.0,
        ge=0,
        le=1,
    )
    max_steps: int = _training("Optimizer steps of the whole run.", 1000, ge=1, le=10**8)
    save_every_steps: int = _training("Steps between two checkpoints.", 200, ge=1)
    log_every_steps: int = _training("Steps between two lines of metrics.", 10, ge=1)
    validate_every_steps: int = _training(
        "Steps between two measurements on held-out clips; every save has one too.", 100, ge=1
    )
    validate_clips: int = _training(
        "Most held-out clips of a measurement, each at four noise levels.", 8, ge=1
    )
    preview_every_steps: int = _training(
        "Steps between two previews: what one denoising step makes of a few clips; 0 makes none.",
        100,
        ge=0,
    )
    sample_every_saves: int = _training(
        "One save in so many also makes whole videos of the same clips' captions; 0 makes none.",
        5,
        ge=0,
    )
    preview_clips: int = _training(
        "Clips of a preview and videos of a sample, of held-out clips where there are some.",
        2,
        ge=1,
        le=16,
    )
    preview_share: float = _training(
        "Largest share of the run's time for previews and samples; they are made less often when "
        "they would take more, the first ones aside.",
        0.02,
        gt=0,
        le=1,
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = _training(
        "What shows the metrics besides the run's own files.", "none"
    )
    timeout_seconds: float = _training(
        "Seconds without a sign of life of a process after which the run ends.", 1800.0, ge=1
    )
    max_restarts: int = _training(
        "Times that training starts again from its last save, when a process is lost.", 0, ge=0
    )
    keep_last: int = _training("Newest resume states that are kept on disk.", 2, ge=1)
    keep_every_steps: int = _training(
        "Resume states of every so many steps are kept too; 0 keeps none.", 0, ge=0
    )
    global_batch_size: int = _training("Clips per optimizer step over all processes.", 8, ge=1)
    micro_batch_size: int = _training("Clips that one process holds at a time.", 1, ge=1)
    num_processes: Processes | Literal["auto"] = _training(
        "Training processes; auto is one per GPU, or one on a CPU.", "auto"
    )
    sequence_parallel: int = _training(
        "Processes that share the tokens of one clip, where one alone has too little memory or a "
        "step takes too long; they divide the attention heads.",
        1,
        ge=1,
    )
    zero_stage: int = _training(
        "ZeRO stage: 1 shards the optimizer, 2 the gradients too, 3 the weights too; 0 is as 1.",
        3,
        ge=0,
        le=3,
    )
    offload: Literal["none", "ema", "optimizer", "parameters"] = _training(
        "What the memory of the host holds instead of the GPU's: nothing, the EMA, the optimizer "
        "and gradients too, or the weights too; each costs more time than the one before.",
        "none",
    )
    precision: Literal["bf16", "fp32"] = _training(
        "Number format of weights and activations; the optimizer keeps fp32.", "bf16"
    )
    hpz_partition_size: Processes | Literal["auto"] = _training(
        "Processes that hold a second copy of the weights among them, so that the backward pass "
        "gathers within a node (ZeRO++ hpZ); auto is those of a node where there are several, 1 "
        "is none.",
        "auto",
    )
    activation_checkpointing: Literal["none", "most", "attention", "all"] = _training(
        "What the backward pass computes again to save memory: nothing, all of a block but its "
        "attention, which is most of the time, or all of it; most is attention, but keeps the "
        "linears too in as many blocks as fit.",
        "all",
    )
    transformer_engine: Literal["off", "linears", "all"] = _training(
        "What NVIDIA's Transformer Engine computes: nothing, the linears of all blocks but the "
        "first and last in fp8, or also attention and its norms in bf16. Weights and files stay as "
        "they are. Of what its linears give, most keeps nothing.",
        "off",
    )
    optimizer: Literal["auto", "torch", "deepspeed", "apex"] = _training(
        "Whose AdamW: torch's fused one, which auto takes, DeepSpeed's, which is compiled at its "
        "first use, or that of NVIDIA's Apex.",
        "auto",
    )
    text_dropout: float = _training(
        "Share of clips that are trained without their text, which guidance needs.",
        0.2,
        ge=0,
        lt=1,
    )
    # Above 12^-0.5 = 0.2887 the power function of EDM2 has no positive exponent.
    ema_rate: float = _training(
        "Width of the EMA's memory as a share of the run (EDM2's relative deviation).",
        0.1,
        gt=0,
        le=0.28,
    )
    seed: int = _training("Seed of clip order, noise and dropout.", 0, ge=0, lt=2**32)
    lora_rank: int = _training(
        "Rank of a LoRA, which trains two small factors beside each of some frozen weights; "
        "0 trains all weights.",
        0,
        ge=0,
        le=1024,
    )
    lora_alpha: float | None = _training(
        "The change is lora_alpha / lora_rank times the product of the factors; null is lora_rank.",
        None,
        gt=0,
    )
    lora_targets: LoraTargets = _training(
        "Linears of every block that a LoRA changes: attention, attention_mlp, or all with the "
        "modulation too.",
        "attention",
    )

    sampler: Literal["euler", "res"] = _sampling("Solver of the sampling steps.", "euler")
    num_steps: int = _sampling("Sampling steps of one video.", 35, ge=2, le=1000)
    guidance: float = _sampling(
        "Guidance g in cond + g (cond - uncond); 0 turns it off.", 7.0, ge=0, le=100
    )
    negative_prompt: str | None = _sampling(
        'Text to steer away from; null is the model\'s own, "" is none.', None
    )
    sampling_seed: int = _sampling(
        "Seed of a video's noise; the same seed and prompt give the same video.", 1, ge=0, lt=2**32
    )
    upsampler: str = _sampling(
        "Folder of the language model that makes short prompts long, or off.", "off", pattern=TEXT
    )
    upsampler_word_limit: int = _sampling(
        "Most words of a prompt that is made longer; one with more stays as it is.", 250, ge=0
    )
    guardrails: Literal["on", "off"] = _sampling(
        "Check prompts and videos; what is blocked is not made. off is noted in every sidecar.",
        "on",
    )
    memory: Literal["auto", "together", "in_turn"] = _sampling(
        "Whether generate keeps all networks in memory together, or has them in turn, each loaded "
        "once a batch; auto keeps them for prompts that come one by one, if they fit.",
        "auto",
    )
    compile: Literal["auto", "on", "off"] = _sampling(
        "Have torch compile the denoiser's blocks, in training what lies between their linears, in "
        "prep the tokenizer's blocks; auto does on a GPU where it saves time.",
        "auto",
    )
    video_crf: float = _sampling(
        "Quality of the mp4 as x264's CRF, smaller is better.", 18.0, ge=0, le=51
    )

    output_root: str = _output(
        "Folder of all runs; the environment variable OUTPUT_ROOT wins.", "outputs", pattern=TEXT
    )
    project: str = _output(
        "First folder of the run under output_root.", "posttraining", pattern=NAME
    )
    group: str = _output(
        "Second folder of the run under output_root.", "diffusion_text2world", pattern=NAME
    )
    name: str = _output("Folder of the run itself.", "my_run", pattern=NAME)
    min_free_disk_gb: float = _output(
        "Space that must stay free when prep or train starts.", 10.0, ge=0
    )

    @property
    def spec(self) -> ModelSpec:
        """The numbers of the model."""
        return MODELS[self.model]

    @property
    def stride(self) -> int:
        """Frames from the start of one clip to the start of the next."""
        return self.clip_stride_frames or self.num_frames

    @property
    def lora_scale(self) -> float:
        """What the product of a LoRA's factors is multiplied by."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def trained_parameters(self) -> int:
        """How many weights are trained."""
        if self.lora_rank:
            return self.spec.dit.lora_parameters(self.lora_rank, self.lora_targets)
        return self.spec.dit.parameters

    @property
    def run_dir(self) -> Path:
        """The folder of the run, absolute."""
        return Path(self.output_root, self.project, self.group, self.name).absolute()


def conflicts(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The keys, the problem and the fix of each set of values that cannot work together."""
    spec, tok = recipe.spec, recipe.spec.tokenizer
    if recipe.caption == "vlm" and not recipe.caption_model:
        yield ("caption", "caption_model"), "caption vlm needs a model", "set caption_model"
    if (recipe.num_frames - 1) % tok.temporal or recipe.num_frames > tok.chunk_frames:
        rule = f"must be {tok.temporal}k + 1 and at most {tok.chunk_frames}"
        fix = _neighbours(recipe.num_frames - 1, tok.temporal, tok.chunk_frames - 1, add=1)
        yield ("num_frames",), f"{rule}, found {recipe.num_frames}", fix
    for key, size in (("height", recipe.height), ("width", recipe.width)):
        if size % spec.size_multiple or size > spec.max_size:
            rule = f"must be a multiple of {spec.size_multiple} and at most {spec.max_size}"
            fix = _neighbours(size, spec.size_multiple, spec.max_size)
            yield (key,), f"{rule}, found {size}", fix
    least = {"none": 0, "ema": 0, "optimizer": 1, "parameters": 3}[recipe.offload]
    if recipe.zero_stage < least:
        what = f"{recipe.offload} needs zero_stage {least} or above, found {recipe.zero_stage}"
        yield ("offload", "zero_stage"), what, f"set zero_stage: {least}"
    if recipe.hpz_partition_size not in ("auto", 1) and recipe.zero_stage < 3:
        what = f"hpz_partition_size shards weights, zero_stage {recipe.zero_stage} does not"
        yield ("hpz_partition_size", "zero_stage"), what, "set zero_stage: 3"
    shared = recipe.sequence_parallel
    tokens = spec.tokens(recipe.num_frames, recipe.height, recipe.width)
    if spec.dit.heads % shared or tokens % shared:
        what = f"must divide {spec.dit.heads} heads and {tokens} tokens, found {shared}"
        yield ("sequence_parallel",), what, "use a power of two"
    if recipe.transformer_engine != "off":
        yield from engine_conflicts(recipe, recipe.micro_batch_size * tokens // shared)
    if recipe.num_processes == "auto":
        return
    if recipe.num_processes % shared:
        what = f"must be a multiple of sequence_parallel {shared}, found {recipe.num_processes}"
        fix = _neighbours(recipe.num_processes, shared)
        yield ("num_processes", "sequence_parallel"), what, fix
        return
    micro, total = recipe.micro_batch_size, recipe.global_batch_size
    held = micro * (teams := recipe.num_processes // shared)
    if total % held:
        counted = "num_processes" if shared == 1 else "(num_processes / sequence_parallel)"
        what = f"global_batch_size {total} is no multiple of micro_batch_size x {counted} = "
        what += f"{micro} x {teams} = {held}"
        keys = ("global_batch_size", "num_processes", "micro_batch_size", "sequence_parallel")
        yield keys, what, f"{_neighbours(total, held)} for global_batch_size"


def engine_conflicts(recipe: Recipe, tokens: int) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The same of what Transformer Engine computes, with so many tokens in each process."""
    key, mode = "transformer_engine", recipe.activation_checkpointing
    if recipe.precision != "bf16":
        yield (key, "precision"), f"{key} needs precision bf16", f"set {key}: off"
    if recipe.transformer_engine == "all" and mode in ("attention", "most"):
        fix = f"set activation_checkpointing: all, or {key}: linears"
        what = f"{mode} cannot keep the attention of Transformer Engine"
        yield ("activation_checkpointing", key), what, fix
    if tokens % FP8_MULTIPLE:
        what = f"needs a multiple of {FP8_MULTIPLE} tokens in each process, found {tokens}"
        yield (key,), what, f"set another size, or {key}: off"


def _neighbours(value: int, step: int, limit: float = float("inf"), add: int = 0) -> str:
    below = value // step * step
    near = [n + add for n in (below, below + step) if n <= limit and n + add > 0]
    return f"try {' or '.join(map(str, near or [int(limit) + add]))}"


def oddities(recipe: Recipe) -> Iterator[str]:
    """What works but is rarely meant, a sentence each."""
    spec = recipe.spec
    if recipe.warmup_steps >= recipe.max_steps:
        rise = (recipe.max_steps - 1) / recipe.warmup_steps
        share = recipe.lr_start_factor + (1 - recipe.lr_start_factor) * rise
        yield (
            f"warmup_steps {recipe.warmup_steps} is not below max_steps {recipe.max_steps}: the "
            f"learning rate only ever reaches {share:.1%} of learning_rate"
        )
    if (recipe.height, recipe.width) not in spec.sizes:
        sizes = ", ".join(f"{height}x{width}" for height, width in spec.sizes)
        yield (
            f"{recipe.height}x{recipe.width} is not a size that {spec.name} was trained at "
            f"({sizes}): expect to train longer"
        )
    if recipe.num_frames != spec.num_frames:
        yield (
            f"num_frames {recipe.num_frames} is not the {spec.num_frames} that {spec.name} was "
            "trained at: expect to train longer"
        )
    if recipe.stride < recipe.num_frames:
        yield (
            f"clip_stride_frames {recipe.stride} is below num_frames {recipe.num_frames}: clips "
            f"overlap by {recipe.num_frames - recipe.stride} frames"
        )
    if recipe.save_every_steps > recipe.max_steps:
        yield (
            f"save_every_steps {recipe.save_every_steps} is above max_steps {recipe.max_steps}: "
            "a run that is killed starts again from the beginning"
        )
    if recipe.keep_every_steps % recipe.save_every_steps:
        yield (
            f"keep_every_steps {recipe.keep_every_steps} is no multiple of save_every_steps "
            f"{recipe.save_every_steps}: only the saves of both are kept"
        )
    if recipe.log_every_steps > recipe.max_steps:
        yield (
            f"log_every_steps {recipe.log_every_steps} is above max_steps {recipe.max_steps}: "
            "only the last step's are written"
        )
    if recipe.keep_last == 1:
        yield "keep_last 1 keeps one resume state: there is none to fall back on"
    if recipe.caption_model and recipe.caption != "vlm":
        yield "caption_model has no effect without caption vlm"
    needs = dict.fromkeys(("dataset_revision", "dataset_include"), "dataset_repo")
    for key, other in ({"lora_alpha": "lora_rank"} | needs).items():
        if getattr(recipe, key) and not getattr(recipe, other):
            yield f"{key} has no effect without {other}"
