"""Which clips are near-duplicates."""

from cosmos_cli.model import mp4, video
from cosmos_cli.model.tiny import world
from cosmos_cli.prep import clip_statistics


def rendered(seed):
    return world.render(world.sample_scene(seed, "heldout"), 9, 96, 160, 16.0)


def test_a_clip_that_was_encoded_again_is_a_near_duplicate(tmp_path):
    clips = {}
    for seed in range(4):
        pixels = rendered(seed)
        mp4.write_mp4(tmp_path / "again.mp4", pixels, 16, 23)
        again = video.read_frames(tmp_path / "again.mp4", range(9))
        clips[f"{seed}"] = clip_statistics.measure_clip(pixels)
        clips[f"{seed} again"] = clip_statistics.measure_clip(again)
    pairs = [(f"{seed}", f"{seed} again") for seed in range(4)]
    assert clip_statistics.near_duplicates(clips) == pairs


def test_the_same_shapes_in_other_colours_are_no_near_duplicates():
    pixels = rendered(0)
    one, two = map(clip_statistics.measure_clip, (pixels, 255 - pixels))
    same = two._replace(fingerprint=one.fingerprint)
    assert clip_statistics.near_duplicates({"one": one, "two": same}) == []
    # An earlier version stored no colours: the fingerprint decides.
    stored = same._replace(colours=())
    assert clip_statistics.near_duplicates({"one": one, "two": stored}) == [("one", "two")]
