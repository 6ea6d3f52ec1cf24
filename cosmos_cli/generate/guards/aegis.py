"""Ask Aegis, a language model, if a prompt is safe, and if not, which rule it breaks.

Aegis is LlamaGuard-7b with NVIDIA's LoRA, prompted as in the reference and decoded greedily. The
prompt includes the safety policy: `aegis_policy.txt` has the reference's categories in our own
words.

Source: nvidia-cosmos/cosmos-predict1 at 4ed35fa, `auxiliary/guardrail/aegis`; Ghosh et al. 2024,
AEGIS, arXiv 2404.05993.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from cosmos_cli import archives
from cosmos_cli.model import pretrained

MAX_NEW_TOKENS = 100
POLICY = Path(__file__).with_name("aegis_policy.txt").read_text(encoding="utf-8")
CATEGORIES = dict(re.findall(r"^O(\d+): (.+)\.$", POLICY, re.MULTILINE))
# The indentation is the reference's.
QUESTION = """\
[INST] Task: Check if there is unsafe content in 'User' messages in conversations according our \
safety policy with the below categories.

        <BEGIN UNSAFE CONTENT CATEGORIES>
        {policy}
        <END UNSAFE CONTENT CATEGORIES>

        <BEGIN CONVERSATION>

        User: {prompt}

<END CONVERSATION>

        Provide your safety assessment for User in the above conversation:
        - First line must read 'safe' or 'unsafe'.
        - If unsafe, a second line must include a comma-separated list of violated categories. \
[/INST]"""


class Aegis:
    """Judge prompts with the safety language model.

    `base` is a folder of meta-llama/LlamaGuard-7b, `adapter` one of
    nvidia/Aegis-AI-Content-Safety-LlamaGuard-Defensive-1.0.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """

    def __init__(self, base: Path, adapter: Path, device: str, dtype: torch.dtype) -> None:
        from peft import PeftModel
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.tokenizer = pretrained.load_pretrained(AutoTokenizer, base)
        llama = pretrained.load_model(LlamaForCausalLM, base, dtype)
        # Without these files, peft would ask the hub.
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (adapter / name).stat()
        archives.check_model_folder(adapter)
        # peft uses a deprecated transformers name, which warns.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            warnings.filterwarnings("error", message=".*missing adapter keys")
            try:
                model = PeftModel.from_pretrained(llama, adapter)
            except (RuntimeError, UserWarning) as error:
                raise ValueError(f"the LoRA does not fit the model: {error}") from error
        self.model = model.to(device=device, dtype=dtype).eval()
        self.longest = llama.config.max_position_embeddings - MAX_NEW_TOKENS

    @torch.inference_mode()
    def reason(self, prompt: str) -> str:
        """Return in a few words why the prompt is blocked, or "" if it is not.

        As in the reference, an answer that contains "unsafe" blocks. So does an unclear answer.
        """
        question = QUESTION.format(policy=POLICY, prompt=prompt)
        tokens = self.tokenizer(question, add_special_tokens=False, return_tensors="pt")
        length = tokens.input_ids.shape[1]
        if length > self.longest:
            return f"it is too long to be judged, by {length - self.longest} tokens"
        output = self.model.generate(
            input_ids=tokens.input_ids.to(self.model.device),
            attention_mask=tokens.attention_mask.to(self.model.device),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            pad_token_id=self.tokenizer.eos_token_id,
        )
        return block_reason(self.tokenizer.decode(output[0, length:], skip_special_tokens=True))


def block_reason(answer: str) -> str:
    """Return why an answer blocks a prompt, or "" if it says that the prompt is safe."""
    if "unsafe" in answer.lower():
        numbers = dict.fromkeys(re.findall(r"\bO(\d+)\b", answer))
        named = [CATEGORIES[number] for number in numbers if number in CATEGORIES]
        return ", ".join(named) or "it is unsafe"
    return "" if answer.lower().split()[:1] == ["safe"] else "it could not be judged"
