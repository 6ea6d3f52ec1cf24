"""LoRA files of other programs give the network output of the library that made them."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import lora, lora_files
from cosmos_cli.model.dit import DiT
from cosmos_cli.model.tensor_names import DIFFUSERS, RELEASED, rename
from tests.helpers.networks import SMALL, diffusers_twin, inputs, network, run_twin

ALL = ("to_q", "to_k", "to_v", "to_out.0", "proj", "linear_1", "linear_2", "net.2", "proj_out")
ATTENTION = r"transformer_blocks\.\d\.attn[12]\.to_(q|k|v|out\.0)"
CONFIGS = {
    "alpha 16 at rank 4": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8,
        "rank_pattern": {"to_q": 2, r"transformer_blocks\.1\.attn[12]\.to_k": 6},
        "alpha_pattern": {"attn2.to_v": 3, "transformer_blocks.0.ff.net.2": 20, ".*linear_2": 1},
    },
    "rslora with patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_v": 9},
        "alpha_pattern": {"to_v": 5},
    },
}  # fmt: skip


def randomize(module):
    """Random factors, so that no term is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)


def ours(*files, dtype=torch.float32):
    """The output of our network with LoRA files applied to it."""
    net = network().to(dtype)
    lora.apply_files(net, files)
    with torch.no_grad():
        return net(**inputs())


def theirs(twin):
    with torch.no_grad():
        return run_twin(twin, inputs())


def assert_equal_but_not_the_base(found, expected):
    with torch.no_grad():
        assert (expected - network()(**inputs())).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The following alpha_pattern", "ignore:The following rank")
