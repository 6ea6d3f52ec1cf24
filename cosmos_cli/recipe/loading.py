"""Load, validate, override and explain the flat recipe that every command reads. No torch."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cosmos_cli import files
from cosmos_cli.errors import UserError, usage_error
from cosmos_cli.recipe import strict_yaml
from cosmos_cli.recipe.keys import PATHS, PATTERNS, SET_BY_FAST, Recipe
from cosmos_cli.recipe.rules import conflicts, oddities
from cosmos_cli.recipe.strict_yaml import Entry

# The first words of a recipe that `cosmos recipes new` wrote.
WRITTEN_BY_US = "# Written by `cosmos recipes new "


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with the origin of each value and its warnings.

    `unexpected` are the warnings that the text of a recipe which we ship or write does not cause.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    warnings: tuple[str, ...]
    unexpected: tuple[str, ...]
    path: Path


def load(name_or_path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Return the recipe of a file or a shipped name, with `key=value` overrides applied.

    Raises:
        UserError: (USAGE) with every problem of the recipe, one line each.
    """
    path = find_recipe(name_or_path)
    entries, problems = strict_yaml.read_entries(path)
    own_speed = _speed(entries)
    for override in overrides:
        try:
            key, entry = strict_yaml.parse_override(override)
            entries[key] = entry
        except UserError as err:
            problems.append(err)
    _apply_speed(entries, own_speed)
    warnings = []
    if root := os.environ.get("OUTPUT_ROOT"):
        hidden = entries.get("output_root")
        if hidden and hidden.origin.startswith("--set") and hidden.value != root:
            warnings.append(f"the environment's OUTPUT_ROOT={root} wins over {hidden.origin}")
        entries["output_root"] = Entry(root, root, "environment OUTPUT_ROOT")

    recipe, wrong = _validate(entries, path)
    problems += wrong
    if problems:
        first, *rest = problems
        first.also = tuple(rest)
        raise first
    origins = {key: _origin(key, entries.get(key)) for key in Recipe.model_fields}
    warnings += oddities(recipe)
    known = _expected(path)
    unexpected = tuple(warning for warning in warnings if warning not in known)
    return LoadedRecipe(recipe, origins, tuple(warnings), unexpected, path)


def _speed(entries: Mapping[str, Entry]) -> Any:
    return entries["speed"].value if "speed" in entries else "exact"


def _apply_speed(entries: dict[str, Entry], own_speed: Any) -> None:
    """Enter the keys that `speed: fast` sets.

    If --set changes the speed, the file's values of these keys belong to its own speed, so they are
    dropped. A recipe that a run saved names every key.
    """
    speed = _speed(entries)
    for key, value in SET_BY_FAST.items():
        if speed != own_speed and key in entries and not entries[key].origin.startswith("--set"):
            del entries[key]
        if speed == "fast" and key not in entries:
            entries[key] = Entry(value, str(value), "speed fast")


def is_written_by_us(path: Path) -> bool:
    """True if `cosmos recipes new` wrote the recipe."""
    return files.read_text(path, files.RECIPE).startswith(WRITTEN_BY_US)


def _expected(path: Path) -> set[str]:
    """Return the warnings that a recipe which we ship or write causes by itself."""
    text = files.read_text(path, files.RECIPE)
    ours = is_written_by_us(path) or any(
        text == files.read_text(shipped_path, files.RECIPE) for shipped_path in shipped().values()
    )
    if not ours:
        return set()
    own, _ = strict_yaml.parse(text, str(path))
    recipe, _ = _validate(own, path)
    return set(oddities(recipe))


def _origin(key: str, entry: Entry | None) -> str:
    if entry is None:
        return "model default" if Recipe.model_fields[key].default_factory else "default"
    return "--set" if entry.origin.startswith("--set") else entry.origin


