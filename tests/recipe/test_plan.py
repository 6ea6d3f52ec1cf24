"""The planner against shapes counted elsewhere, and what it says of machines that are not here."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cosmos_cli.errors import UserError
from cosmos_cli.model import edm
from cosmos_cli.model.dit import DiT
from cosmos_cli.recipe import advice, gpu_models, loading, plan
from cosmos_cli.spec import COSMOS_7B

FULL = loading.load("nemo_assets", ["height=704", "activation_checkpointing=all"]).recipe
FAST, H100 = map(gpu_models.find_gpu, ("H200", "H100-80GB"))


def changed(**changes):
    return FULL.model_copy(update=changes)


def test_forward_flops_match_pytorchs_flop_counter():
    r = FULL
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = DiT(COSMOS_7B.dit)
        x0 = torch.empty(1, *COSMOS_7B.latent_shape(r.num_frames, r.height, r.width))
        text_emb = torch.empty(1, COSMOS_7B.text.tokens, COSMOS_7B.text.channels)
        edm.denoise(net, x0, torch.ones(1), text_emb, torch.full((1,), 24.0), 0.5)
    assert sum(plan.forward_flops(r)) == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize(
    ("gpus", "ranks", "fits"),
    [
        ("8xH100-80GB", 8, True),
        ("2xNVIDIA H200", 2, True),
        ("1xH200", 1, False),
        ("8xNVIDIA A100-SXM4-40GB", 8, False),
        ("8xNVIDIA GeForce RTX 4090", 8, False),
    ],
)
def test_full_fine_tuning_states_take_20_bytes_a_weight(gpus, ranks, fits):
    count, gpu = gpu_models.parse_gpus(gpus)
    found = plan.plan(changed(global_batch_size=ranks), count, gpu)
    assert (count, found.fits) == (ranks, fits)
    # bf16 weights and gradients, fp32 master weights, moments and EMA: 20 bytes a weight, divided
    # by the ranks.
    states = ("weights", "optimizer", "gradients", "EMA")
    held = sum(found.memory_gb[part] for part in states)
    assert held == pytest.approx(20 * COSMOS_7B.dit.parameters / ranks / 1e9)


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("lora", 1), ("two_gpus", 2), ("four_gpus", 4), ("my_videos", 8), ("two_nodes", 16)],
)
def test_a_shipped_recipe_fits_the_machines_it_names(name, gpus):
    r = loading.load(name).recipe
    assert plan.plan(r, gpus, gpu_models.find_gpu("H100-80GB")).fits
    assert r.num_processes in ("auto", gpus)


def test_a_recipe_that_does_not_fit_is_refused_with_changes_that_fit():
    r = changed(micro_batch_size=4, activation_checkpointing="none")
    with pytest.raises(UserError) as caught:
        advice.check_memory(r, 8, gpu_models.find_gpu("H100-80GB"))
    assert caught.value.code == 7
    fix = "add `--set activation_checkpointing=all --set micro_batch_size=1`"
    assert caught.value.fix == fix
    fixed = r.model_copy(update={"activation_checkpointing": "all", "micro_batch_size": 1})
    assert advice.check_memory(fixed, 8, gpu_models.find_gpu("H100-80GB"))["fits"]


def test_times_scale_with_the_work():
    h100 = gpu_models.find_gpu("NVIDIA H100 80GB HBM3")
    one = plan.step_seconds(FULL, 8, h100)
    assert plan.step_seconds(changed(global_batch_size=32), 8, h100) == pytest.approx(4 * one)
    assert plan.step_seconds(changed(activation_checkpointing="none"), 8, h100) < 0.85 * one
    # Below the bf16 peak, and no worse than twice the time measured for the plain peer.
    peak = 3 * sum(plan.forward_flops(FULL)) / 989e12
    assert 2 * peak < one < 2 * 19.2


def test_two_sequence_parallel_ranks_halve_activations_and_time():
    alone, pair = (plan.plan(changed(sequence_parallel=n), 8, FAST) for n in (1, 2))
    exchanged = plan.EXCHANGED * 56_320 * 4096 * 2 / 1e9
    for part, size in alone.memory_gb.items():
        expected = (size + exchanged) / 2 if part == "activations" else size
        assert pair.memory_gb[part] == pytest.approx(expected)
    # Half as many clips at a time, each in half the time plus the time of the all-to-all.
    assert alone.step_seconds < pair.step_seconds < 1.25 * alone.step_seconds


def test_the_plan_of_a_clip_shared_by_four_is_close_to_what_was_measured():
    pairs = ["num_processes=4", "sequence_parallel=4", "global_batch_size=1", "height=704"]
    r = loading.load("nemo_assets", pairs).recipe
    assert plan.step_seconds(r, 4, gpu_models.find_gpu("H200")) == pytest.approx(4.12, rel=0.02)


def test_offloaded_state_takes_cpu_memory_instead_of_gpu_memory():
    none, *others = (
        plan.plan(changed(offload=value), 2, FAST)
        for value in ("none", "ema", "optimizer", "parameters")
    )
    assert none.host_gb == 0
    for less in others:
        held = sum(size for part, size in none.memory_gb.items() if part not in less.memory_gb)
        assert less.host_gb == pytest.approx(2 * held)
        assert none.total_gb - less.total_gb == pytest.approx(held)
        assert less.step_seconds > none.step_seconds


def test_one_h200_is_enough_with_the_ema_in_cpu_memory():
    with pytest.raises(UserError) as caught:
        advice.check_memory(changed(global_batch_size=1), 1, FAST)
    assert caught.value.fix == "add `--set num_processes=1 --set offload=ema`"


@pytest.mark.parametrize("words", ["", "8x", "8xGTX-1080", "0xH200", "0xH100", "x", "9" * 5000])
def test_unknown_gpus_are_refused(words):
    with pytest.raises(UserError, match="known GPUs"):
        gpu_models.parse_gpus(words)


@pytest.mark.parametrize(
    ("words", "count", "name"),
    [
        ("1xRTX4090-24GB", 1, "RTX-4090"),
        ("2 x 4090", 2, "RTX-4090"),
        ("l40s", 1, "L40S"),
        ("8XH100_80GB", 8, "H100-80GB"),
    ],
)
def test_a_gpu_may_be_written_as_people_write_it(words, count, name):
    found, gpu = gpu_models.parse_gpus(words)
    assert (found, gpu.name) == (count, name)


@pytest.mark.parametrize("words", ["8xH100", "8xA100"])
def test_an_ambiguous_gpu_is_asked_about_with_the_options_to_choose_from(words):
    with pytest.raises(UserError, match="which one") as caught:
        gpu_models.parse_gpus(words)
    options = re.findall(r"`--gpus (\S+)`", caught.value.fix)
    assert len(options) > 1
    assert all(gpu_models.parse_gpus(option)[0] == 8 for option in options)


@pytest.mark.parametrize(
    ("name", "gpus"),
    [("lora", "1xRTX-4090"), ("my_videos", "1xRTX-4090"), ("two_gpus", "2xRTX-4090")],
)
def test_only_changes_that_fit_are_proposed_each_with_its_cpu_memory(name, gpus):
    ranks, gpu = gpu_models.parse_gpus(gpus)
    r = loading.load(name).recipe
    ways = advice.remedies(r, ranks, gpu)
    assert ways
    for words, less in ways:
        changed = loading.load(name, words.split("--set ")[1:]).recipe
        assert plan.plan(changed, ranks, gpu) == less
        assert less.total_gb < 0.97 * gpu.memory_gb
    shown = advice.describe(r, ranks, gpu)
    assert shown.count("fits: ") == len(ways)
    assert shown.count("of CPU memory") == len(ways)


def test_a_plan_shows_the_decimals_that_decide_and_no_zeros():
    assert advice._apart(24.62, 24.58) == ("24.62 GB", "24.58 GB")
    tiny = advice.describe(loading.load("tiny").recipe, 1, None)
    assert " 0.0 GB" not in tiny
    assert "--gpus 1xH100-80GB" in tiny


def test_a_plan_names_one_figure_for_the_disk_of_the_run():
    r = changed(max_steps=1000, save_every_steps=100, keep_models=0)
    whole, fewer = (plan.disk(one, 0) for one in (r, r.model_copy(update={"keep_models": 2})))
    assert (whole.models, whole.states) == (10, 3)
    # The two newest, the best, and the one that is being written.
    assert (fewer.models, fewer.states) == (4, 3)
    # Steps 200, 400 and 401.
    assert plan.disk(changed(max_steps=401, save_every_steps=200), 199).models == 3
    # Only multiples of 500 are saved and kept. A resumed run replaces its own states.
    kept = changed(max_steps=1000, save_every_steps=100, keep_every_steps=250, keep_last=2)
    assert plan.disk(kept, 0).states == 2 + 1 + 2
    assert plan.disk(kept, 500, replaced=2).states == 1 + 1
    assert f"{whole.run_bytes / 1e9:.1f} GB" in advice.describe(r, 8, H100)


def test_the_command_plans_for_gpus_that_this_machine_lacks(cosmos):
    done = cosmos.json("train", "nemo_assets", "--gpus", "8xH100-80GB")
    assert done["fits"]
    assert done["gpu"] == "H100-80GB"
    refused = cosmos.json("train", "nemo_assets", "--gpus", "1xRTX-4090", code=7)
    assert not refused["fits"]
    assert json.dumps(refused["memory_gb"])
    assert "total" in cosmos("train", "tiny", "--plan").stdout


def test_most_keeps_linear_outputs_of_only_the_blocks_that_fit():
    attention, most = (changed(activation_checkpointing=m) for m in ("attention", "most"))
    for ranks in (2, 8):
        mlps, blocks = plan.blocks_kept(most, ranks, FAST)
        kept = mlps + blocks * (plan.LINEARS_KEPT - 1)
        one, other = (plan.plan(r, ranks, FAST) for r in (attention, most))
        activation = other.memory_gb["activations"] - one.memory_gb["activations"]
        assert activation == pytest.approx(kept * 56_320 * 4096 * 2 / 1e9)
        assert other.fits
        assert (other.step_seconds < one.step_seconds) is (kept > 0)
    # Eight ranks have more free memory each than two.
    assert plan.blocks_kept(most, 2, FAST) < plan.blocks_kept(most, 8, FAST) < (28, 28)
    assert plan.blocks_kept(most, 1, None) == (28, 28)
    # Nothing is kept, and nothing is negative, where the weights alone do not fit.
    small = gpu_models.find_gpu("RTX-4080")
    assert plan.blocks_kept(most, 1, small) == (0, 0)
    assert not plan.plan(most, 1, small).fits
    # With a LoRA, the MLP's output is kept only together with all other linear outputs.
    mlps, blocks = plan.blocks_kept(most.model_copy(update={"lora_rank": 16}), 1, H100)
    assert 0 < mlps == blocks < 28
    assert plan.blocks_kept(most.model_copy(update={"transformer_engine": "linears"}), 8, FAST) == (
        0,
        0,
    )


def test_hpz_adds_a_share_of_the_weights_only_across_nodes():
    whole = 2 * FULL.spec.dit.parameters / 1e9
    for ranks, share in ((8, 0), (16, 1 / 8)):
        one, two = (
            plan.plan(changed(hpz_partition_size=size), ranks, FAST).total_gb
            for size in (1, "auto")
        )
        assert two - one == pytest.approx(share * whole)


def test_traffic_is_3_times_the_weights_and_2_times_across_nodes():
    gb = 2 * FULL.spec.dit.parameters / 1e9
    assert plan.traffic_seconds(FULL, 1, H100) == 0
    eight, sixteen = (plan.traffic_seconds(FULL, ranks, H100) for ranks in (8, 16))
    assert eight == pytest.approx(3 * gb * 7 / 8 / H100.link_rate)
    between = 2 / plan.NODE_RATE + 1 / H100.link_rate
    assert sixteen == pytest.approx(gb * 15 / 16 * between)
    one_copy = changed(hpz_partition_size=1)
    assert plan.traffic_seconds(one_copy, 16, H100) == pytest.approx(
        3 * gb * 15 / 16 / plan.NODE_RATE
    )
    adapter = changed(lora_rank=16)
    assert plan.traffic_seconds(adapter, 8, H100) < 0.7 * eight


def test_a_batch_that_the_processes_cannot_divide_is_refused(cosmos):
    refused = cosmos.json("train", "nemo_assets", "--gpus", "64xH100-80GB", code=2)
    assert "8 clips do not divide" in refused["error"]
    odd = ("train", "hdvila", "--plan", "--gpus", "3xH200")
    fix = cosmos.json(*odd, code=2)["error"]
    assert "`--set global_batch_size=9 --set num_processes=3`" in fix
    cosmos.json(*odd, "--set", "global_batch_size=9", "--set", "num_processes=3")
    pairs = ("train", "two_gpus", "--plan", "--set", "num_processes=1")
    assert "`--set sequence_parallel=1`" in cosmos.json(*pairs, code=2)["error"]
    streamed = ("train", "lora_24gb", "--plan", "--gpus", "2xRTX-4090", "--set", "num_processes=1")
    assert "`--gpus 1xRTX-4090`" in cosmos.json(*streamed, code=2)["error"]
    wide = ["--set", "global_batch_size=64"]
    cosmos.json("train", "nemo_assets", "--gpus", "64xH100-80GB", *wide)
