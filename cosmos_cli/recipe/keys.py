"""Every key of a recipe: its type, default and description."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cosmos_cli import paths
from cosmos_cli.spec import (
    COSMOS_7B,
    FAST_GUIDED_ABOVE,
    FAST_LOG_SIGMAS,
    LORA_TARGETS,
    MODELS,
    ModelSpec,
)

# cuBLAS needs rows of a multiple of 16 bytes in fp8. In the backward pass a row holds all tokens.
FP8_MULTIPLE = 16
TEXT = r"^[^\x00]+$"
# pydantic checks that a text is Unicode only if it has a pattern.
ANY_TEXT = r"^[^\x00]*$"
NAME = r"^\w[\w.-]{0,99}$"
REPO = r"^(embedded|[\w-][\w.-]*/[\w-][\w.-]*)$"
# The keys that `speed: fast` sets. The sampler res evaluates the denoiser at num_steps + 1 levels.
SET_BY_FAST = {"sampler": "res", "num_steps": len(FAST_LOG_SIGMAS) - 1}
# In these keys ~ means the home folder, as in the shell.
PATHS = (
    "checkpoints_dir", "base", "dataset_dir", "videos_dir", "captions_file", "caption_model",
    "upsampler", "output_root", "likeness_model", "match_model", "distance_model",
)  # fmt: skip
PATTERNS = {
    TEXT: "text that is not empty",
    ANY_TEXT: "text",
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
Text = Annotated[str, Field(pattern=TEXT)]
AnyText = Annotated[str, Field(pattern=ANY_TEXT)]
Name = Annotated[str, Field(pattern=NAME)]
Repo = Annotated[str, Field(pattern=REPO)]
Count = Annotated[int, Field(ge=1, le=10**9)]
CountOrZero = Annotated[int, Field(ge=0, le=10**9)]
Processes = Annotated[int, Field(ge=1, le=65536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Factor = Annotated[float, Field(gt=0, le=1)]
FactorOrZero = Annotated[float, Field(ge=0, le=1)]
FactorBelowOne = Annotated[float, Field(ge=0, lt=1)]


def _key(
    group: str, description: str, default: Any = ..., *, decides: str = "", **bounds: Any
) -> Any:
    """Define a key. `decides` names the results that change with it, see `deciding`."""
    marks: dict[str, Any] = {"group": group, "decides": decides.split()}
    bounds["default_factory" if callable(default) else "default"] = default
    return Field(description=description, json_schema_extra=marks, **bounds)


def _clip(description: str, attribute: str, **bounds: Any) -> Any:
    """Define a key whose default is an attribute of the model's spec."""

    def default(earlier: dict[str, Any]) -> Any:
        return getattr(MODELS[earlier.get("model", COSMOS_7B.name)], attribute)

    return _key("data", description, default, **bounds)


_model = partial(_key, "model")
_data = partial(_key, "data")
_training = partial(_key, "training")
_sampling = partial(_key, "sampling")
_output = partial(_key, "output")
# The same, for keys that decide a result; see `Recipe.deciding`.
_dataset = partial(_data, decides="dataset")
_run = partial(_training, decides="run")
_steps = partial(_training, decides="steps")
_video = partial(_sampling, decides="video")


