"""List the files of a promoted model that a push uploads: weights, LoRA files, card and samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_cli import console, files, model_card, paths
from cosmos_cli.generate import promoted
from cosmos_cli.generate.jobs import Lora, Weights
from cosmos_cli.model_card import Extras
from cosmos_cli.paths import Run
from cosmos_cli.push import Item, run_name
from cosmos_cli.train import status

if TYPE_CHECKING:
    from cosmos_cli.recipe.keys import Recipe


def of_model(r: Recipe, target: Path, repo: str) -> list[Item]:
    """Return all files to push of the promoted model in a folder."""
    from cosmos_cli.recipe import loading

    own = loading.load(str(target / "recipe.yaml")).recipe
    manifest = promoted.manifest_of(target)
    samples = samples_of(Run(r.run_dir), manifest["step"])
    named = tuple((item.name, prompt) for item, prompt in samples)
    extras = Extras(repo, named, scores_of(manifest))
    texts = texts_of(own, manifest, extras)
    return [*of_folder(own, target), *texts, *(item for item, _ in samples)]


def planned(r: Recipe, run: Run, wanted: dict[str, Any], base: Path) -> list[Item]:
    """Return the large files that would be pushed of a model that is not promoted yet."""
    console.say("it is not promoted yet: the sizes are about those of the checkpoint and the base")
    step, kind = wanted["step"], wanted["weights"]
    weights = base if r.lora_rank else run.model(step, kind)
    parts = [path for path in sorted(weights.rglob("*")) if path.suffix in (".bin", ".safetensors")]
    name = paths.MODEL_FORMATS[wanted["format"]]
    if wanted["format"] == "diffusers":
        name += "/diffusion_pytorch_model.safetensors"
    items = [Item(name, path) for path in (parts if weights.is_dir() else [weights])]
    if r.lora_rank:
        names = (paths.LORA_FILE, paths.COMFYUI_LORA_FILE)
        items += [Item(name, run.lora(step, kind)) for name in names]
    return [*items, *(item for item, _ in samples_of(run, step))]


def of_folder(r: Recipe, folder: Path) -> list[Item]:
    """Return the weights, LoRA files and licence texts of a promoted model."""
    weights = paths.weights_in(folder)
    found = sorted(weights.rglob("[!.]*")) if weights.is_dir() else [weights]
    found += [folder / name for name in (paths.LORA_FILE, paths.COMFYUI_LORA_FILE, "NOTICE")]
    return [Item(p.relative_to(folder).as_posix(), p) for p in found if p.is_file()] + _licence(r)


def _licence(r: Recipe) -> list[Item]:
    """Return the licence that came with the base, which must go with a derived model."""
    if r.spec.embedded:
        return []
    folder = paths.model_files(r.spec, r.checkpoints_dir).dit.parent
    texts = [path for path in sorted(folder.glob("LICENSE*")) if path.is_file()]
    if not texts:
        console.warn(
            f"{folder} has no LICENSE: before you distribute the model, add a copy of "
            f"{model_card.LICENCE_URL}"
        )
    return [Item(path.name, path) for path in texts]


def samples_of(run: Run, step: int) -> list[tuple[Item, str]]:
    """Return the videos that a run sampled at a step, with their prompts."""
    prompts = status.sample_prompts(run, step)
    videos = ((run.sample(step, i), prompt) for i, prompt in enumerate(prompts))
    return [(Item(f"samples/{p.name}", p), prompt) for p, prompt in videos if p.is_file()]


def texts_of(r: Recipe, manifest: dict[str, Any], extras: Extras) -> list[Item]:
    """Return the card, manifest and recipe for the hub, without paths of this machine."""
    from cosmos_cli.recipe import loading

    kept = portable(r)
    recipe = json.loads(kept.model_dump_json())
    named = {**manifest, "run": run_name(manifest["run"]), "recipe": recipe}
    for key in ("base", "checkpoint"):
        named[key] = {**manifest[key], "path": Path(manifest[key]["path"]).name}
    texts = {
        "README.md": model_card.card(r, manifest, extras),
        "recipe.yaml": loading.dump(kept),
        paths.MANIFEST_FILE: json.dumps(named, indent=1, ensure_ascii=False) + "\n",
    }
    return [Item(name, text.encode(errors="surrogateescape")) for name, text in texts.items()]


def portable(r: Recipe) -> Recipe:
    """Return a recipe with the default, or the name alone, for each absolute path of a key."""
    from cosmos_cli.recipe.keys import PATHS

    values = r.model_dump()
    absolute = [key for key in PATHS if values[key] and Path(values[key]).is_absolute()]
    update = {key: type(r).model_fields[key].default for key in absolute}
    if "dataset_dir" in update:
        update["dataset_dir"] = f"datasets/{Path(r.dataset_dir).name}"
    return r.model_copy(update=update)


def scores_of(manifest: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the table of the newest evaluation of a promoted model in outputs, [] without one."""
    measured = {manifest["sha256"]}
    if lora := manifest.get("lora"):
        measured.add(Weights(
            Path(), manifest["base"]["sha256"], (Lora(Path(), 1.0, lora["sha256"]),)
        ).identity)  # fmt: skip
    found = sorted(Path("outputs").glob("evaluation*.json"), key=files.stamp_of, reverse=True)
    for path in found:
        figures = files.read_json(path)
        models = figures.get("models", {}) if isinstance(figures, dict) else {}
        if measured & {model.get("weights") for model in models.values()}:
            from cosmos_cli.evaluate import page

            try:
                rows = page.figure_rows(figures)
            except KeyError:
                console.warn(
                    f"{path.absolute()}: another version wrote it, so the card has no scores; "
                    "`cosmos evaluate RECIPE` writes it anew"
                )
                return []
            console.say(f"the card shows the scores in {path.absolute()}")
            return [("", "by chance", *models), *rows]
    return []
