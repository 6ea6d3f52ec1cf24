"""What a training asks for before it starts."""

import re

import pytest
import torch
from safetensors.torch import save_file

from cosmos_cli import console, files
from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.paths import Run
from cosmos_cli.recipe import loading, plan
from cosmos_cli.train import preflight


def test_a_full_disk_names_the_plans_figure_the_key_and_a_setting_that_fits(tmp_path):
    r = loading.load("tiny", [f"output_root={tmp_path}", "min_free_disk_gb=1e9"]).recipe
    with pytest.raises(UserError) as caught:
        preflight.check_disk(r, Run(r.run_dir), 0)
    assert f"needs {console.size(plan.disk(r, 0).run_bytes)}," in caught.value.what
    assert "min_free_disk_gb keeps 1e+09 GB" in caught.value.what
    setting = re.search(r"`--set (min_free_disk_gb=\S+)`", caught.value.fix)[1]
    fitting = loading.load("tiny", [f"output_root={tmp_path}", setting]).recipe
    preflight.check_disk(fitting, Run(r.run_dir), 0)


def test_what_a_killed_run_left_of_a_save_counts_as_free(tmp_path):
    more = files.free_bytes(tmp_path) / 1e9 + 1000
    r = loading.load("tiny", [f"output_root={tmp_path}", f"min_free_disk_gb={more:.0f}"]).recipe
    run = Run(r.run_dir)
    left = run.checkpoints / ".iter_000000002.tmp" / "zero" / "state.pt"
    left.parent.mkdir(parents=True)
    with left.open("wb") as stream:
        # A sparse file.
        stream.truncate(2 * 10**12)
    preflight.check_disk(r, run, 0)
    left.unlink()
    with pytest.raises(UserError, match="are free"):
        preflight.check_disk(r, run, 0)


def test_fewer_files_are_proposed_only_if_they_fit(tmp_path):
    free = files.free_bytes(tmp_path)
    steps = free // 40_000_000 * 100
    many = [f"output_root={tmp_path}", f"max_steps={steps}", "save_every_steps=1", "lora_rank=0"]
    r = loading.load("tiny", many).recipe
    with pytest.raises(UserError, match=r"--set keep_models=1 --set keep_last=1"):
        preflight.check_disk(r, Run(r.run_dir), 0)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_base_that_is_cut_short_is_named_before_ranks_start(tmp_path, suffix, share):
    base = tmp_path / f"base{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({"net.weight": torch.zeros(100, 100)}, base)
    r = loading.load("tiny", [f"base={base}"]).recipe
    preflight.check_recipe(r, 1)
    base.write_bytes(base.read_bytes()[: int(share * base.stat().st_size)])
    with pytest.raises(UserError, match="is damaged") as caught:
        preflight.check_recipe(r, 1)
    assert (caught.value.where, caught.value.code) == (str(base), ExitCode.ASSET)
