"""Captions from a CSV or JSONL file."""

import pytest

from cosmos_cli import captions
from cosmos_cli.errors import ExitCode, UserError

VIDEOS = {"a.mp4", "b, with comma.mp4"}
WANTED = {"a.mp4": "Line one,\nline two.", "b, with comma.mp4": 'He said "no".'}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (
            "c.csv",
            'file,caption,more\nvideos/a.mp4,"Line one,\nline two.",7\n'
            '"b, with comma.mp4","He said ""no"".",8\n',
        ),
        (
            "c.jsonl",
            '{"file": "a.mp4", "caption": "Line one,\\nline two."}\n\n'
            '{"caption": " He said \\"no\\". ", "file": "b, with comma.mp4", "score": 1}\n',
        ),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_both_formats_give_the_same_captions(tmp_path, name, content, mark):
    (tmp_path / name).write_text(mark + content, encoding="utf-8")
    assert captions.read(tmp_path / name, VIDEOS) == (WANTED, [])


def test_a_caption_is_as_it_is_read_back_and_a_name_as_it_is_on_disk(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"file": "caf\u00e9.mp4", "caption": "One,\\r\\ntwo."}\n', encoding="utf-8")
    on_disk = "cafe\u0301.mp4"
    assert captions.read(path, {on_disk}) == ({on_disk: "One,\ntwo."}, [])


def test_rows_of_unknown_videos_are_named_with_their_line(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("file,caption\na.mp4,A.\nz.mp4,Z.\n")
    found, unknown = captions.read(path, VIDEOS)
    assert found == {"a.mp4": "A."}
    assert unknown == [f"{path}:3: there is no video 'z.mp4'"]


def test_all_wrong_lines_are_named_at_once(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"file": "a.mp4"}\n{"file": "a.mp4", "caption": 3}\nnot json\n[1]\n'
        '{"file": "a.mp4", "caption": "A."}\n{"file": "x/a.mp4", "caption": "B."}\n'
    )
    with pytest.raises(UserError) as caught:
        captions.read(path, VIDEOS)
    assert caught.value.code == ExitCode.DATASET
    lines = str(caught.value).splitlines()
    assert "5 lines cannot be used" in lines[0]
    for line, (number, what) in zip(
        lines[1:],
        [
            (1, "has no caption"),
            (2, "has no caption"),
            (3, "is no JSON"),
            (4, "is no JSON object"),
            (6, "names 'a.mp4' again, after line 5"),
        ],
        strict=True,
    ):
        assert f"{path}:{number}: " in line and what in line


def test_csv_lines_are_those_of_the_file_also_behind_a_caption_of_two_lines(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text('file,caption\na.mp4,"one\ntwo"\nb.mp4,\na.mp4,not, quoted\n')
    with pytest.raises(UserError) as caught:
        captions.read(path, VIDEOS)
    lines = str(caught.value).splitlines()
    assert f"{path}:4: has no caption" in lines[1]
    assert f"{path}:5: has more cells than the header" in lines[2]


@pytest.mark.parametrize(
    ("name", "content", "code", "what"),
    [
        ("c.csv", "name,caption\na.mp4,A.\n", ExitCode.DATASET, "has no column 'file'"),
        ("c.csv", "", ExitCode.DATASET, "has no column 'file'"),
        ("c.txt", "a.mp4: A.", ExitCode.DATASET, "neither .csv nor .jsonl"),
        ("c.csv", None, ExitCode.ASSET, "No such file"),
        ("c.csv", b"\xff\xfe", ExitCode.ASSET, "no UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_says_so(tmp_path, name, content, code, what):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=what) as caught:
        captions.read(path, VIDEOS)
    assert caught.value.code == code and str(path) in str(caught.value)
