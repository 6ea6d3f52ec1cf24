from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.recipe import strict_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5),
        ("1e-4", 1e-4),
        ("2e5", 2e5),
        ("1E+3", 1e3),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+7", 7),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("<<", "<<"),
        ("nan", "nan"),
        ("9" * 5000, math.inf),
    ],
)
def test_plain_scalars_follow_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = strict_yaml.scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_scalars_are_text_and_lines_are_counted_from_one() -> None:
    entries, problems = strict_yaml.parse(
        "# head\n\na: '5'\nb: |\n  x\n  y\nc: 5 # five\n", "r.yaml"
    )
    assert problems == []
    assert entries["a"] == ("5", "5", "r.yaml:3")
    assert entries["b"].value == "x\ny\n"
    assert entries["c"] == (5, "5", "r.yaml:7")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("k=5e-5", 5e-5),
        ("k='5'", "5"),
        ('k=""', ""),
        ("k=", None),
        ("k=a: b # c", "a: b # c"),
        ("k=[a", "[a"),
        ("k=a=b", "a=b"),
        (" k = 3 ", 3),
    ],
)
def test_an_override_is_read_like_a_line_of_the_file(text: str, value: object) -> None:
    key, entry = strict_yaml.parse_override(text)
    assert (key, entry.value, entry.origin) == ("k", value, f"--set {text}")


@pytest.mark.parametrize("text", ["k", "=3", "", 'k="open', "k='a' b"])
def test_a_malformed_override_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError) as caught:
        strict_yaml.parse_override(text)
    assert caught.value.code == ExitCode.USAGE
    assert f"--set {text}".strip() in str(caught.value)


def test_aliases_are_refused_before_they_expand() -> None:
    lines = ["a0: &a0 x"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
    entries, problems = strict_yaml.parse("\n".join(lines), "bomb.yaml")
    assert entries == {}
    assert len(problems) == 60
    assert "bomb.yaml:60: a59: no anchors, aliases or tags" in str(problems[-1])


def test_a_nested_value_is_named_and_the_rest_is_read() -> None:
    entries, problems = strict_yaml.parse(
        "a:\n  b: 1\nc: [1, {d: 2}]\ne: 3\n? [f]\n: 4\n", "r.yaml"
    )
    assert [str(problem) for problem in problems] == [
        "r.yaml:1: a: must be a single value, found a mapping",
        "r.yaml:3: c: must be a single value, found a list",
        "r.yaml:5: a list as a key; a key is one plain word",
    ]
    assert entries.keys() == {"e"}


def test_deep_nesting_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"deep\.yaml:2: deeply nested; a recipe is flat"):
        strict_yaml.parse("a: 1\nb: " + "[" * 50_000, "deep.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty; `cosmos recipes copy my_videos`"),
        (b"# only a comment\n", "empty"),
        (b"---\n", "empty"),
        (b"just words\n", "1: a single value instead of lines of key: value"),
        (b"\n- a\n- b\n", "2: a list instead of lines of key: value"),
        (b"a: 1\n---\na: 2\n", "2: a second YAML document"),
        (b"a: 1\n\tb: 2\n", "2: not YAML"),
        (b"a: 1\nb: x: y\n", "2: not YAML: mapping values are not allowed here; put text"),
        (b"a: 'open\n", "not YAML"),
        (b"a: 1\nb: \x07\n", "2: character U+0007 is not allowed in YAML"),
        (b"a: 1\nb: caf\xe9\n", "2: byte 0xe9 is not UTF-8"),
        (b"PK\x03\x04\x00\x00", "a binary file, not YAML"),
        ("a: 1".encode("utf-16"), "a binary file, not YAML"),
        (b"a: 1\n" * 100_000, "larger than 100,000 bytes"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_refused_by_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        strict_yaml.read_entries(path)
    assert caught.value.code == ExitCode.USAGE
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    entries, problems = strict_yaml.read_entries(path)
    assert {key: entry.value for key, entry in entries.items()} == {"a": 1, "b": 2}
    assert problems == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(UserError, match=r"r\.yaml: cannot be read: Permission denied"):
        strict_yaml.read_entries(path)


TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
TRAPS = st.sampled_from(["yes", "5e-5", "12:30", "0o17", "~", "a: b", "x # y", "- a", "&a", "*a"])


@given(TEXTS | TRAPS | NUMBERS | st.booleans() | st.none())
def test_a_dumped_value_is_read_back_unchanged(value: object) -> None:
    line = f"key: {strict_yaml.dump_value(value)}"
    entries, problems = strict_yaml.parse(line + "\n", "r.yaml")
    assert problems == []
    assert entries["key"].value == value
    assert type(entries["key"].value) is type(value)
    assert "\n" not in line
    assert yaml.safe_load(line) == {"key": value}
