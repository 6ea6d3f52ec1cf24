"""Match captions to videos, by file name or by the rows of a CSV or JSONL file."""

import json
import unicodedata
from pathlib import Path

import pytest

from cosmos_cli.errors import ExitCode, UserError
from cosmos_cli.prep import captions

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


def test_line_ends_become_newlines_and_names_are_those_on_disk(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"file": "caf\u00e9.mp4", "caption": "One,\\r\\ntwo."}\n', encoding="utf-8")
    on_disk = "cafe\u0301.mp4"
    assert captions.read(path, {on_disk}) == ({on_disk: "One,\ntwo."}, [])


def test_rows_of_unknown_videos_are_named_with_their_line(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("file,caption\na.mp4,A.\nz.mp4,Z.\n")
    found, unknown = captions.read(path, VIDEOS)
    assert found == {"a.mp4": "A."}
    assert unknown == ["line 3 'z.mp4'"]


def test_all_wrong_lines_are_named_at_once(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text(
        '{"file": "a.mp4"}\n{"file": "a.mp4", "caption": 3}\nnot json\n[1]\n'
        '{"file": "a.mp4", "caption": "A."}\n{"file": "x/a.mp4", "caption": "B."}\n'
        r'{"file": "a.mp4", "caption": "half \ud800"}'
    )
    with pytest.raises(UserError) as caught:
        captions.read(path, VIDEOS)
    assert caught.value.code == ExitCode.DATASET
    lines = str(caught.value).splitlines()
    assert "6 lines cannot be used" in lines[0]
    for line, (number, what) in zip(
        lines[1:],
        [
            (1, "has no caption"),
            (2, "has no caption"),
            (3, "is not valid JSON"),
            (4, "is not a JSON object"),
            (6, "names 'a.mp4' again, after line 5"),
            (7, r"has a caption with '\ud800', which is not a character"),
        ],
        strict=True,
    ):
        assert f"{path}:{number}: " in line and what in line


def test_csv_line_numbers_stay_right_after_a_caption_of_two_lines(tmp_path):
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
        ("c.csv", None, ExitCode.ASSET, "does not exist"),
        ("c.csv", b"\xff", ExitCode.ASSET, "not UTF-8"),
        ("c.csv", b"\xff\xfea", ExitCode.ASSET, "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_says_so(tmp_path, name, content, code, what):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=what) as caught:
        captions.read(path, VIDEOS)
    assert caught.value.code == code and str(path) in str(caught.value)


def test_rows_name_a_video_in_any_case_form_and_with_backslashes(tmp_path):
    path = tmp_path / "c.jsonl"
    rows = {"videos\\A.MP4": "A.", "C:\\x\\caf\u00e9.mp4": "B.", "/x/Stra\u00dfe.mp4 ": "C."}
    path.write_text("\n".join(json.dumps({"file": f, "caption": c}) for f, c in rows.items()))
    videos = ["a.mp4", "cafe\u0301.MP4", "STRASSE.mp4"]
    assert captions.read(path, videos) == (dict(zip(videos, rows.values(), strict=True)), [])


def test_an_exact_row_wins_and_an_ambiguous_one_is_refused(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("file,caption\nA.mp4,upper\na.mp4,lower\n")
    assert captions.read(path, ["a.mp4", "A.mp4"])[0] == {"A.mp4": "upper", "a.mp4": "lower"}
    assert captions.read(path, ["a.mp4"]) == ({"a.mp4": "lower"}, ["line 2 'A.mp4'"])
    path.write_text("file,caption\nAB.mp4,which\n")
    with pytest.raises(UserError, match=r"c\.csv:2: .*may be 'Ab\.mp4' or 'aB\.mp4'"):
        captions.read(path, ["aB.mp4", "Ab.mp4"])


def test_a_backslash_that_is_part_of_a_name_stays(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("file,caption\na\\b.mp4,one\n")
    assert captions.read(path, ["a\\b.mp4", "b.mp4"])[0] == {"a\\b.mp4": "one"}


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("video", "file"),
    [
        (f"{NFD}.mp4", f"{NFC}.txt"),
        (f"{NFC}.mp4", f"{NFD}.txt"),
        (f"{NFC}.mp4", f"{NFD.upper()}.TXT"),
        ("x.mp4", "x.TXT"),
        ("x.mp4", "x.mp4.txt"),
        ("x.mp4", "X.MP4.Txt"),
        ("x.MP4", "x.mp4.txt"),
        ("X.mp4", "x.txt"),
        ("x .mp4", "x.txt"),
        ("x.mp4", "x.txt "),
        ("a.b.mp4", "a.b.txt"),
        ("a.b.mp4", "A.b.mp4.txt"),
        ("\u1112\u1161\u11ab.mp4", "\ud55c.txt"),
        ("stra\u00dfe.mp4", "STRASSE.txt"),
        ("\u03a3\u03a3.mp4", "\u03c3\u03c2.txt"),
    ],
)
def test_a_file_belongs_to_the_video_that_it_is_named_after(video, file):
    found = captions.owners([Path(file)], [video, "other.mp4"])
    assert (found.files, found.unclear, found.unused) == ({video: Path(file)}, {}, [])


def owned(files, videos):
    found = captions.owners([Path(f) for f in files], videos)
    return (
        {video: path.name for video, path in found.files.items()},
        {video: sorted(p.name for p in paths) for video, paths in found.unclear.items()},
        sorted(path.name for path in found.unused),
    )


@pytest.mark.parametrize(
    ("files", "videos", "wanted"),
    [
        # Exact names win, in this order.
        (["x.TXT", "x.txt"], ["x.mp4"], ({"x.mp4": "x.txt"}, {}, ["x.TXT"])),
        (["X.txt", "x.mp4.txt"], ["x.mp4"], ({"x.mp4": "x.mp4.txt"}, {}, ["X.txt"])),
        (["x.mp4.txt", "x.txt"], ["x.mp4"], ({"x.mp4": "x.txt"}, {}, ["x.mp4.txt"])),
        (["A.txt", "a.txt"], ["a.mp4", "A.mp4"], ({"a.mp4": "a.txt", "A.mp4": "A.txt"}, {}, [])),
        # What may be one or the other is neither.
        (["x.TXT", "x.Txt"], ["x.mp4"], ({}, {"x.mp4": ["x.TXT", "x.Txt"]}, [])),
        (["ab.txt"], ["Ab.mp4", "aB.mp4"], ({}, {"Ab.mp4": ["ab.txt"], "aB.mp4": ["ab.txt"]}, [])),
        (
            ["ab.txt", "Ab.txt"],
            ["Ab.mp4", "aB.mp4"],
            ({"Ab.mp4": "Ab.txt"}, {"aB.mp4": ["ab.txt"]}, []),
        ),
        # A stem with dots is not its first part.
        (["a.txt", "a.b.txt"], ["a.b.mp4"], ({"a.b.mp4": "a.b.txt"}, {}, ["a.txt"])),
        (["a.b.txt"], ["a.mp4"], ({}, {}, ["a.b.txt"])),
        # Two videos of one stem: prep takes the first, a full name says which is meant.
        (["x.txt"], ["x.mov", "x.mp4"], ({"x.mov": "x.txt"}, {}, [])),
        (["x.mp4.txt"], ["x.mov", "x.mp4"], ({"x.mp4": "x.mp4.txt"}, {}, [])),
        (["x.mp4.txt"], ["x.mp4", "x.mp4.mov"], ({"x.mp4.mov": "x.mp4.txt"}, {}, [])),
        (["gone.txt", "b.txt"], ["b.mp4"], ({"b.mp4": "b.txt"}, {}, ["gone.txt"])),
    ],
)
def test_exact_names_win_and_ambiguous_ones_match_no_video(files, videos, wanted):
    assert owned(files, videos) == wanted
    assert owned(files[::-1], videos) == wanted


def test_names_are_compared_as_the_unicode_standard_says():
    for form in ("NFC", "NFD"):
        assert captions.key(unicodedata.normalize(form, "\u01d6\u0345")) == captions.key(
            unicodedata.normalize("NFD", "\u01d5\u0345")
        )
    assert captions.key("a.mp4") != captions.key("b.mp4")
