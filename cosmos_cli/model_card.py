"""Write the model card of a promoted model: licence, data, scores, samples, loading. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, files, hashes, paths

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe

LICENCE_URL = (
    "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/"
)
# Section 3 of the licence requires these texts of anyone who distributes a derived model.
NOTICE = "Licensed by NVIDIA Corporation under the NVIDIA Open Model License\n"
_TERMS = f"""
Built on NVIDIA Cosmos.

Derived from a model of NVIDIA Corporation and under the [NVIDIA Open Model License]({LICENCE_URL}).
If you distribute it, include a copy of that licence and the file NOTICE, and keep the line above on
a page about it. The licence ends if you disable a guardrail without putting an equal one in place.
"""
_LORA_WORDS = f"""
`{paths.LORA_FILE}` is the LoRA that was trained, in the format of diffusers and peft.
`{paths.COMFYUI_LORA_FILE}` is the same one for ComfyUI and diffusion-pipe.
"""
_WHOLE_EXAMPLE = """transformer = CosmosTransformer3DModel.from_pretrained(
    "{repo}", subfolder="transformer", torch_dtype=torch.bfloat16
)
"""
_LORA_EXAMPLE = """# A folder or repository with the base model in the format of diffusers.
BASE = "FOLDER"
transformer = CosmosTransformer3DModel.from_pretrained(
    BASE, subfolder="transformer", torch_dtype=torch.bfloat16
)
transformer.load_lora_adapter("{repo}", weight_name="lora.safetensors")
"""


@dataclass(frozen=True)
class Extras:
    """Holds what a card on the hub shows in addition to the manifest.

    Attributes:
        repo: the repository, as owner/name.
        samples: the name in the repository and the prompt of each sample video.
        scores: the table of an evaluation of this model, with its header; () if there is none.
    """

    repo: str = ""
    samples: tuple[tuple[str, str], ...] = ()
    scores: Sequence[tuple[str, ...]] = ()


def card(r: Recipe, manifest: Mapping[str, Any], extras: Extras | None = None) -> str:
    """Return the card of a model, as it lies in its folder or with the extras of the hub."""
    extras = extras or Extras()
    steps = f"{manifest['weights'].upper()} weights of step {manifest['step']}"
    trained = f"with a LoRA of rank {r.lora_rank} " if "lora" in manifest else ""
    parts = [
        f"---\n{_fields(r, extras)}---\n\n# {r.model}, post-trained as {r.name}\n",
        f"{steps} of the run `{r.name}`, trained {trained}at {r.num_frames} frames of "
        f"{r.width}x{r.height}.\n",
        _samples(manifest, extras),
        f"## Use\n\n{_use(r, extras)}\n"
        f"`{paths.MODEL_FORMATS[manifest['format']]}` holds the weights. `manifest.json` holds the "
        "hashes of\nweights, base and dataset and the whole recipe; `recipe.yaml` is the same "
        f"recipe.\n{_LORA_WORDS if 'lora' in manifest else ''}",
        _diffusers(r, manifest, extras),
        f"## Data\n\n{_data(r, manifest)}\n",
        _scores(extras),
        f"## Licence\n{_licence(r)}",
    ]
    return "\n".join(filter(None, parts))


def _fields(r: Recipe, extras: Extras) -> str:
    """Return the fields that the hub reads."""
    # `cosmos promote` imports this module before it needs YAML.
    import yaml

    fields: dict[str, Any] = {"license": "apache-2.0"}
    if not r.spec.embedded:
        fields = {
            "base_model": f"nvidia/{r.model}", "license": "other",
            "license_name": "nvidia-open-model-license", "license_link": LICENCE_URL,
        }  # fmt: skip
    task = "image-to-video" if r.spec.takes_frames else "text-to-video"
    fields |= {"library_name": "cosmos-posttrain", "pipeline_tag": task}
    if extras.samples:
        # A line "---" in a caption would end the fields.
        fields["widget"] = [
            {"text": " ".join(prompt.split()), "output": {"url": name}}
            for name, prompt in extras.samples
        ]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=1000)


def _samples(manifest: Mapping[str, Any], extras: Extras) -> str:
    if not extras.samples:
        return ""
    return (
        "<Gallery />\n\nThe videos were sampled from the training weights at step "
        f"{manifest['step']}, with captions of the dataset as prompts.\n"
    )


def _use(r: Recipe, extras: Extras) -> str:
    """Return the commands that fetch the model and generate a video."""
    folder = paths.promoted_dir(r.spec, ".", r.name).name
    prompt = (r.prompt or "...").replace('"', "'")
    words = f'{"--image FILE " if r.spec.takes_frames else ""}--prompt "{prompt}"'
    if not extras.repo:
        return f"    cosmos generate {words}\n"
    return (
        f"    hf download {extras.repo} --local-dir checkpoints/{folder}\n"
        f"    cosmos generate --model {folder} {words}\n"
    )


def _diffusers(r: Recipe, manifest: Mapping[str, Any], extras: Extras) -> str:
    """Return the section that loads the model with diffusers."""
    whole = manifest["format"] == "diffusers"
    if not whole and "lora" not in manifest:
        return (
            "## diffusers\n\nThese weights are not in the format of diffusers; "
            "`cosmos promote RECIPE --format diffusers` writes it.\n"
        )
    example = _WHOLE_EXAMPLE if whole else _LORA_EXAMPLE
    pipeline, more = "CosmosTextToWorldPipeline", ""
    if r.spec.takes_frames:
        pipeline = "CosmosVideoToWorldPipeline"
        more = " Give it the scheduler `EDMEulerScheduler(sigma_min=0.0002)`."
    return (
        "## diffusers\n\n```python\nimport torch\nfrom diffusers import CosmosTransformer3DModel"
        f"\n\n{example.format(repo=extras.repo or '.')}```\n\n"
        f"`{pipeline}.from_pretrained(..., transformer=transformer)` uses it.{more}\n"
    )


def _data(r: Recipe, manifest: Mapping[str, Any]) -> str:
    """Describe the dataset in numbers; name neither its files nor its captions."""
    known = manifest.get("dataset_manifest_sha256")
    path = r.dataset.manifest
    if not known or not path.is_file() or hashes.sha256_file(path) != known:
        words = (
            f"`{Path(r.dataset_dir).name}`. Its videos are not counted here, since the prepared "
            "dataset is missing or was prepared again."
        )
    else:
        found = files.read_json(path, files.MANIFEST)
        used = [video for video in found["videos"] if video["verdict"] == "used"]
        held_out = sum(video.get("split") == "heldout" for video in used)
        length = console.duration(sum(video["seconds"] for video in used))
        words = (
            f"`{Path(r.dataset_dir).name}`: {len(used)} videos with captions, {length} in all, cut "
            f"into {len(found['clips'])} clips. Held out from training: {held_out} of "
            "the videos."
        )
    if r.dataset_repo == "embedded":
        words += " cosmos rendered its videos."
    elif r.dataset_repo:
        words += (
            f" It comes from [{r.dataset_repo}](https://huggingface.co/datasets/{r.dataset_repo})."
        )
    return words


def _scores(extras: Extras) -> str:
    if not extras.scores:
        return ""
    header, *rows = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in extras.scores
    ]
    line = "|" + "---|" * len(extras.scores[0])
    return "\n".join(["## Scores of `cosmos evaluate`\n", header, line, *rows, ""])


def _licence(r: Recipe) -> str:
    return "\nApache-2.0, as cosmos itself.\n" if r.spec.embedded else _TERMS
