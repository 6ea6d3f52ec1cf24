"""Networks that are missing are named before the first one is loaded."""

from pathlib import Path

import pytest

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.generate import batch
from cosmos_cli.generate.jobs import Settings, Weights
from cosmos_cli.generate.requests import Request
from cosmos_cli.recipe import loading


def test_a_folder_without_an_upsampler_is_refused_by_a_dry_run(tmp_path):
    r = loading.load("tiny", [f"upsampler={tmp_path}"]).recipe
    with pytest.raises(UserError, match="there is no prompt upsampler") as caught:
        batch.require_other_networks(r)
    assert (caught.value.where, caught.value.code) == (str(tmp_path), ExitCode.ASSET)
    (tmp_path / "config.json").touch()
    batch.require_other_networks(r)


def test_a_missing_decoder_is_named_before_the_text_encoder_is_read(tmp_path):
    r = loading.load("lora", [f"checkpoints_dir={tmp_path}", "guardrails=off"]).recipe
    settings = Settings(r, Weights(Path("model.pt"), "0" * 64), tmp_path, overwrite=False)
    with pytest.raises(UserError) as caught:
        list(batch.batch([settings], [Request("A ball.")], 1))
    assert caught.value.where == str(r.model_files.tokenizer)
    with pytest.raises(UserError) as caught:
        list(batch.stream(settings))
    assert caught.value.where == str(r.model_files.tokenizer)
