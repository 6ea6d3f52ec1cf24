import pytest

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.model import streaming
from cosmos_cli.recipe import advice, gpu_models, loading, plan, residence
from cosmos_cli.spec import COSMOS_7B
from cosmos_cli.train import preflight

DIT = COSMOS_7B.dit
BLOCK = DIT.block_parameters * 2
GB = 1e9


@pytest.mark.parametrize("room", [28 * BLOCK, 27.9 * BLOCK, 20 * BLOCK, 5.5 * BLOCK, 2 * BLOCK])
def test_as_many_blocks_stay_as_fit_next_to_the_two_buffers(room):
    count = residence.streamed(DIT, 2, room)
    assert residence.block_weights(DIT, 2, count) <= room
    assert count % 2 == 0
    # Two more resident blocks would not fit.
    assert count == 0 or residence.block_weights(DIT, 2, count - 2) > room or count == 2


def test_the_plan_counts_the_buffers_that_there_are():
    assert residence.BUFFERS == streaming.BUFFERS


def test_without_room_for_the_buffers_every_block_is_streamed():
    assert residence.streamed(DIT, 2, BLOCK) == DIT.blocks
    assert residence.block_weights(DIT, 2, DIT.blocks) > BLOCK


def test_streamed_blocks_are_spread_over_the_network():
    assert residence.Residence(4).streamed_blocks(28) == [0, 7, 14, 21]
    assert residence.Residence(28).streamed_blocks(28) == list(range(28))
    assert residence.Residence().streamed_blocks(28) == []


def streamed_plan(gib, *pairs):
    r = loading.load("lora_24gb_full_size", pairs).recipe
    gpu = gpu_models.GpuModel("card", gib * 2**30 / GB, 165, 940, 20)
    return plan.plan(r, 1, gpu), plan.streamed_parts(r, gpu)


SMALL = ("num_frames=33", "height=352", "width=640")


# Measured on an H200 whose memory was limited, with batches of one clip.
@pytest.mark.parametrize(
    ("gib", "pairs", "gpu_gb", "cpu_gb"),
    [
        (22, ("activation_checkpointing=attention",), 22.86, 44.7),
        (22, ("activation_checkpointing=all",), 23.12, 28.8),
        (14.5, (*SMALL, "activation_checkpointing=attention"), 13.66, 9.8),
    ],
)
def test_the_plan_of_streaming_is_close_to_what_was_measured(gib, pairs, gpu_gb, cpu_gb):
    found, _ = streamed_plan(gib, *pairs)
    assert found.fits
    assert found.cpu_gb == pytest.approx(cpu_gb, rel=0.1)
    assert found.total_gb == pytest.approx(gpu_gb, rel=0.1)


def test_a_card_that_holds_everything_streams_nothing():
    found, parts = streamed_plan(80)
    assert parts == residence.Residence()
    assert found.host_gb == 0


def test_a_slower_link_takes_longer_once_copies_are_not_hidden():
    r = loading.load("lora_24gb").recipe
    seconds = [
        plan.step_seconds(r, 1, gpu_models.GpuModel("card", 8.0, 989, 3000, 20, pcie))
        for pcie in (3, 4, 5)
    ]
    assert seconds[0] > 1.5 * seconds[1] > seconds[2]
    full = loading.load("lora_24gb_full_size").recipe
    for pcie in (3, 5):
        gpu = gpu_models.GpuModel("card", 25.4, 165, 940, 20, pcie)
        assert plan.step_seconds(full, 1, gpu) == pytest.approx(92, rel=0.05)


@pytest.mark.parametrize(
    ("pair", "fix"),
    [
        ("lora_rank=0", "--set lora_rank=16"),
        ("activation_checkpointing=none", "--set activation_checkpointing=attention"),
        ("activation_checkpointing=most", "--set activation_checkpointing=attention"),
        ("zero_stage=3", "--set zero_stage=1"),
        ("num_processes=2", "--set num_processes=1"),
    ],
)
def test_streaming_names_the_key_that_it_cannot_work_with(pair, fix):
    with pytest.raises(UserError) as caught:
        loading.load("lora_24gb", [pair])
    assert caught.value.code == ExitCode.USAGE
    assert "offload weights" in str(caught.value)
    assert fix in str(caught.value)


def test_streaming_refuses_several_processes_that_auto_would_start():
    r = loading.load("lora_24gb", ["num_processes=auto"]).recipe
    with pytest.raises(UserError, match="found 2 processes; use `--set num_processes=1`"):
        preflight.check_world(r, 2)


def test_cpu_memory_that_is_not_there_is_refused_before_anything_starts():
    r = loading.load("my_videos", ["offload=optimizer", "num_frames=9"]).recipe
    with pytest.raises(UserError, match=r"offload optimizer needs .* GB of CPU memory") as caught:
        preflight.check_cpu_memory(r, 8000)
    assert caught.value.code == ExitCode.ASSET


def test_a_card_that_is_too_small_for_streaming_gets_the_next_smaller_clip():
    r = loading.load("lora_24gb_full_size").recipe
    advice.require_fit(r, gpu_models.GpuModel("card", 25.4, 1, 1, 1))
    with pytest.raises(UserError) as caught:
        advice.require_fit(r, gpu_models.GpuModel("card", 12.0, 1, 1, 1))
    assert caught.value.code == ExitCode.GPU_MEMORY
    assert "12.0 GB are free; add `--set num_frames=57`" in str(caught.value)
