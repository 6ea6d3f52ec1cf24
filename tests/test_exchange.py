"""A folder takes the place of another: in one step, in renames, after a kill, next to others."""

import fcntl
import time
from pathlib import Path

import pytest

from cosmos_cli import exchange
from cosmos_cli.errors import UserError

NAME = "Cosmos-Tiny-Text2World_post-trained"


@pytest.fixture
def place(tmp_path):
    """The place of a model, with the folder of an old one in it."""
    fill(tmp_path / NAME, "old")
    return tmp_path / NAME


def fill(folder, words):
    folder.mkdir()
    (folder / "model.pt").write_text(words)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def words(folder):
    return (folder / "model.pt").read_text()


@pytest.mark.parametrize("how", [exchange.exchange, exchange.exchange_by_renames])
def test_two_folders_are_exchanged(place, how):
    fill(place.with_name("new"), "new")
    how(place.with_name("new"), place)
    assert (words(place), words(place.with_name("new"))) == ("new", "old")
    assert listing(place.parent) == [NAME, "new"]


def test_a_disk_error_does_not_count_as_missing_support(place):
    with pytest.raises(FileNotFoundError):
        exchange.exchange_at_once(place.with_name("nothing"), place)


def replace(place):
    with exchange.alone(place), exchange.replacing(place) as building:
        (building / "model.pt").write_text("new")


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_after_any_rename_leaves_a_whole_model(place, renames):
    """The states that `exchange_by_renames` passes through, made by the same renames."""
    building, old = (place.with_name(f".{NAME}.{what}") for what in ("building", "old"))
    fill(building, "new")
    for source, target in [(place, old), (building, place), (old, building)][:renames]:
        source.rename(target)
    exchange.restore(place)
    assert words(place) == ("old" if renames < 2 else "new")
    replace(place)
    assert words(place) == "new"
    assert listing(place.parent) == [NAME]


def test_a_failure_leaves_the_old_folder_and_nothing_else(place):
    with (
        pytest.raises(KeyboardInterrupt),
        exchange.alone(place),
        exchange.replacing(place) as building,
    ):
        (building / "model.pt").write_text("half")
        raise KeyboardInterrupt
    assert words(place) == "old"
    assert listing(place.parent) == [NAME]


def test_a_signal_between_two_renames_restores_the_old_folder(place):
    with pytest.raises(KeyboardInterrupt), exchange.alone(place), exchange.replacing(place):
        place.rename(place.with_name(f".{NAME}.old"))
        raise KeyboardInterrupt
    assert words(place) == "old"
    assert listing(place.parent) == [NAME]


def test_a_link_with_the_name_of_the_unfinished_folder_is_not_followed(place, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    fill(other / "kept", "kept")
    place.with_name(f".{NAME}.building").symlink_to(other / "kept")
    replace(place)
    assert (words(place), words(other / "kept")) == ("new", "kept")


def test_a_link_stays_and_its_target_is_replaced(place, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    place.rename(disk / "model")
    place.symlink_to(disk / "model")
    replace(place)
    assert place.is_symlink()
    assert words(disk / "model") == "new"
    assert listing(disk) == ["model"]
    (disk / "model").rename(disk / ".model.old")
    exchange.restore(place)
    assert words(place) == "new"


def test_a_partly_deleted_old_folder_is_not_restored(place):
    old = place.with_name(f".{NAME}.old")
    place.rename(old)
    (old / "model.pt").rename(old / "README.md")
    exchange.restore(place)
    assert not place.exists()


def test_the_lock_refuses_only_a_second_writer_of_the_same_folder(place):
    with exchange.alone(place):
        with pytest.raises(UserError, match="another cosmos promote") as refused:
            replace(place)
        assert refused.value.code == 2
        replace(place.with_name(f"{NAME}_other"))
    replace(place)
    assert listing(place.parent) == [NAME, f"{NAME}_other"]


def test_a_lock_file_left_by_a_kill_does_not_lock(place):
    place.with_name(f".{NAME}.lock").touch()
    replace(place)
    assert listing(place.parent) == [NAME]


def test_a_lock_on_a_deleted_file_does_not_count(place):
    """As when the holder deletes the file after another process has opened it."""
    path = place.with_name(f".{NAME}.lock")
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        path.unlink()
        replace(place)
    assert words(place) == "new"


def test_a_reader_waits_while_a_promotion_moves_the_folders(place):
    with exchange.alone(place):
        place.rename(place.with_name(f".{NAME}.old"))
        started = time.monotonic()
        with pytest.raises(UserError, match="was stopped left the model") as refused:
            exchange.restore(place)
        assert time.monotonic() - started < 30
    assert f"mv '{place.parent}/.{NAME}.old' '{place}'" in str(refused.value)
    assert refused.value.code == 4


def test_a_mount_point_is_refused_by_name():
    with pytest.raises(UserError, match="mount point"), exchange.replacing(Path("/proc")):
        pass
