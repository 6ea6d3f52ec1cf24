"""Imports go strictly downward, read from the source."""

import ast
from pathlib import Path

import pytest

import cosmos_cli

PACKAGE = Path(cosmos_cli.__file__).parent
HEAVY = {"torch", "transformers", "deepspeed", "torchcodec", "safetensors", "huggingface_hub"}
TORCH_FREE = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE / "model"
    or path.name in ("__init__.py", "spec.py", "elastic.py", "plan.py")
]
LEAVES = ("dit", "tokenizer", "text", "edm", "sampler", "video")
BELOW = {"containers", "finite", "kernels", "sequence", "spec"}


def imports(path, everywhere):
    """Names of imported modules; `from a import b` counts as a.b. Type-checking blocks do not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    nodes = ast.walk(tree) if everywhere else tree.body
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", TORCH_FREE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_heavy_is_imported_outside_of_the_model(path):
    found = {name.partition(".")[0] for name in imports(path, everywhere=False)}
    assert not found & HEAVY


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_do_not_import_one_another(leaf):
    names = imports(PACKAGE / "model" / f"{leaf}.py", everywhere=True)
    siblings = {n.split(".")[2] for n in names if n.startswith("cosmos_cli.model.")}
    assert siblings <= BELOW


@pytest.mark.parametrize("name", ["errors", "layout", "keys", "recipe", "console"])
def test_the_lowest_modules_import_no_command_and_no_network(name):
    names = set(imports(PACKAGE / f"{name}.py", everywhere=True))
    allowed = ("cosmos_cli.spec", "cosmos_cli.errors", "cosmos_cli.paths")
    own = {n for n in names if n.startswith("cosmos_cli.")}
    rest = {n for n in own if not n.startswith(allowed) and "flatyaml" not in n}
    assert not {n for n in rest if n.startswith(("cosmos_cli.commands", "cosmos_cli.model"))}


def test_no_command_computes():
    for path in (PACKAGE / "commands").glob("*.py"):
        assert not set(imports(path, everywhere=True)) & {"torch", "numpy"}
