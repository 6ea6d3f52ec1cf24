"""Read a flat YAML mapping strictly, with the line of every key, and write one. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cosmos_cli import files
from cosmos_cli.errors import UserError, usage_error

MAX_DEPTH = 20

WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


class Entry(NamedTuple):
    """A value, its text in the source, and its origin: `file:line` or `--set key=value`."""

    value: Any
    text: str
    origin: str


def read_entries(path: Path) -> tuple[dict[str, Entry], list[UserError]]:
    """Return the entries of a file, and a problem for every line that is not `key: value`.

    Raises:
        UserError: (USAGE) if the file as a whole cannot be read.
    """
    raw = files.read_bytes(path, files.RECIPE)
    if b"\0" in raw:
        raise usage_error(path, "a binary file, not YAML", "save it as UTF-8 text")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = raw.count(b"\n", 0, err.start) + 1
        what = f"byte 0x{raw[err.start]:02x} is not UTF-8"
        raise usage_error(f"{path}:{line}", what, "save it as UTF-8 text") from err
    return parse(text, str(path))


def parse(text: str, source: str) -> tuple[dict[str, Entry], list[UserError]]:
    """Return the entries of a text, and a problem for every line that is not `key: value`.

    It reads YAML events, so that nothing is constructed or expanded before it has been checked.

    Raises:
        UserError: (USAGE) if the text is not one YAML mapping.
    """
    try:
        events = _events(text, source)
    except yaml.MarkedYAMLError as err:
        line = err.problem_mark.line + 1 if err.problem_mark else 1
        fix = "put text that holds ': ' in quotes" if "mapping values" in str(err.problem) else ""
        raise usage_error(f"{source}:{line}", f"not YAML: {err.problem}", fix) from err
    except yaml.reader.ReaderError as err:
        line = text.count("\n", 0, err.position) + 1
        what = f"character U+{ord(text[err.position]):04X} is not allowed in YAML"
        raise usage_error(f"{source}:{line}", what) from err
    starts = [event for event in events if isinstance(event, yaml.DocumentStartEvent)]
    if len(starts) > 1:
        where = _at(source, starts[1])
        raise usage_error(where, "a second YAML document", "write one recipe per file")
    root = events[2] if starts else None
    if root is None or (isinstance(root, yaml.ScalarEvent) and not root.value):
        fix = "`cosmos recipes copy my_videos` writes one to start from"
        raise usage_error(source, "empty", fix)
    if not isinstance(root, yaml.MappingStartEvent):
        raise usage_error(_at(source, root), f"{_kind(root)} instead of lines of key: value")
    return _entries(events, source)


def _events(text: str, source: str) -> list[Any]:
    events, depth = [], 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        events.append(event)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        # PyYAML's parsing time grows with the square of the depth.
        if depth > MAX_DEPTH:
            raise usage_error(_at(source, event), "deeply nested", "a recipe is flat")
    return events


def _entries(events: list[Any], source: str) -> tuple[dict[str, Entry], list[UserError]]:
    flat, depth = [], 0  # alternating keys and values; deeper nodes are skipped
    for event in events:
        if depth == 1 and not isinstance(event, yaml.CollectionEndEvent):
            flat.append(event)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
    entries: dict[str, Entry] = {}
    problems = []
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        origin = _at(source, key)
        if not isinstance(key, yaml.ScalarEvent):
            problems.append(
                usage_error(origin, f"{_kind(key)} as a key", "a key is one plain word")
            )
            continue
        where = f"{origin}: {key.value}"
        mark = (
            key.anchor or key.tag or getattr(value, "anchor", None) or getattr(value, "tag", None)
        )
        if mark:
            problems.append(usage_error(where, f"no anchors, aliases or tags here, found '{mark}'"))
        elif not isinstance(value, yaml.ScalarEvent):
            problems.append(usage_error(where, f"must be a single value, found {_kind(value)}"))
        elif key.value in entries:
            first = entries[key.value].origin
            problems.append(
                usage_error(where, f"given twice, first at {first}", "keep one of them")
            )
        else:
            content = scalar(value.value) if value.style is None else value.value
            entries[key.value] = Entry(content, value.value, origin)
    return entries, problems


def _at(source: str, event: Any) -> str:
    return f"{source}:{event.start_mark.line + 1}"


def _kind(event: Any) -> str:
    kinds = {yaml.MappingStartEvent: "a mapping", yaml.SequenceStartEvent: "a list"}
    return kinds.get(type(event), "a single value")


def parse_override(override: str) -> tuple[str, Entry]:
    """Return the key and entry of `key=value`. The value may contain ': ' and ' #' unquoted.

    Raises:
        UserError: (USAGE) if it is not `key=value`.
    """
    origin = f"--set {override}"
    key, equals, text = (part.strip() for part in override.partition("="))
    if not key or not equals:
        raise usage_error(origin, "must be key=value")
    if text[:1] not in ("'", '"'):
        return key, Entry(scalar(text), text, origin)
    entries, _ = parse(f"value: {text}", origin)
    return key, entries["value"]._replace(origin=origin)


def scalar(text: str) -> Any:
    """Return the value of an unquoted scalar by the core schema of YAML 1.2.

    PyYAML reads YAML 1.1, where 5e-5 is text, 12:30 is 750, 010 is 8 and no is false.
    Source: YAML 1.2.2, section 10.3.2.
    """
    if text in WORDS:
        return WORDS[text]
    # Python's int() refuses more than 4,300 digits.
    if re.fullmatch(r"[-+]?[0-9]{1,1000}", text):
        return int(text)
    if re.fullmatch(r"0o[0-7]{1,1000}|0x[0-9a-fA-F]{1,1000}", text):
        return int(text, 0)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    return text


def dump_value(value: Any) -> str:
    """Return one value as one line of YAML that versions 1.1 and 1.2 read alike."""
    quote = None
    if isinstance(value, str) and not (value.isprintable() and isinstance(scalar(value), str)):
        quote = '"'
    text = yaml.safe_dump(value, default_style=quote, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
