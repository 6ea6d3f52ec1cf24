import os
import pickle

import numpy as np
import pytest
import torch

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.prep import embedding_files
from cosmos_cli.spec import TextSpec

SPEC = TextSpec("test", channels=8, tokens=16)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickle_is_the_reference_format_and_reads_back(tmp_path):
    embedding = torch.randn(5, 8).half()
    embedding_files.write_embedding(tmp_path / "a.pickle", embedding)
    value = pickle.loads((tmp_path / "a.pickle").read_bytes())
    assert isinstance(value, list)
    assert [(a.dtype, a.shape) for a in value] == [(np.dtype("float16"), (5, 8))]
    assert torch.equal(embedding_files.read_embedding(tmp_path / "a.pickle", SPEC), embedding)


def test_pickle_of_every_protocol_reads_back(tmp_path):
    array = np.arange(24, dtype=np.float16).reshape(3, 8)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "p").write_bytes(pickle.dumps([array], protocol=protocol))
        assert np.array_equal(embedding_files.read_embedding(tmp_path / "p", SPEC).numpy(), array)


def test_hostile_pickle_is_refused_and_never_runs(tmp_path):
    trap = tmp_path / "executed"
    (tmp_path / "p").write_bytes(pickle.dumps([Bomb(trap)]))
    with pytest.raises(UserError, match="mkdir") as caught:
        embedding_files.read_embedding(tmp_path / "p", SPEC)
    assert caught.value.code == ExitCode.ASSET
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps("text"),
        pickle.dumps([]),
        pickle.dumps([np.zeros((3, 7), np.float16)]),
        pickle.dumps([np.zeros((17, 8), np.float16)]),
        pickle.dumps([np.zeros((3, 8), np.int64)]),
        pickle.dumps([np.zeros((3, 8), np.float16)])[:-9],
        pickle.dumps([np.zeros((0, 8), np.float16)]),
        pickle.dumps([np.full((3, 8), np.nan, np.float16)]),
        pickle.dumps([np.full((3, 8), -np.inf, np.float32)]),
        pickle.dumps([np.full((3, 8), 1e300)]),
    ],
)
def test_damaged_pickle_is_named(tmp_path, content):
    (tmp_path / "damaged.pickle").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.pickle") as caught:
        embedding_files.read_embedding(tmp_path / "damaged.pickle", SPEC)
    assert caught.value.code == ExitCode.ASSET


def test_padding_is_zero_behind_the_real_tokens():
    padded = embedding_files.pad(torch.ones(5, 8), SPEC)
    assert padded.shape == (16, 8)
    assert padded[:5].eq(1).all()
    assert padded[5:].eq(0).all()