@pytest.mark.parametrize(
    "targets", [list(ALL), ATTENTION, "all-linear"], ids=["all", "re", "every"]
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_peft_gives_the_output_of_peft(tmp_path, config, targets):
    twin = diffusers_twin(network(), tmp_path / "twin")
    model = peft.get_peft_model(twin, peft.LoraConfig(target_modules=targets, **config))
    randomize(model)
    model.save_pretrained(tmp_path / "peft")
    found = ours((tmp_path / "peft" / "adapter_model.safetensors", 1.0))
    assert_equal_but_not_the_base(found, theirs(model))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_file_of_diffusers_gives_the_output_of_diffusers(tmp_path, config):
    twin = diffusers_twin(network(), tmp_path / "twin")
    twin.add_adapter(peft.LoraConfig(target_modules=list(ALL), **config))
    randomize(twin)
    twin.save_lora_adapter(tmp_path / "lora")
    path = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    assert_equal_but_not_the_base(ours((path, 1.0)), theirs(twin))


def test_diffusers_reads_other_scales_as_we_do(tmp_path):
    """A pipeline's file: prefixed tensors and settings, read back by diffusers itself."""
    twin = diffusers_twin(network(), tmp_path / "twin")
    twin.add_adapter(peft.LoraConfig(target_modules=["to_q", "proj"], r=4, lora_alpha=12))
    randomize(twin)
    twin.save_lora_adapter(tmp_path / "plain")
    state = load_file(tmp_path / "plain" / "pytorch_lora_weights.safetensors")
    settings = {"transformer.r": 4, "transformer.lora_alpha": 12, "text_encoder.r": 7,
                "transformer.target_modules": ["to_q", "proj"]}  # fmt: skip
    path = tmp_path / "piped.safetensors"
    header = {"lora_adapter_metadata": json.dumps(settings)}
    save_file({f"transformer.{key}": value for key, value in state.items()}, path, header)
    other = diffusers_twin(network(), tmp_path / "twin")
    other.load_lora_adapter(tmp_path, weight_name=path.name)
    assert_equal_but_not_the_base(ours((path, 1.0)), theirs(other))


def test_the_file_for_comfyui_has_its_names_and_the_same_changes(tmp_path):
    """ComfyUI maps the released names behind diffusion_model.; a missing alpha is a scale of 1."""
    twin = diffusers_twin(network(), tmp_path / "twin")
    twin.add_adapter(peft.LoraConfig(target_modules=list(ALL), r=4, lora_alpha=6))
    randomize(twin)
    twin.save_lora_adapter(tmp_path / "lora")
    changes = lora_files.load_lora(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    path = tmp_path / "comfyui.safetensors"
    lora_files.save_for_comfyui(path, changes)
    names = {f"diffusion_model.{released(linear)}" for linear in changes}
    sides = ("lora_A.weight", "lora_B.weight")
    assert load_file(path).keys() == {f"{name}.{side}" for name in names for side in sides}
    assert "diffusion_model.blocks.block0.blocks.0.block.attn.to_q.0" in names
    again = lora_files.load_lora(path)
    assert {change.scale for change in changes.values()} == {1.5}
    assert {change.scale for change in again.values()} == {1.0}
    for linear, change in changes.items():
        torch.testing.assert_close(again[linear].b @ again[linear].a,
                                   change.scale * change.b @ change.a)  # fmt: skip


# --- files written by hand, in the names of each program ------------------------------------------


def released(stem):
    """The released name of one of ours, without net."""
    renamed = rename({f"{stem}.weight": torch.zeros(1)}, RELEASED, "")
    return next(iter(renamed)).removeprefix("net.").removesuffix(".weight")


def in_diffusers(stem):
    renamed = rename({f"{stem}.weight": torch.zeros(1)}, DIFFUSERS, "")
    return next(iter(renamed)).removesuffix(".weight")


FORMS = {
    "comfyui": lambda s: (f"diffusion_model.{released(s)}", "lora_A.weight", "lora_B.weight"),
    "comfyui down up": lambda s: (f"diffusion_model.{released(s)}", "lora_down.weight",
                                  "lora_up.weight"),
    "comfyui checkpoint": lambda s: (f"model.diffusion_model.{released(s)}", "lora_A.weight",
                                     "lora_B.weight"),
    "released": lambda s: (f"net.{released(s)}", "lora_A.weight", "lora_B.weight"),
    "peft of the released": lambda s: (f"base_model.model.net.{released(s)}",
                                       "lora_A.default.weight", "lora_B.default.weight"),
    "peft": lambda s: (f"base_model.model.{in_diffusers(s)}", "lora_A.weight", "lora_B.weight"),
    "diffusers": lambda s: (f"transformer.{in_diffusers(s)}", "lora_A.weight", "lora_B.weight"),
    "diffusers of old": lambda s: (f"transformer.{in_diffusers(s)}", "lora.down.weight",
                                   "lora.up.weight"),
    "kohya": lambda s: (f"lora_unet_{released(s).replace('.', '_')}", "lora_down.weight",
                        "lora_up.weight"),
    "kohya in diffusers' names": lambda s: (
        f"lora_transformer_{in_diffusers(s).replace('.', '_')}", "lora_down.weight",
        "lora_up.weight"),
}  # fmt: skip


def linears(net):
    return {f"net.{n}": m for n, m in net.named_modules() if isinstance(m, torch.nn.Linear)}


def factors(rank=3, seed=7):
    """Factors of every linear of the network, and an alpha that differs from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    return {
        stem: (
            0.1 * torch.randn(rank + i % 2, module.in_features, generator=generator),
            0.1 * torch.randn(module.out_features, rank + i % 2, generator=generator),
            1.0 + i % 5,
        )
        for i, (stem, module) in enumerate(linears(network()).items())
    }


def write(path, form, found, alphas):
    tensors = {}
    for stem, (a, b, alpha) in found.items():
        name, down, up = FORMS[form](stem)
        tensors |= {f"{name}.{down}": a, f"{name}.{up}": b}
        if alphas:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)


def merged(found, alphas):
    """The output with the change written into the weights."""
    net = network()
    for stem, (a, b, alpha) in found.items():
        scale = alpha / len(a) if alphas else 1.0
        net.get_submodule(stem.removeprefix("net.")).weight.data += scale * b @ a
    with torch.no_grad():
        return net(**inputs())


@pytest.mark.parametrize("alphas", [False, True], ids=["no alpha", "an alpha each"])
@pytest.mark.parametrize("form", FORMS)
def test_every_name_in_use_is_read_with_the_scale_of_each_linear(tmp_path, form, alphas):
    write(tmp_path / "lora.safetensors", form, factors(), alphas)
    assert_equal_but_not_the_base(
        ours((tmp_path / "lora.safetensors", 1.0)), merged(factors(), alphas)
    )


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt"])
def test_a_pickle_of_tensors_is_read_without_running_it(tmp_path, name):
    write(tmp_path / "lora.safetensors", "comfyui", factors(), alphas=True)
    torch.save(load_file(tmp_path / "lora.safetensors"), tmp_path / name)
    assert_equal_but_not_the_base(ours((tmp_path / name, 1.0)), merged(factors(), alphas=True))


def test_settings_beside_a_file_of_diffusion_pipe_scale_it(tmp_path):
    write(tmp_path / "adapter_model.safetensors", "comfyui", factors(), alphas=False)
    config = {
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 12,
        "rank_pattern": {released(s): 4 for s, f in factors().items() if len(f[0]) == 4},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scaled = {stem: (a, b, 12.0) for stem, (a, b, _) in factors().items()}
    found = ours((tmp_path / "adapter_model.safetensors", 1.0))
    assert_equal_but_not_the_base(found, merged(scaled, alphas=True))


def test_an_alpha_of_an_integer_is_read(tmp_path):
    path = tmp_path / "lora.safetensors"
    write(path, "kohya", factors(), alphas=True)
    state = load_file(path)
    save_file({k: v.long() if k.endswith(".alpha") else v for k, v in state.items()}, path)
    assert_equal_but_not_the_base(ours((path, 1.0)), merged(factors(), alphas=True))


def test_no_two_linears_have_one_name():
    dotted, underscored = lora_files._linears()
    with torch.device("meta"):
        wanted = {re.sub(r"blocks\.\d+", "blocks.#", name) for name in linears(DiT(SMALL))}
    assert set(dotted.values()) == set(underscored.values()) == wanted
    assert len(dotted) == 3 * len(wanted)


# --- what is refused ------------------------------------------------------------------------------


def refusal(path):
    with pytest.raises(UserError) as caught:
        ours((path, 1.0))
    assert caught.value.code == ExitCode.ASSET
    assert "\n" not in str(caught.value)
    return str(caught.value)


Q = "transformer.transformer_blocks.0.attn1.to_q"
TENSORS = {
    "DoRA": {f"{Q}.lora_magnitude_vector": torch.ones(64)},
    "DoRA of kohya": {f"{Q}.dora_scale": torch.ones(64)},
    "LoHa": {f"{Q}.hada_w1_a": torch.ones(64, 3)},
    "LoKr": {f"{Q}.lokr_w1": torch.ones(3, 3)},
    "biases": {f"{Q}.lora_B.bias": torch.ones(64)},
    "whole layers": {"base_model.model.proj_out.modules_to_save.weight": torch.ones(2, 2)},
    "unknown": {"lora_te_text_model_q.lora_down.weight": torch.ones(3, 64)},
    "unknown too": {"something": torch.ones(3)},
    "alpha alone": {"transformer.transformer_blocks.0.attn1.to_v.alpha": torch.tensor(1.0)},
    "twice": {"net.blocks.block0.blocks.0.block.attn.to_q.0.lora_A.weight": torch.ones(4, 64)},
    "not real": {f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.complex64)},
    "integers": {f"{Q}.lora_A.weight": torch.ones(4, 64, dtype=torch.int8)},
    "alpha of two": {f"{Q}.alpha": torch.ones(2)},
    "ranks differ": {f"{Q}.lora_A.weight": torch.ones(3, 64)},
    "other inputs": {f"{Q}.lora_A.weight": torch.ones(4, 32)},
    "not a matrix": {f"{Q}.lora_A.weight": torch.ones(4, 64, 1)},
    "no rank": {f"{Q}.lora_A.weight": torch.ones(0, 64), f"{Q}.lora_B.weight": torch.ones(64, 0)},
    "no such block": {
        "transformer.transformer_blocks.9.attn1.to_q.lora_A.weight": torch.ones(4, 64),
        "transformer.transformer_blocks.9.attn1.to_q.lora_B.weight": torch.ones(64, 4),
    },
    "a NaN": {f"{Q}.lora_B.weight": torch.full((64, 4), float("nan"))},
    "an infinity": {f"{Q}.alpha": torch.tensor(float("inf"))},
}  # fmt: skip
METHODS = {
    "DoRA": "is DoRA", "DoRA of kohya": "is DoRA", "LoHa": "is LoHa", "LoKr": "is LoKr",
    "biases": "is a LoRA with biases", "whole layers": "is a LoRA with whole layers",
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_not_of_a_plain_lora_is_refused_by_name(tmp_path, name):
    path = tmp_path / "lora.safetensors"
    good = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    save_file(good, path)
    ours((path, 1.0))
    save_file(good | TENSORS[name], path)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    stems = {key.partition(".lora_")[0].removesuffix(".alpha") for key in TENSORS[name]}
    assert any(stem in message for stem in stems)
    assert METHODS.get(name, "") in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias: lora_only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type: LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 8}, "rank 8"),
        ({"rank_pattern": {"to_q": 2}}, "rank 2"),
        ({"r": 0}, "r: "),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": {"to_q": float("inf")}}, "alpha inf"),
        ({"alpha_pattern": {"to_q(": 2}}, "pattern 'to_q('"),
        ({"alpha_pattern": {"((a+)+)+b": 2}}, "too complex"),
        ([], "its content"),
        ("{", "is damaged"),
    ],
)
def test_settings_that_are_damaged_or_of_another_method_are_refused(tmp_path, content, words):
    good = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    save_file(good, tmp_path / "adapter_model.safetensors")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "adapter_config.json").write_text(text)
    message = refusal(tmp_path / "adapter_model.safetensors")
    assert "adapter_config.json" in message
    assert words in message


def test_settings_and_alpha_that_disagree_are_refused(tmp_path):
    path = tmp_path / "lora.safetensors"
    write(path, "comfyui", {"net.blocks.0.mlp.up": factors()["net.blocks.0.mlp.up"]}, alphas=True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 100}))
    message = refusal(path)
    assert ".alpha" in message
    assert "blocks.block0.blocks.2.block.layer1" in message


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "empty.safetensors")


def test_settings_of_a_later_peft_are_named(tmp_path):
    good = {f"{Q}.lora_A.weight": torch.ones(4, 64), f"{Q}.lora_B.weight": torch.ones(64, 4)}
    save_file(good, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"use_new_trick": true, "lora_dropout": 0.1}')
    ((_, (remark,)),) = lora.apply_files(network(), [(tmp_path / "adapter_model.safetensors", 1.0)])
    assert "adapter_config.json: unknown settings are not read: use_new_trick" in remark
