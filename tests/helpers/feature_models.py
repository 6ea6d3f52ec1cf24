"""Small random models of the classes that evaluate's scores read, in the folders of downloads."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    VJEPA2Config,
    VJEPA2Model,
)  # fmt: skip

DINO, SIGLIP, VJEPA = (
    "facebook/dinov2-base",
    "google/siglip-so400m-patch14-384",
    "facebook/vjepa2-vitl-fpc64-256",
)
WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIDES = {"height": 28, "width": 28}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PREPARATIONS = {
    DINO: {"size": {"shortest_edge": 32}, "crop_size": SIDES, "resample": 3, **IMAGENET},
    SIGLIP: {"size": SIDES, "resample": 3, **HALF},
    VJEPA: {"size": {"shortest_edge": 36}, "crop_size": 32, "resample": 2, **IMAGENET},
}
VOCABULARY = 64


def network(name):
    torch.manual_seed(0)
    if name == DINO:
        return Dinov2Model(Dinov2Config(**WIDTH, patch_size=7, image_size=28, mlp_ratio=2))
    if name == SIGLIP:
        text = {**WIDTH, "intermediate_size": 64, "vocab_size": VOCABULARY, "bos_token_id": 0}
        text["eos_token_id"] = 1
        vision = {**WIDTH, "intermediate_size": 64, "patch_size": 7, "image_size": 28}
        return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    return VJEPA2Model(
        VJEPA2Config(
            **WIDTH, crop_size=32, frames_per_clip=16, mlp_ratio=2, pred_hidden_size=32,
            pred_num_attention_heads=2, pred_num_hidden_layers=1, num_pooler_layers=1,
        )
    )  # fmt: skip


def tokenizer(folder):
    """Words of one token each, with the end that SigLIP's tokenizer adds, and its padding."""
    words = ["<unk>", "</s>", "a", "video", "of", "left", "red"]
    known = {word: i for i, word in enumerate(words)}
    own = Tokenizer(models.WordLevel(known, "<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


def write(root, *names):
    """Writes some of the models, or all, below a folder such as checkpoints; returns the folder."""
    for name in names or (DINO, SIGLIP, VJEPA):
        network(name).save_pretrained(root / name)
        text = json.dumps(PREPARATIONS[name])
        (root / name / "preprocessor_config.json").write_text(text)
        if name == SIGLIP:
            tokenizer(root / name)
    return root
