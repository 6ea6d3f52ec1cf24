"""Hashes of large files are computed once."""

import os

import pytest

from cosmos_cli import hashes
from cosmos_cli.generate import hash_cache

LONG_AGO = 10**9


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A large file that seems to have changed long ago; its hash is not in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", -1e9)
    path = tmp_path / "model.pt"
    path.write_bytes(bytes(hash_cache.LEAST_BYTES))
    return path


def entries(tmp_path):
    return [path for path in tmp_path.glob("cache/cosmos/hashes/*") if path.is_file()]


def test_the_hash_of_an_unchanged_file_comes_from_the_cache(large, tmp_path):
    digest = hash_cache.cached_sha256(large)
    assert digest == hashes.sha256_file(large)
    (entry,) = entries(tmp_path)
    entry.write_text("f" * 64)
    assert hash_cache.cached_sha256(large) == "f" * 64
    entry.write_text("damaged")
    assert hash_cache.cached_sha256(large) == digest


def test_a_changed_file_is_hashed_again_even_with_its_old_mtime(large):
    os.utime(large, (LONG_AGO, LONG_AGO))
    first = hash_cache.cached_sha256(large)
    with large.open("r+b") as stream:
        stream.write(b"changed")
    os.utime(large, (LONG_AGO, LONG_AGO))
    assert hash_cache.cached_sha256(large) == hashes.sha256_file(large) != first


def test_a_file_that_has_just_changed_is_not_kept(large, tmp_path, monkeypatch):
    monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", 2.0)
    hash_cache.cached_sha256(large)
    assert not entries(tmp_path)


def test_small_files_and_a_read_only_cache_are_hashed_each_time(large, tmp_path, monkeypatch):
    small = tmp_path / "lora.safetensors"
    small.write_bytes(b"small")
    assert hash_cache.cached_sha256(small) == hashes.sha256_file(small)
    assert not entries(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    assert hash_cache.cached_sha256(large) == hashes.sha256_file(large)
