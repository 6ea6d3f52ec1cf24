"""Read and write LoRA files: find the linear of each tensor and the scale of its change.

It reads the files of peft, diffusers, ComfyUI, diffusion-pipe and kohya's scripts. They differ in
the names of linears and factors and in where the scale is stored: in adapter_config.json next to
the file, in the file's header, or in one tensor per linear.

Source: peft 0.21 `tuners/lora/{config,layer,model}.py` and `utils/other.py`; diffusers 0.42
`loaders/peft.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cosmos_cli import archives, files
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.model import tensor_names, weights
from cosmos_cli.model.finite import require_finite
from cosmos_cli.model.tensor_names import (
    COLUMNS,
    DIFFUSERS,
    OURS,
    RELEASED,
    another_model,
    rename,
    some,
)

# The header entry in which diffusers stores the settings, peft's file with them, and diffusers'
# prefix of settings and tensors.
_SETTINGS = "lora_adapter_metadata"
_SETTINGS_FILE = "adapter_config.json"
_PREFIX = "transformer."
# Prefixes that wrappers and libraries put before the name of a linear, then those of kohya.
_PREFIXES = re.compile(
    r"^(base_model\.model\.|_orig_mod\.|module\.|model\.|diffusion_model\.|transformer\.|net\.)+"
)
_UNDERSCORED = re.compile(r"^(lora_unet_|lora_transformer_|lycoris_)(net_)?")
# peft may add the adapter's name after the side; lora_down and lora_up are kohya's A and B.
_PART = re.compile(
    r"(?P<linear>.+?)\.(?:lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
    r"|lora[._](?P<other>down|up)\.weight|(?P<alpha>alpha))"
)
_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
# Unsupported methods, recognised by a part of their tensor names.
_METHODS = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA", "hada_": "LoHa", "lokr_": "LoKr",
    "lora_mid": "LoCon", "lora_E": "AdaLoRA", "lora_B.bias": "a LoRA with biases",
    "modules_to_save": "a LoRA with whole layers (modules_to_save)",
}  # fmt: skip
# Settings of peft that change the meaning of the factors.
_UNSUPPORTED = (
    "use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters",
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config",
)  # fmt: skip
# Initialisations that subtract the initial factors from the base weights: these files need that
# changed base.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Settings of peft that can be ignored: they say where factors were added or how they were trained.
# fan_in_fan_out describes the layout of the base weight; the factors are stored as usual.
_WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size",
    "runtime_config", "ensure_weight_tying", "bias", "init_lora_weights",
}  # fmt: skip
# The most quantifiers in a pattern; with more, matching a name may take minutes.
_MOST_QUANTIFIERS = 3


@dataclass(frozen=True)
class Change:
    """The change of one linear: its weight W becomes W + scale * b @ a.

    Attributes:
        a: (rank, inputs), fp32 on the CPU.
        b: (outputs, rank), fp32 on the CPU.
        scale: alpha / rank unless the file states another.
        key: the name of the linear in the file, for messages.
    """

    a: Tensor
    b: Tensor
    scale: float
    key: str


class LoraSettings(BaseModel):
    """The part of peft's adapter_config.json that determines the scale of each linear."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str | None = "LORA"
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True
    r: int | None = Field(default=None, ge=1)
    # peft's default, for files that do not state it.
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    def scale(self, names: tuple[str, ...], rank: int) -> float:
        """Return the scale of a linear of this rank, whose patterns may match any of the names.

        Raises:
            ValueError: the settings give the linear another rank, or no finite scale.
        """
        expected = _matching(self.rank_pattern, names, self.r)
        if expected not in (None, rank):
            raise ValueError(f"rank {expected} for {names[0]}, whose factors have rank {rank}")
        alpha = float(_matching(self.alpha_pattern, names, self.lora_alpha))
        if not math.isfinite(alpha):
            raise ValueError(f"alpha {alpha} for {names[0]}")
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _matching(patterns: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a name, as peft does."""
    for pattern, value in patterns.items():
        if any(_compiled(pattern).match(name) for name in names):
            return value
    return default


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of settings.

    Raises:
        ValueError: it is not a valid pattern, or matching it may take forever.
    """
    quantifiers = len(re.findall(r"(?<!\\)[*+{]", pattern))
    if quantifiers > _MOST_QUANTIFIERS or re.search(r"\)[*+{]", pattern):
        raise ValueError(f"the pattern {pattern[:60]!r}, which is too complex")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"the pattern {pattern[:60]!r}, which is not valid: {error}") from error


# --- writing --------------------------------------------------------------------------------------