def shipped() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name."""
    here = Path(__file__).parents[1]
    installed = here / "recipes"
    folder = installed if installed.is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the file of a recipe, given its path or its shipped name.

    Raises:
        UserError: (USAGE) if there is no such file and no such name.
    """
    path, known = files.expand(name_or_path), shipped()
    try:
        is_folder = path.is_dir()
        # A broken link counts as found, so that opening it names the real problem.
        if path.suffix == ".jsonl" and path.is_file():
            fix = f"use `{shlex.join(['cosmos', 'generate', '--batch', str(path)])}`"
            raise usage_error(path, "a batch of prompts, not a recipe", fix)
        if (path.exists() or path.is_symlink()) and not is_folder:
            return path
    except OSError as err:
        raise usage_error(path, f"cannot be read ({err.strerror})") from err
    is_name = path.name == str(name_or_path) and path.suffix in ("", ".yaml", ".yml")
    if is_name and path.stem in known:
        found = known[path.stem]
        here = Path.cwd()
        return found.relative_to(here) if found.is_relative_to(here) else found
    if is_folder:
        new = shlex.join(["cosmos", "recipes", "new", "my_videos", "--videos", str(path)])
        fix = f"name a file in it, or write a recipe for a folder of videos: `{new}`"
        raise usage_error(path, "a folder, not a recipe", fix)
    key, equals, _ = str(name_or_path).partition("=")
    if equals and key in Recipe.model_fields:
        setting = shlex.quote(str(name_or_path))
        raise usage_error(setting, "a setting, not a recipe", f"use `--set {setting}`")
    if " " in str(name_or_path) and not path.suffix:
        prompt = shlex.quote(str(name_or_path))
        fix = f"if it is a prompt: `cosmos generate --prompt {prompt}`"
        raise usage_error(prompt, "no such recipe", fix)
    what = "no such file" if path.suffix or not is_name else "no such recipe"
    fix = f"{_nearest(path.stem, known)} shipped recipes: {', '.join(known)}"
    raise usage_error(name_or_path, what, fix.strip())


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML with every key. `load` reads it back to the same recipe."""
    return "".join(
        f"{key}: {strict_yaml.dump_value(value)}\n" for key, value in recipe.model_dump().items()
    )


def explain(loaded: LoadedRecipe) -> str:
    """Return the YAML of `dump` with the origin of each value as a comment."""
    lines = dump(loaded.recipe).splitlines()
    # Align to the lines of at most 60 characters: one long prompt must not push every comment
    # off the screen.
    column = max(len(line) for line in lines if len(line) <= 60)
    origins = (loaded.origins[key] for key in Recipe.model_fields)
    return "".join(
        f"{line:<{column}}  # {origin}\n" for line, origin in zip(lines, origins, strict=True)
    )


class Key(NamedTuple):
    """One row of the key reference."""

    name: str
    group: str
    takes: str
    default: str
    description: str


def key_reference(names: Sequence[str] = ()) -> list[Key]:
    """Return a row for each of the named keys, or for every key, ordered by group.

    Raises:
        UserError: (USAGE) if there is no such key.
    """
    schema = json_schema()["properties"]
    for name in names:
        if name not in schema:
            fix = _nearest(name.lower(), schema) or "`cosmos recipes keys` lists them all"
            raise usage_error(name, "unknown key", fix)
    rows = []
    for name, info in Recipe.model_fields.items():
        if names and name not in names:
            continue
        if info.default_factory:
            default = "the model's"
        else:
            default = "required" if info.is_required() else strict_yaml.dump_value(info.default)
        part = schema[name]
        rows.append(Key(name, part["group"], _takes(part), default, part["description"]))
    return rows


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors and other programs."""
    schema = Recipe.model_json_schema()
    for part in schema["properties"].values():
        del part["decides"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _validate(entries: dict[str, Entry], path: Path) -> tuple[Recipe, list[UserError]]:
    """Return the recipe and its problems. Wrong values are replaced by their defaults."""
    values = {key: entry.value for key, entry in entries.items()}
    for key in PATHS:
        if isinstance(values.get(key), str) and values[key].startswith("~"):
            values[key] = str(files.expand(values[key]))
    wrong: dict[str, UserError] = {}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as err:
        for error in err.errors(include_url=False, include_input=False):
            key = str(error["loc"][0])
            # With a wrong `model`, the defaults that depend on it also fail. Report only `model`.
            if error["type"] != "default_factory_not_called":
                wrong[key] = _wrong_value(error["type"], key, entries.get(key), path)
        good = {key: value for key, value in values.items() if key not in wrong}
        recipe = Recipe.model_validate({"dataset_dir": "missing", **good})
    for keys, what, fix in conflicts(recipe):
        if wrong.keys().isdisjoint(keys):
            # The defaults never conflict, so the user set at least one of the keys.
            blamed = next(key for key in keys if key in entries)
            wrong[blamed] = usage_error(_where(blamed, entries[blamed]), what, fix)
    place = {key: n for n, key in enumerate(entries)}
    return recipe, [wrong[key] for key in sorted(wrong, key=lambda key: place.get(key, -1))]


def _where(key: str, entry: Entry) -> str:
    return entry.origin if entry.origin.startswith("--set") else f"{entry.origin}: {key}"


def _wrong_value(kind: str, key: str, entry: Entry | None, path: Path) -> UserError:
    if entry is None:
        return usage_error(f"{path}: {key}", "required and missing", f"add a line {key}: ...")
    if kind == "extra_forbidden":
        fix = _nearest(key.lower(), Recipe.model_fields) or "`cosmos recipes keys` lists them all"
        return usage_error(_where(key, entry), "unknown key", fix)
    if kind == "string_unicode":
        # The text of a command line that is not UTF-8, or an escape such as "\ud800".
        bad = next(letter for letter in str(entry.value) if "\ud800" <= letter <= "\udfff")
        what = f"holds {bad!a}, which is not a character"
        return usage_error(_where(key, entry), what, "write it as UTF-8 text")
    schema = json_schema()["properties"][key]
    quoted = isinstance(entry.value, str)
    found = repr(entry.text) if quoted else entry.text or "nothing"
    fix = _nearest(entry.text, schema.get("enum", ()))
    if quoted and isinstance(strict_yaml.scalar(entry.text), int | float):
        fix = "take the quotes away"
    elif not quoted and entry.value is not None and "text" in _takes(schema):
        fix = "put it in quotes"
    found = found if len(found) <= 60 else f"{found[:57]}..."
    return usage_error(_where(key, entry), f"must be {_takes(schema)}, found {found}", fix)


def _nearest(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), 1)
    return f"did you mean '{close[0]}'?" if close else ""


def _takes(schema: Mapping[str, Any]) -> str:
    """Return the values that a key takes, in words, from its JSON Schema."""
    if "anyOf" in schema:
        return ", or ".join(_takes(part) for part in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if "const" in schema:
        return str(schema["const"])
    if "pattern" in schema:
        return PATTERNS[schema["pattern"]]
    names = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "string": "text",
        "null": "null",
    }
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{words} {schema[bound]}" for bound, words in bounds.items() if bound in schema]
    return ", ".join(filter(None, (names[schema["type"]], " and ".join(limits))))
