"""Rewrite a short prompt into a long one with a language model.

Cosmos-UpsamplePrompt1-12B-Text2World is a Mistral-Nemo with the tensor names of Mistral's own code.
Any chat model that transformers saved works too. Both decode greedily; the reference samples at
temperature 0.01, which is nearly the same.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `diffusion/prompt_upsampler`, `autoregressive`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_cli import paths
from cosmos_cli.download import assets
from cosmos_cli.errors import UserError, asset_error
from cosmos_cli.model import pretrained, weights
from cosmos_cli.model.finite import require_finite
from cosmos_cli.prep import captions

INSTRUCTION = "Upsample the short caption to a long caption: "
MAX_NEW_TOKENS = 512

# These cannot be read from the shapes of the released weights.
HEAD_WIDTH = 128
ROPE_BASE = 1e6
NORM_EPS = 1e-5

# Released tensor names -> names in transformers. "#" stands for the layer number.
_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers.#.attention.wq": "model.layers.#.self_attn.q_proj",
    "layers.#.attention.wk": "model.layers.#.self_attn.k_proj",
    "layers.#.attention.wv": "model.layers.#.self_attn.v_proj",
    "layers.#.attention.wo": "model.layers.#.self_attn.o_proj",
    "layers.#.feed_forward.w1": "model.layers.#.mlp.gate_proj",
    "layers.#.feed_forward.w2": "model.layers.#.mlp.down_proj",
    "layers.#.feed_forward.w3": "model.layers.#.mlp.up_proj",
    "layers.#.attention_norm": "model.layers.#.input_layernorm",
    "layers.#.ffn_norm": "model.layers.#.post_attention_layernorm",
    "norm": "model.norm",
    "output": "lm_head",
}


class Upsampler:
    """Upsample prompts with the language model and the tokenizer of a local folder."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = device
        released = folder / paths.MODEL_FILE
        assets.require_upsampler(folder)
        fix = assets.UPSAMPLER_FIX
        with pretrained.reading_pretrained(folder, "is not a complete prompt upsampler", fix):
            self.tokenizer = pretrained.load_pretrained(AutoTokenizer, folder)
            if released.is_file():
                model = load_released(released)
            else:
                model = pretrained.load_model(AutoModelForCausalLM, folder, dtype)
        if not self.tokenizer.chat_template:
            raise asset_error(folder, "has no chat template", "choose a chat model")
        self.model = model.to(device=device, dtype=dtype).eval()
        require_finite(self.model.state_dict(), released if released.is_file() else folder)

    @torch.inference_mode()
    def upsample(self, prompt: str) -> str:
        """Return the upsampled prompt, cleaned like a caption."""
        tokens = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": INSTRUCTION + prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.device)
        output = self.model.generate(
            **tokens,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        answer = output[0, tokens.input_ids.shape[1] :]
        return captions.clean(self.tokenizer.decode(answer, skip_special_tokens=True))


def load_released(path: Path) -> Any:
    """Load the released model as transformers' MistralForCausalLM, memory-mapped.

    Raises:
        UserError: the file is damaged or holds another model.
    """
    from transformers import MistralConfig, MistralForCausalLM

    state = to_transformers(weights.load_tensors(path), path)
    layers = sum(name.endswith("input_layernorm.weight") for name in state)
    try:
        vocabulary, width = state["model.embed_tokens.weight"].shape
        first = {part: state[f"model.layers.0.{part}_proj.weight"] for part in
                 ("self_attn.q", "self_attn.k", "mlp.up")}  # fmt: skip
    except KeyError as error:
        raise _another_model(path, f"has no {error}") from error
    config = MistralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(first["mlp.up"]),
        num_hidden_layers=layers,
        num_attention_heads=len(first["self_attn.q"]) // HEAD_WIDTH,
        num_key_value_heads=len(first["self_attn.k"]) // HEAD_WIDTH,
        head_dim=HEAD_WIDTH,
        rms_norm_eps=NORM_EPS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        sliding_window=None,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise _another_model(path, " ".join(str(error).split())[:200]) from error
    # The file has no rotary frequencies. Building the module on a real device computes them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def to_transformers(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return released tensors with the names and the row order of transformers.

    Raises:
        UserError: a name is not in the released model.
    """
    renamed = {}
    for key, tensor in state.items():
        name = key.removeprefix("model.").removesuffix(".weight")
        layer = re.search(r"\.(\d+)\.", name)
        number = layer[1] if layer else ""
        general = name.replace(f".{number}.", ".#.") if layer else name
        if general not in _NAMES:
            raise _another_model(path, f"has {key}")
        rotary = general.endswith((".wq", ".wk"))
        target = _NAMES[general].replace("#", number) + ".weight"
        renamed[target] = _regroup_rotary_rows(tensor) if rotary else tensor
    return renamed


def _regroup_rotary_rows(weight: Tensor) -> Tensor:
    """Reorder rows of a query or key weight from rotary pairs (2i, 2i + 1) to (i, i + K/2)."""
    heads = weight.view(-1, HEAD_WIDTH // 2, 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _another_model(path: Path, what: str) -> UserError:
    fix = "download it again, or set upsampler to a chat model that transformers saved"
    return asset_error(path, f"is not a prompt upsampler as released: {what}", fix)