def save_lora(path: Path, state: Mapping[str, Tensor], scale: float) -> None:
    """Write the factors of a LoRA in the format of diffusers, which reads it through peft."""
    renamed = rename(state, DIFFUSERS, path)
    rank = next(len(factor) for name, factor in state.items() if name.endswith("lora_A.weight"))
    linears = {re.sub(r"^\w+\.\d+\.|\.lora_[AB]\.weight$", "", key) for key in renamed}
    settings = {"r": rank, "lora_alpha": scale * rank, "target_modules": sorted(linears)}
    settings = {_PREFIX + key: value for key, value in settings.items()}
    tensors = {_PREFIX + key: value for key, value in renamed.items()}
    weights.write_safetensors(path, tensors, {_SETTINGS: json.dumps(settings)})


def save_for_comfyui(path: Path, changes: Mapping[str, Change]) -> None:
    """Write a LoRA for ComfyUI and diffusion-pipe, with each scale multiplied into its factor B.

    They name the linears as the released weights do. ComfyUI takes a scale of 1 if there is no
    alpha, and diffusion-pipe refuses a file with one.
    """
    factors = {}
    for linear, change in changes.items():
        factors[f"{linear}.lora_A.weight"] = change.a
        factors[f"{linear}.lora_B.weight"] = change.b * change.scale
    renamed = rename(factors, RELEASED, path)
    tensors = {f"diffusion_model.{key.removeprefix('net.')}": t for key, t in renamed.items()}
    weights.write_safetensors(path, tensors, {"format": "pt"})


# --- reading --------------------------------------------------------------------------------------


def load_lora(path: Path) -> dict[str, Change]:
    """Load the changes of a LoRA file by our names of the linears, as net.blocks.0.self_attn.q.

    Raises:
        UserError: (ASSET) the file is missing, damaged or empty, belongs to another model or
            method, or its scale is ambiguous. The error names file and key.
    """
    stored = _tensors(path)
    if not stored:
        raise _refused(path, "holds no tensors")
    _refuse_other_methods(path, stored)
    require_finite(stored, path, fix="train or export the LoRA again")
    parts = _sorted_by_linear(path, stored)
    settings, source = _settings(path)
    changes = {}
    for linear, found in parts.items():
        a, b, key = _pair(path, found)
        # The patterns of settings match the name with or without the prefixes of wrappers.
        plain = key.removeprefix("base_model.model.")
        names = (plain, _PREFIXES.sub("", plain))
        try:
            scale = settings.scale(names, len(a)) if settings else 1.0
        except ValueError as error:
            raise _refused(source, f"gives {error}") from error
        if "alpha" in found:
            own = float(found["alpha"][1]) / len(a)
            # Nothing tells which of the two scales the factors were trained with.
            if settings and not math.isclose(own, scale, rel_tol=1e-3):
                where = f"its .alpha tensor, {scale:g} in {source.name}"
                raise _refused(path, f"gives {key} the scale {own:g} in {where}")
            scale = own
        changes[linear] = Change(a, b, scale, key)
    return changes


