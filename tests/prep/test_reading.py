"""Clips that are read ahead are those that are asked for, in any case."""

import threading
from pathlib import Path

import pytest
import torch

from cosmos_cli.model.video import Clip, VideoError
from cosmos_cli.prep.reading import Reader

CPU = torch.device("cpu")
A, B, C = Path("a.mp4"), Path("b.mp4"), Path("c.mp4")
CLIPS = [Clip(start, 24, 12) for start in (0, 12)]


class Files:
    """Stands in for files: it notes which clips are read, and by which thread."""

    def __init__(self):
        self.read, self.changed = [], threading.Condition()

    def __call__(self, path, clip):
        with self.changed:
            self.read.append((path, clip.start, threading.get_ident()))
            self.changed.notify()
        if path == B:
            raise VideoError("damaged")
        return torch.tensor([ord(path.stem), clip.start])

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.read) >= count, 10)
        return [(path, start) for path, start, _ in self.read]


def expected(path, clip):
    return [ord(path.stem), clip.start]


def test_the_next_clips_are_read_while_one_is_encoded():
    found = Files()
    with Reader(found, 2, CPU) as reader:
        reader.plan(A, CLIPS)
        reader.plan(C, CLIPS)
        assert reader.get(A, CLIPS[0]).tolist() == expected(A, CLIPS[0])
        # Nobody has asked for the second and the third one yet.
        assert sorted(found.wait_for(3)) == [(A, 0), (A, 12), (C, 0)]
        assert reader.get(A, CLIPS[1]).tolist() == expected(A, CLIPS[1])
        assert found.wait_for(4)[3] == (C, 12)
        assert reader.get(C, CLIPS[0]).tolist() == expected(C, CLIPS[0])
        assert reader.get(C, CLIPS[1]).tolist() == expected(C, CLIPS[1])
    assert len(found.read) == 4
    assert threading.get_ident() not in {thread for *_, thread in found.read}


def test_clips_of_a_rejected_video_are_skipped_and_others_are_read_on_request():
    found = Files()
    with Reader(found, 1, CPU) as reader:
        for path in (A, B, C):
            reader.plan(path, CLIPS)
        with pytest.raises(VideoError):
            reader.get(B, CLIPS[0])
        assert reader.get(C, CLIPS[1]).tolist() == expected(C, CLIPS[1])
        # Not planned: an old latent that is measured again.
        assert reader.get(A, CLIPS[0]).tolist() == expected(A, CLIPS[0])
    assert (C, 0) not in [(path, start) for path, start, _ in found.read]


def test_a_small_machine_reads_in_its_own_thread():
    found = Files()
    with Reader(found, 0, CPU) as reader:
        reader.plan(A, CLIPS)
        assert reader.get(A, CLIPS[0]).tolist() == expected(A, CLIPS[0])
    assert [thread for *_, thread in found.read] == [threading.get_ident()]
