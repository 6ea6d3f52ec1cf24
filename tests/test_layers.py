"""Imports go strictly downward. Read from the source, followed to their end."""

import ast
from functools import cache
from pathlib import Path

import pytest

import cosmos_cli

PACKAGE = Path(cosmos_cli.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
HEAVY = {"torch", "transformers", "deepspeed", "torchcodec", "safetensors", "huggingface_hub"}
# From low to high; the rooms of one line do not know one another.
ORDER = (
    (
        *(
            "errors",
            "console",
            "cpu_memory",
            "files",
            "hashes",
            "pickles",
            "archives",
            "locks",
            "paths",
        ),
        *("exchange", "spec", "html", "gpus", "signals", "ranks", "__init__"),
    ),
    ("recipe", "model"),
    ("download",),
    ("prep", "model_card"),
    ("train", "generate"),
    ("evaluate", "promote", "push", "setup", "new_recipe"),
    ("push_files",),
    ("commands",),
    ("app",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def module_of(name):
    """The module of ours that an imported name lies in; a package is its __init__."""
    while name and name not in FILES and f"{name}.__init__" not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__" if name else ""


@cache
def imports(module, at_start):
    """Names that a module imports; `at_start` leaves out what functions import when they run."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    nodes = list(tree.body) if at_start else list(ast.walk(tree))
    nodes += [n for node in nodes if isinstance(node, ast.Try | ast.If) for n in node.body]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module, at_start):
    return {m for name in imports(module, at_start) if (m := module_of(name)) and m != module}


def reachable(module, at_start=True):
    """The module and all of ours that importing it imports."""
    seen, todo = set(), [module]
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += ours(name, at_start)
    return seen


def heavy(module):
    names = {name for m in reachable(module) for name in imports(m, True)}
    return {name.partition(".")[0] for name in names} & HEAVY


def room(module):
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", FILES)
def test_a_room_imports_only_what_lies_below(module):
    for other in ours(module, at_start=False):
        below = LEVEL[room(other)] < LEVEL[room(module)]
        assert below or room(other) == room(module) or LEVEL[room(module)] == 0, other
        if LEVEL[room(module)] == 0:
            assert LEVEL[room(other)] == 0, other


@pytest.mark.parametrize("module", [m for m in FILES if room(m) == "model"])
def test_the_model_knows_no_recipe_and_no_run(module):
    allowed = {"errors", "files", "hashes", "pickles", "archives", "spec", "model", "__init__"}
    assert {room(m) for m in ours(module, at_start=False)} <= allowed


LIGHT = [
    m for m in FILES if room(m) in ("recipe", "setup", "download", "commands", "app", "__main__")
]


@pytest.mark.parametrize("module", [*LIGHT, *(f"cosmos_cli.{name}" for name in ORDER[0][:-1])])
def test_what_a_help_page_needs_imports_nothing_heavy(module):
    assert not heavy(module)


def test_help_imports_the_commands_and_five_low_files():
    """Twice what importing typer, rich, pydantic and yaml takes: the packages come with a verb."""
    found = {m.removeprefix("cosmos_cli.") for m in reachable("cosmos_cli.app")}
    low = {name for name in found if not name.startswith("commands.")}
    assert low == {"__init__", "app", "console", "errors", "files", "paths", "signals"}


@pytest.mark.parametrize("module", [m for m in FILES if m.endswith(".__init__")])
def test_a_package_says_what_it_is_for_and_imports_nothing(module):
    if module == "cosmos_cli.__init__":
        return
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    assert len(tree.body) == 1
    assert 1 <= len(ast.get_docstring(tree).splitlines()) <= 15


def test_no_two_modules_import_one_another():
    for module in FILES:
        for other in ours(module, at_start=True):
            assert module not in ours(other, at_start=True), (module, other)


def test_the_denoiser_reads_in_four_files():
    assert len(reachable("cosmos_cli.model.dit") - {"cosmos_cli.model.dit"}) <= 4


def test_the_loop_imports_few_files():
    found = [m for m in reachable("cosmos_cli.train.loop") if not m.endswith("__init__")]
    assert len(found) <= 42


def test_no_command_computes():
    for module in FILES:
        if room(module) == "commands":
            names = {name.partition(".")[0] for name in imports(module, at_start=False)}
            assert not names & {"torch", "numpy"}
