import gc
import shutil

import pytest

from cosmos_cli.model import mp4

pytest.register_assert_rewrite("tests.helpers")

from tests.helpers.command import Cosmos, settings  # noqa: E402 - rewritten for its asserts
from tests.helpers.stand_ins import moving_square  # noqa: E402


def pytest_collection():
    """Turn the garbage collector off while pytest collects the tests: it took half of that time."""
    gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items):
    """Start the long files first, so that short ones fill the gaps at the end."""
    items.sort(key=lambda item: item.get_closest_marker("workflow") is None)


@pytest.fixture
def cosmos(tmp_path, tmp_path_factory):
    """With a cache that tests share: what one had encoded, another need not."""
    return Cosmos(tmp_path, tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def prepared(prepared_once, tmp_path_factory):
    """A folder in which prep has run on four small captioned clips of different sizes."""
    root = tmp_path_factory.mktemp("prepared") / "work"
    shutil.copytree(prepared_once, root)
    return root


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory):
    """The one that each module copies: two modules may give their runs the same name."""
    root = tmp_path_factory.mktemp("prepared")
    folder = root / "datasets" / "tiny"
    (folder / "videos").mkdir(parents=True)
    (folder / "metas").mkdir()
    for i, (height, width, fps) in enumerate(
        [(64, 96, 12), (96, 160, 24), (128, 96, 30), (80, 80, 12)]
    ):
        clip = moving_square(9 * fps // 12 + 4, height, width)
        mp4.write_mp4(folder / "videos" / f"clip{i}.mp4", clip, fps, 18)
        (folder / "metas" / f"clip{i}.txt").write_text(f"A square moves right, take {i}.\n")
    Cosmos(root)("prep", "tiny", *settings())
    return root