def unread_settings(path: Path) -> str:
    """Return a warning about the settings of a LoRA file that `load_lora` does not know, or ""."""
    settings, source = _settings(path)
    others = (settings.model_extra if settings else None) or {}
    known = {*_UNSUPPORTED, *_WITHOUT_EFFECT}
    unread = sorted(key for key, value in others.items() if value and key not in known)
    names = ", ".join(unread)[:200]
    return f"{source}: unknown settings are not read: {names}" if unread else ""


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file in fp32."""
    if path.suffix.lower() in _PICKLES:
        stored = weights.load_tensors(path)
    else:
        archives.check_safetensors(path)
        with weights.reading(path):
            stored = load_file(path)
    for key, value in stored.items():
        # kohya's scripts may write an alpha as an integer.
        if not (value.is_floating_point() or key.endswith(".alpha")) or value.is_complex():
            raise _refused(path, f"holds {value.dtype} in {key}, not floating-point numbers")
    return {key: value.float() for key, value in stored.items()}


def _refuse_other_methods(path: Path, stored: Mapping[str, Tensor]) -> None:
    for mark, method in _METHODS.items():
        if found := [key for key in stored if mark in key]:
            what = f"is {method}, which is not supported ({len(found)} tensors as {found[0]})"
            raise _refused(path, what)


def _settings(path: Path) -> tuple[LoraSettings | None, Path]:
    """Return the settings of a LoRA file, None if it has none, and the file that states them.

    Raises:
        UserError: they are damaged or belong to a method other than plain LoRA.
    """
    source, config = path, path.with_name(_SETTINGS_FILE)
    content = {} if path.suffix.lower() in _PICKLES else _header(path)
    if not content and config.is_file():
        source, content = config, files.read_json(config)
    elif not content:
        return None, path
    try:
        settings = LoraSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "its content"
        raise _refused(source, f"is damaged: {name}: {first['msg']}") from error
    others = settings.model_extra or {}
    kind = settings.peft_type or "LORA"
    wrong = [f"{name}: {others[name]}" for name in _UNSUPPORTED if others.get(name)]
    if kind.upper() != "LORA":
        wrong.append(f"peft_type: {kind}")
    if settings.bias not in (None, "none"):
        wrong.append(f"bias: {settings.bias}")
    if str(settings.init_lora_weights).lower().startswith(_OTHER_BASE):
        wrong.append(f"init_lora_weights: {settings.init_lora_weights}, which changes the base")
    if wrong:
        raise _refused(source, f"says {', '.join(wrong)}, which is not supported"[:300])
    return settings, source


def _header(path: Path) -> dict[str, Any]:
    """Return the settings in the header of a safetensors file, {} if it has none."""
    archives.check_safetensors(path)
    with weights.reading(path), safe_open(path, framework="pt") as stream:
        header = json.loads((stream.metadata() or {}).get(_SETTINGS, "{}"))
        # A diffusers header may also hold settings of other networks, with a dot in the name.
        plain = {key.removeprefix(_PREFIX): value for key, value in header.items()}
        return {key: value for key, value in plain.items() if "." not in key}


Part = tuple[str, Tensor]


def _sorted_by_linear(path: Path, stored: Mapping[str, Tensor]) -> dict[str, dict[str, Part]]:
    """Return the tensors "A", "B" and "alpha" of each linear, by our name, with their keys."""
    found: dict[str, dict[str, Part]] = {}
    unknown = []
    for key, tensor in stored.items():
        match = _PART.fullmatch(key)
        linear = _our_name(match["linear"]) if match else None
        if match is None or linear is None:
            unknown.append(key)
            continue
        other = {"down": "A", "up": "B", None: "alpha"}[match["other"]]
        parts, part = found.setdefault(linear, {}), match["side"] or other
        if part in parts:
            raise _refused(path, f"has {part} of one linear twice: {parts[part][0]} and {key}")
        parts[part] = key, tensor
    if unknown:
        raise another_model([some(unknown, "unknown")], path)
    return found


def _pair(path: Path, parts: Mapping[str, Part]) -> tuple[Tensor, Tensor, str]:
    """Return the factors A and B of a linear and the linear's name in the file.

    Raises:
        UserError: a factor is missing, or their shapes do not match.
    """
    keys = [key for key, _ in parts.values()]
    if not {"A", "B"} <= parts.keys():
        missing = "A" if "A" not in parts else "B"
        raise another_model([f"no pair of factors, {missing} is missing for {keys[0]}"], path)
    (key_a, a), (key_b, b) = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        shapes = f"{key_a} is {tuple(a.shape)} and {key_b} is {tuple(b.shape)}"
        raise another_model([f"no pair of factors: {shapes}"], path)
    if "alpha" in parts and parts["alpha"][1].numel() != 1:
        raise another_model([f"{parts['alpha'][0]} is not one number"], path)
    match = _PART.fullmatch(key_a)
    assert match
    return a, b, match["linear"]


def _our_name(linear: str) -> str | None:
    """Return our name of a linear in any known form, or None if the network has no such linear."""
    dotted, underscored = _linears()
    number = r"(blocks[._](?:block)?)(\d+)"
    is_underscored = _UNDERSCORED.match(linear)
    plain = _UNDERSCORED.sub("", linear) if is_underscored else _PREFIXES.sub("", linear)
    block = re.search(number, plain)
    general = re.sub(number, r"\1#", plain, count=1)
    found = (underscored if is_underscored else dotted).get(general)
    return found.replace("#", block[2] if block else "") if found else None


@cache
def _linears() -> tuple[dict[str, str], dict[str, str]]:
    """Map all other names of the linears to ours: a table of dotted ones, one with underscores.

    "#" stands for the number of the block.
    """
    tables = [tensor_names.name_table(column, OURS) for column in COLUMNS]
    dotted = {
        _PREFIXES.sub("", theirs): ours
        for table in tables
        for theirs, ours in table.items()
        if not re.search(r"norm$|^logvar|pos_embedder", ours)
    }
    underscored: dict[str, str] = {}
    for theirs, ours in dotted.items():
        # An underscored form that two linears share is ambiguous, so it stands for neither.
        form = theirs.replace(".", "_")
        underscored[form] = ours if underscored.get(form, ours) == ours else ""
    return dotted, underscored


def _refused(path: Path, what: str) -> UserError:
    fix = "give a plain LoRA of this model, as peft, diffusers or cosmos train write it"
    return asset_error(path, what, fix)
