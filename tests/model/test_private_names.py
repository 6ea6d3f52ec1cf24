"""Every private name of another package is in the list, exists, and has a test."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cosmos_cli
from cosmos_cli.model import device
from cosmos_cli.model.private_names import NAMES

PACKAGE = Path(cosmos_cli.__file__).parent
TESTS = Path(__file__).parents[1]
# Underscored names that Python documents.
PUBLIC = {"_replace", "_asdict", "_exit", "_fields"}


def resolve(dotted):
    """The object of a dotted name, whose first parts are modules."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[: i + 1]))
        found = getattr(found, part)
    return found


def source(module):
    """The text of a module, which is not imported: some of them need a GPU or print."""
    first, *rest = module.split(".")
    place = Path(importlib.util.find_spec(first).origin).parent.joinpath(*rest)
    return (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()


ALL = [name for names, *_ in NAMES for name in names]


@pytest.mark.parametrize("name", ALL)
def test_a_private_name_still_exists(name):
    package = name.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    module, _, word = name.partition(":")
    if word:
        assert word in source(module)
    else:
        resolve(module)


def test_each_row_names_what_its_modules_use_and_a_test():
    claims = "\n".join(test.read_text() for test in TESTS.rglob("test_*.py"))
    for names, modules, _, test in NAMES:
        assert f"def {test}(" in claims
        for module in modules:
            text = PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()
            for name in names:
                assert name.rpartition(":")[2].rpartition(".")[2] in text, (module, name)


def private_uses(tree):
    """The underscored names of other objects than self, and of other packages' modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("cosmos_cli"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if any(name.startswith("_") for name in names) and node.module != "__future__":
                yield node.names[0].name
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and not node.attr.startswith("__"):
                yield node.attr


def test_every_private_name_is_in_the_list():
    parts = {part for name in ALL for part in name.replace(":", ".").split(".")}
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in private_uses(ast.parse(path.read_text()))
    }
    assert {use for use in found if use[1] not in parts | PUBLIC} == set()


@pytest.mark.workflow
def test_the_network_is_imported_without_the_compiler():
    code = (
        "import sys, cosmos_cli.promote, cosmos_cli.train.loop\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.workflow
def test_without_a_compiler_the_reason_is_returned(monkeypatch):
    def broken(function):
        def compiled(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C compiler\nand more")

        return compiled

    assert device.why_not_compiled(torch.device("cpu")) == ""
    monkeypatch.setattr(torch, "compile", broken)
    assert device.why_not_compiled(torch.device("cpu")) == "no C compiler"
