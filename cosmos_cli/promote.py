"""Turn a checkpoint of a run into a verified, self-describing model folder that generate loads."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import __version__, console, exchange, files, hashes, model_card, paths
from cosmos_cli.errors import asset_error
from cosmos_cli.model import cond_frames, lora, lora_files, tensor_names, weights
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.finite import require_finite
from cosmos_cli.paths import Run
from cosmos_cli.recipe import loading
from cosmos_cli.recipe.keys import Recipe
from cosmos_cli.train import resumes


def promote(r: Recipe, step: int, kind: str, format: str, target: Path) -> dict[str, Any]:
    """Check the weights of a step against the base, write the model folder, return its manifest.

    The recipe that the run was trained with is used instead of `r`, if it still exists. `kind` is
    ema or reg, `format` a key of `paths.MODEL_FORMATS`. `target` is replaced as a whole; the caller
    must hold `exchange.alone` of it.

    Raises:
        UserError: the checkpoint is missing, damaged, not finite, or equal to the base.
    """
    run = Run(r.run_dir)
    r = resumes.trained_recipe(r, run)
    r = r.model_copy(update={"checkpoints_dir": str(target.parent)})
    source = run.lora(step, kind) if r.lora_rank else run.model(step, kind)
    console.say(f"reading {source}")
    base = r.model_files.dit
    base_sha256 = hashes.sha256_path(base) if base.exists() else ""
    resumes.require_base(run, base, base_sha256)
    original = weights.load_dit_state(base)
    cond_frames.add_mask_columns(original, r.spec.dit)
    tuned = lora.merge(original, source, 1.0) if r.lora_rank else weights.load_dit_state(source)
    with torch.device("meta"):
        expected = {f"net.{k}": v.shape for k, v in DiT(r.spec.dit).state_dict().items()}
    net = {name: tensor for name, tensor in tuned.items() if name.startswith("net.")}
    tensor_names.check_keys(expected, net, source)
    tensor_names.check_keys(expected, {k: v for k, v in original.items() if k in net}, base)
    changes = relative_changes(net, original)
    fix = "promote an earlier step: `--step N`"
    require_finite(original, base, tensor_names.name_in_file(base))
    require_finite(tuned, source, tensor_names.name_in_file(source), fix)
    require_trained(changes, source)
    # The diffusers format has no place for the log-variance head, which only training needs.
    written = net if format == "diffusers" else tuned
    state = run.resume_state(step) / paths.MANIFEST_FILE
    kept = {"lora": _lora(original, tuned, source)} if r.lora_rank else {}
    return _write_folder(r, target, written, {
        **kept,
        "model": r.model,
        "format": format,
        "weights": kind,
        "step": step,
        "run": str(run.root),
        "checkpoint": {"path": str(source), "sha256": hashes.sha256_path(source)},
        "base": {"path": str(base), "sha256": base_sha256},
        "dataset_manifest_sha256": files.read_json(state)["dataset"] if state.exists() else None,
        "relative_change": changes,
        "recipe": json.loads(r.model_dump_json()),
        "cosmos": __version__,
    })  # fmt: skip


def _lora(base: dict[str, Tensor], merged: dict[str, Tensor], source: Path) -> dict[str, Any]:
    """Return the manifest's entry of the LoRA; report how much of it the merged weights keep."""
    kept = lora.kept_share(base, merged, source)
    dtype = next(tensor.dtype for name, tensor in merged.items() if name.startswith("net.blocks."))
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype)
    console.say(
        f"the merged weights in {precision or dtype} kept {kept:.0%} of the LoRA's change; "
        f"{paths.LORA_FILE} keeps all of it, and generate uses that file if it finds the base"
    )
    return {"file": paths.LORA_FILE, "sha256": hashes.sha256_file(source), "kept": kept}


def require_trained(changes: dict[str, float], source: Path) -> None:
    """Refuse weights that diverged or did not change in training.

    Raises:
        UserError: they are not finite, or equal to the base.
    """
    if bad := [group for group, change in changes.items() if math.isnan(change)]:
        fix = "promote an earlier step: `--step N`"
        raise asset_error(source, f"holds numbers that are not finite in {', '.join(bad)}", fix)
    if not any(changes.values()):
        fix = "train longer, or look at learning_rate and warmup_steps"
        raise asset_error(source, "does not differ from the base weights", fix)


def relative_changes(tuned: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, float]:
    """Return |tuned - base| / |base| of each group of weights, NaN if a number is not finite."""
    sums: dict[str, list[float]] = {}
    for name, tensor in tuned.items():
        group = re.sub(r"^net\.(blocks\.\d+\.[a-z_]+|[a-z_]+).*$", r"\1", name)
        group = re.sub(r"\.\d+\.", ".", group)
        before = base[name].float()
        difference = (tensor.float() - before).square().sum().item()
        total = sums.setdefault(group, [0.0, 0.0])
        total[0] += difference
        total[1] += before.square().sum().item()
    return {
        group: math.sqrt(changed / max(norm, 1e-30)) if math.isfinite(changed) else math.nan
        for group, (changed, norm) in sorted(sums.items())
    }


def _write_folder(
    r: Recipe, target: Path, state: dict[str, Tensor], manifest: dict[str, Any]
) -> dict[str, Any]:
    """Build the folder next to the old one, exchange the two, return the completed manifest.

    The weights are verified by reading them back.
    """
    with exchange.replacing(target) as building:
        path = building / paths.MODEL_FORMATS[manifest["format"]]
        if manifest["format"] == "diffusers":
            weights.save_diffusers(path, state, r.spec.dit)
        else:
            weights.save_dit(path, state, manifest["format"])
        written = weights.load_dit_state(path)
        if written.keys() != state.keys() or any(
            not torch.equal(written[name], tensor) for name, tensor in state.items()
        ):
            fix = "check the disk, then run `cosmos promote RECIPE` again"
            raise asset_error(path, "does not read back as it was written", fix)
        del written
        if "lora" in manifest:
            _copy_lora(Path(manifest["checkpoint"]["path"]), building, manifest["lora"]["sha256"])
        manifest["sha256"] = hashes.sha256_path(path)
        files.write_text(building / "recipe.yaml", loading.dump(r))
        files.write_text(building / "README.md", model_card.card(r, manifest))
        if not r.spec.embedded:
            files.write_text(building / "NOTICE", model_card.NOTICE)
        files.write_json(building / paths.MANIFEST_FILE, manifest)
    return manifest


def _copy_lora(source: Path, folder: Path, sha256: str) -> None:
    """Copy the merged LoRA file into the model folder, and write it for ComfyUI next to it."""
    target = folder / paths.LORA_FILE
    with files.atomic_file(target) as temporary:
        shutil.copyfile(source, temporary)
    if hashes.sha256_file(target) != sha256:
        fix = "check the disk, then run `cosmos promote RECIPE` again"
        raise asset_error(source, "was copied with errors", fix)
    lora_files.save_for_comfyui(folder / paths.COMFYUI_LORA_FILE, lora_files.load_lora(target))