class Recipe(BaseModel):
    """The settings of one run, from download to video. The descriptions are the key reference."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    model: ModelName = _model(
        "Model to post-train and to generate with.", COSMOS_7B.name, decides="dataset run video"
    )
    checkpoints_dir: Text = _model("Folder of downloaded and promoted models.", "checkpoints")
    text_encoder_repo: TextEncoders = _model(
        "Hub repository of the T5 encoder. comfyanonymous/cosmos_1.0_text_encoder_and_VAE_ComfyUI: "
        "a third party's copy in fp16 (10 GB). google-t5/t5-11b: the original (a download of "
        "45 GB, of which 19.5 GB are kept).",
        THIRD_PARTY_T5,
    )
    base: Text | None = _model(
        "Weights to start from: a .pt or .safetensors file, or a folder that holds one or a "
        "diffusers model; null uses the model's own weights.",
        None,
        decides="run",
    )
    likeness_model: Text = _model(
        "DINOv2 model with which evaluate measures the likeness to the training clips: a hub "
        "repository, a folder, or off.",
        "facebook/dinov2-base",
    )
    match_model: Text = _model(
        "SigLIP model with which evaluate measures the match with the prompt: a hub repository, a "
        "folder, or off.",
        paths.SIGLIP_DIR,
    )
    distance_model: Text = _model(
        "V-JEPA 2 model with which evaluate measures the distance to the held-out clips: a hub "
        "repository, a folder, or off.",
        "facebook/vjepa2-vitl-fpc64-256",
    )

    dataset_dir: Text = _data(
        "Folder of the dataset: videos, captions, embeddings and latents.", decides="run"
    )
    dataset_repo: Repo | None = _data(
        "Hub dataset that `cosmos download` fetches into dataset_dir; embedded renders synthetic "
        "clips instead.",
        None,
    )
    dataset_revision: Text | None = _data(
        "Commit, tag or branch of dataset_repo; null takes the newest commit at the first download "
        "and stays with it.",
        None,
    )
    dataset_include: Text | None = _data(
        "Glob of the files to fetch from dataset_repo; null fetches all.", None
    )
    videos_dir: Text | None = _data(
        "Folder of the videos, or a LeRobot dataset; null means videos/ inside dataset_dir.", None
    )
    captions_file: Text | None = _data(
        "CSV or JSONL file with the columns file and caption, or file_name and text; null means "
        "metadata.csv or metadata.jsonl in the dataset, if there is one.",
        None,
    )
    prompt: Text | None = _data(
        "Caption of every video that has none; with caption vlm, the text in front of each "
        "caption that the model writes.",
        None,
    )
    caption: Literal["given", "vlm"] = _data(
        "Source of missing captions. given: the key prompt. vlm: a vision-language model describes "
        "the video.",
        "given",
    )
    caption_model: Text | None = _data(
        "Vision-language model for caption vlm: a folder, or a repository in the local hub cache.",
        None,
    )
    num_frames: Count = _clip("Frames per clip, 8k + 1.", "num_frames", decides="dataset run video")
    height: int = _clip(
        "Height of a clip in pixels, a multiple of 16.",
        "height",
        ge=16,
        decides="dataset run video",
    )
    width: int = _clip(
        "Width of a clip in pixels, a multiple of 16.", "width", ge=16, decides="dataset run video"
    )
    fps: float = _clip("Frames per second of a clip.", "fps", gt=0, le=240, decides="dataset video")
    fps_policy: Literal["keep", "resample", "reject"] = _dataset(
        "What to do with a video of another frame rate. keep: use its frames at its own rate. "
        "resample: convert it to fps. reject: do not use it.",
        "resample",
    )
    resize: Literal["stretch", "crop", "pad"] = _dataset(
        "How to fit a video of another shape to height x width. stretch: change its proportions. "
        "crop: keep the centre and cut off the edges. pad: add black bars.",
        "crop",
    )
    camera: Text | None = _dataset("Camera of a LeRobot dataset; null takes the only one.", None)
    clip_stride_frames: Count | None = _dataset(
        "Frames from the start of one clip to the start of the next; null means num_frames, so "
        "that clips do not overlap.",
        None,
    )
    max_clips_per_video: Count | None = _dataset(
        "Maximum number of clips from one video; null takes all.", None
    )
    holdout_share: float = _dataset(
        "Share of the videos held out from training for validation; at least one video if above 0.",
        0.0,
        ge=0,
        le=0.5,
    )
    check_every_clips: Count = _data(
        "prep decodes one clip in N from its latent and shows it in its report, at most 12 clips.",
        50,
    )
    strict: bool = _data(
        "true fails prep when a video is rejected; false counts rejected videos and continues.",
        False,
    )

    learning_rate: Factor = _steps(
        "Learning rate of AdamW after the warm-up; the default, 2^-14.3, is the reference's.",
        4.957595e-5,
    )
    beta1: FactorBelowOne = _steps("AdamW's decay rate for the mean of the gradient.", 0.9)
    beta2: FactorBelowOne = _steps("AdamW's decay rate for the mean of the squared gradient.", 0.99)
    adam_eps: Factor = _steps("AdamW's epsilon, which keeps its division finite.", 1e-10)
    weight_decay: float = _steps("Decoupled weight decay of every weight.", 0.1, ge=0, le=10)
    grad_clip: float = _steps("Maximum global norm of the gradient.", 1.0, gt=0)
    warmup_steps: CountOrZero = _steps(
        "Steps over which the learning rate rises linearly to learning_rate.", 100
    )
    lr_start_factor: FactorOrZero = _steps(
        "Learning rate at the first step of the warm-up, as a share of learning_rate.", 1e-6
    )
    lr_end_factor: FactorOrZero = _steps(
        "Learning rate at max_steps, as a share of learning_rate; after the warm-up it changes "
        "linearly.",
        1.0,
    )
    max_steps: int = _steps("Optimizer steps of the whole run.", 1000, ge=1, le=10**8)
    save_every_steps: Count = _training("Steps between checkpoints.", 200)
    saves: Literal["background", "blocking"] = _training(
        "How checkpoints are written. background: from a copy in CPU memory while training "
        "continues, if there is enough of it. blocking: while training waits.",
        "background",
    )
    log_every_steps: Count = _training("Steps between lines of metrics.", 10)
    validate_every_steps: Count = _training(
        "Steps between validations on held-out clips; every checkpoint is validated too.", 100
    )
    validate_clips: Count = _training(
        "Maximum number of held-out clips per validation, each at four noise levels.", 8
    )
    preview_every_steps: CountOrZero = _training(
        "Steps between previews, pictures of a few clips after one denoising step; 0 makes none.",
        100,
    )
    sample_every_saves: CountOrZero = _training(
        "Every N-th checkpoint also samples whole videos from the preview clips' captions; 0 "
        "samples none.",
        5,
    )
    preview_clips: int = _training(
        "Clips per preview and videos per sampling; held-out clips, or training clips if none are "
        "held out.",
        2,
        ge=1,
        le=16,
    )
    preview_share: Factor = _training(
        "Maximum share of the run's time for previews and samples. The first preview and the first "
        "samples are always made; later ones are skipped when they would exceed this share.",
        0.02,
    )
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = _training(
        "Experiment tracker for the metrics. none: only the run's own files. tensorboard, wandb, "
        "trackio: that tracker as well.",
        "none",
    )
    timeout_seconds: float = _training(
        "The run ends when a process shows no sign of life, or keeps the others waiting, for this "
        "many seconds.",
        1800.0,
        ge=1,
        le=1e9,
    )
    max_restarts: CountOrZero = _training(
        "Maximum number of restarts from the last checkpoint after a process is lost.", 0
    )
    keep_last: Count = _training("Number of newest resume states to keep on disk.", 2)
    keep_every_steps: CountOrZero = _training(
        "Also keep the resume states of steps that are a multiple of this; 0 keeps none of them.", 0
    )
    keep_models: CountOrZero = _training(
        "Number of newest saves whose model files are kept, besides those of the best save and of "
        "the resume states; 0 keeps all.",
        0,
    )
    global_batch_size: Count = _run("Clips per optimizer step over all processes.", 8)
    micro_batch_size: Count = _training(
        "Clips that one process computes in one forward and backward pass.", 1
    )
    num_processes: Processes | Literal["auto"] = _training(
        "Processes of prep and train; auto is one per GPU, or one on a CPU.", "auto"
    )
    sequence_parallel: Count = _training(
        "Processes in a sequence-parallel group, which splits the tokens of one clip to save "
        "memory per GPU and to shorten a step. It must divide the number of attention heads.",
        1,
    )
    zero_stage: int = _run(
        "ZeRO stage. 0 and 1: shard the optimizer state. 2: shard the gradients too. 3: shard the "
        "weights too.",
        3,
        ge=0,
        le=3,
    )
    offload: Literal["none", "ema", "optimizer", "parameters", "weights"] = _training(
        "State to keep in CPU memory instead of GPU memory. none: nothing. ema: the EMA. "
        "optimizer: the optimizer state and gradients too. parameters: the weights too. weights: "
        "for a LoRA, only the frozen weights and stored activations that do not fit on the GPU, "
        "which are copied while other blocks compute.",
        "none",
    )
    precision: Literal["bf16", "fp32"] = _run(
        "Data type of weights and activations; the optimizer keeps fp32.", "bf16"
    )
    hpz_partition_size: Processes | Literal["auto"] = _training(
        "Processes that shard a second copy of the weights (ZeRO++ hpZ), so that the backward pass "
        "gathers within a node. auto: those of one node if there are several nodes. 1: no second "
        "copy.",
        "auto",
    )
    activation_checkpointing: Literal["none", "most", "attention", "all"] = _training(
        "Activation checkpointing. none: store everything. most: like attention, but also store "
        "the outputs of the linears in as many blocks as fit. attention: recompute each block "
        "except self-attention, which takes most of the time. all: recompute whole blocks.",
        "all",
    )
    # all also moves attention and its norms to Transformer Engine, in bf16. It remains accepted
    # for existing recipes and is left out of the description: use linears.
    transformer_engine: Literal["off", "linears", "all"] = _steps(
        "Use of NVIDIA's Transformer Engine. off: none. linears: compute the linears of all blocks "
        "but the first and last in fp8; weights and files keep their format. With "
        "activation_checkpointing most, the outputs of fp8 linears are not stored.",
        "off",
    )
    optimizer: Literal["auto", "torch", "deepspeed", "apex"] = _run(
        "Implementation of AdamW. auto: the same as torch. torch: PyTorch's fused one. deepspeed: "
        "DeepSpeed's, which is compiled at its first use. apex: NVIDIA Apex's, the kernel that "
        "NVIDIA's own training uses; it is as fast as torch's (2.89 against 2.88 ms for 256 "
        "million weights).",
        "auto",
    )
    text_dropout: FactorBelowOne = _run(
        "Share of clips trained without their text, which classifier-free guidance needs.", 0.2
    )
    # Above 12^-0.5 = 0.2887 no positive exponent of EDM2's power function gives this width.
    ema_rate: float = _run(
        "Width of the EMA's averaging profile as a share of the run (EDM2's relative standard "
        "deviation).",
        0.1,
        gt=0,
        le=0.28,
    )
    seed: Seed = _run("Seed of clip order, noise and dropout.", 0)
    lora_rank: int = _run(
        "Rank of a LoRA, which freezes the weights and trains two small factors next to some of "
        "them; 0 trains all weights instead.",
        0,
        ge=0,
        le=1024,
    )
    lora_alpha: float | None = _run(
        "A LoRA adds lora_alpha / lora_rank times the product of its factors; null means "
        "lora_rank.",
        None,
        gt=0,
    )
    lora_targets: LoraTargets = _run(
        "Linears that a LoRA changes in every block. attention: those of attention. "
        "attention_mlp: those of the MLP too. all: those of the AdaLN modulation too.",
        "attention",
    )

    sampler: Literal["euler", "res"] = _video(
        "Solver of the sampling steps. euler: first order. res: second-order multistep.", "euler"
    )
    num_steps: int = _video("Sampling steps per video.", 35, ge=2, le=1000)
    guidance: float = _video(
        "Classifier-free guidance g in cond + g (cond - uncond); 0 turns it off.", 7.0, ge=0, le=100
    )
    negative_prompt: AnyText | None = _video(
        'Text to steer away from; null uses the model\'s own, "" uses none.', None
    )
    sampling_seed: Seed = _video(
        "Seed of a video's noise; the same seed and prompt give the same video.", 1
    )
    video_crf: float = _video(
        "x264's CRF for the mp4; smaller is better quality.", 18.0, ge=0, le=51
    )
    upsampler: Text = _video(
        "Folder of the language model that expands short prompts, or off.", "off"
    )
    upsampler_word_limit: CountOrZero = _video(
        "Maximum number of words of a prompt to expand; longer prompts stay as they are.", 250
    )
    guardrails: Literal["on", "off"] = _video(
        "Safety checks of prompts and videos. on: nothing that a check blocks is made. off: no "
        "checks, which every sidecar file notes.",
        "on",
    )
    speed: Literal["exact", "fast"] = _video(
        "Sampling schedule. exact: num_steps steps of sampler. fast: a fixed list of few noise "
        "levels, which sets sampler and num_steps and takes a quarter of the time; the videos "
        "differ from exact ones.",
        "exact",
    )
    sampling_precision: Literal["bf16", "fp8"] = _video(
        "Number format of the denoiser's products in generate and evaluate. bf16: the format of "
        "the weights. fp8: linears (Ada and newer GPUs) and self-attention (Hopper and data-center "
        "Blackwell) of all blocks but the first and last, 1.45 times as fast on an H100.",
        "bf16",
    )
    memory: Literal["auto", "together", "in_turn", "streamed"] = _sampling(
        "Which networks generate holds in GPU memory. auto: all, if they fit and prompts come one "
        "by one; else like in_turn. together: all. in_turn: one after another, each loaded once "
        "per batch. Blocks of the denoiser that do not fit stay in CPU memory, in one copy for all "
        "processes, and are copied while others compute. streamed: the same on a GPU; on a CPU it "
        "streams all blocks, to try it.",
        "auto",
    )
    compile: Literal["auto", "on", "off"] = _sampling(
        "Use torch.compile for the denoiser's blocks in generate, for the operations between "
        "their linears in train, and for the tokenizer's blocks in prep. auto: on a GPU, where it "
        "saves time. on: always. off: never.",
        "auto",
    )

    output_root: Text = _output(
        "Folder of all runs; the environment variable OUTPUT_ROOT wins.", "outputs"
    )
    project: Name = _output("First folder of the run under output_root.", "posttraining")
    group: Name = _output("Second folder of the run under output_root.", "diffusion_text2world")
    name: Name = _output("Folder of the run itself.", "my_run")
    min_free_disk_gb: float = _output(
        "Disk space in GB that must remain free after all that train will save; otherwise it "
        "refuses to start.",
        10.0,
        ge=0,
    )

    @classmethod
    def deciding(cls, result: Literal["dataset", "run", "steps", "video"]) -> tuple[str, ...]:
        """Return the keys that decide a result, in the order of their definition.

        dataset: what prep writes. run: what a resumed run must keep, or it is another run. steps:
        the weights that the steps after a resume give. video: what generate writes; next to these
        keys, a video depends on its prompt and its weights.

        The order is part of the manifest of a dataset and of the hash of a video: do not change it.
        """
        marks: dict[str, Any] = {
            name: field.json_schema_extra for name, field in cls.model_fields.items()
        }
        return tuple(name for name, mark in marks.items() if result in mark["decides"])

    @property
    def spec(self) -> ModelSpec:
        return MODELS[self.model]

    @property
    def element_size(self) -> int:
        """Bytes of a weight or activation in training."""
        return 2 if self.precision == "bf16" else 4

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (C, T, H, W) of the latent of a clip."""
        return self.spec.latent_shape(self.num_frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        """Tokens of the denoiser for a clip."""
        return self.spec.tokens(self.num_frames, self.height, self.width)

    @property
    def dataset(self) -> paths.Dataset:
        """The paths of the dataset."""
        return paths.Dataset.at(self.dataset_dir, self.videos_dir)

    @property
    def dataset_settings(self) -> dict[str, Any]:
        """The keys that decide what prep writes. Models that share networks share datasets."""
        settings = {key: getattr(self, key) for key in self.deciding("dataset")}
        return settings | {"model": (self.spec.shared_with or self.spec).name}

    @property
    def evaluations(self) -> int:
        """Number of noise levels at which the denoiser is evaluated."""
        # res evaluates it once more, at the end, to get the result.
        return self.num_steps + (self.sampler == "res")

    @property
    def passes(self) -> int:
        """Number of passes of the denoiser: guidance takes two per noise level."""
        guided = self.evaluations
        if self.speed == "fast":
            guided = sum(level > FAST_GUIDED_ABOVE for level in FAST_LOG_SIGMAS)
        return self.evaluations + (guided if self.guidance else 0)

    @property
    def exact_passes(self) -> int:
        """Number of passes with `speed: exact`; for fast it assumes the default num_steps."""
        if self.speed == "exact":
            return self.passes
        steps: int = type(self).model_fields["num_steps"].default
        return steps * (2 if self.guidance else 1)

    @property
    def stride(self) -> int:
        """Frames from the start of one clip to the start of the next."""
        return self.clip_stride_frames or self.num_frames

    @property
    def lora_scale(self) -> float:
        """Factor of the product of a LoRA's factors, lora_alpha / lora_rank."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def trained_parameters(self) -> int:
        """Number of weights that are trained."""
        if self.lora_rank:
            return self.spec.dit.lora_parameters(self.lora_rank, self.lora_targets)
        return self.spec.dit.parameters

    @property
    def model_files(self) -> paths.ModelFiles:
        """The paths of the model's networks. The denoiser's is `base` if that is set."""
        return paths.model_files(self.spec, self.checkpoints_dir, self.base)

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder."""
        return Path(self.output_root, self.project, self.group, self.name).absolute()
