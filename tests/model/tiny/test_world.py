import collections
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cosmos_cli.model import mp4, video
from cosmos_cli.model.tiny import dataset, scorer, world
from cosmos_cli.model.tiny.world import Scene, Thing

SIZE = (25, 96, 160, 16.0)


def measured(count: int):
    """Held-out scenes and the readings of their renders."""
    scenes = [world.sample_scene(i, "heldout") for i in range(count)]
    return scenes, [scorer.measure(world.render(scene, *SIZE)) for scene in scenes]


@pytest.fixture(scope="module")
def truth():
    return measured(80)


def right(scenes, readings) -> dict[str, float]:
    """Part of the scenes whose reading is right, by question."""
    scores = [scorer.score(s, r) for s, r in zip(scenes, readings, strict=True)]
    return {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}


def test_rendered_scenes_are_read_correctly(truth):
    assert all(part >= 0.99 for part in right(*truth).values()), right(*truth)


@pytest.mark.slow
def test_rendered_scenes_are_read_correctly_in_full_count():
    scenes, readings = measured(400)
    assert all(part >= 0.99 for part in right(scenes, readings).values()), right(scenes, readings)


def test_shuffled_readings_are_right_only_by_chance(truth):
    scenes, readings = truth
    shifts = range(1, len(scenes))
    rights = [right(scenes, readings[shift:] + readings[:shift]) for shift in shifts]
    found = {key: sum(part[key] for part in rights) / len(rights) for key in rights[0]}
    chance = {"colour": 1 / 8, "shape": 1 / 6, "motion": 1 / 8}
    assert all(abs(found[key] - chance[key]) < 0.05 for key in chance), found


def test_readings_survive_compression_and_noise(tmp_path):
    scenes = [world.sample_scene(i) for i in range(16)]
    readings = []
    for scene in scenes:
        mp4.write_mp4(tmp_path / "a.mp4", world.render(scene, *SIZE), 16.0, 28)
        read = video.read_frames(tmp_path / "a.mp4", range(25)).float()
        noise = torch.randn(read.shape, generator=torch.Generator().manual_seed(0))
        readings.append(scorer.measure((read + 8 * noise).clamp(0, 255).byte()))
    assert all(part >= 0.9 for part in right(scenes, readings).values()), right(scenes, readings)


def test_shapes_are_read_through_a_tokenizers_blur():
    scenes = [world.sample_scene(i) for i in range(60)]
    readings = []
    for scene in scenes:
        frames = world.render(scene, *SIZE).transpose(0, 1).float()
        blurred = F.avg_pool2d(frames, 7, 1, 3, count_include_pad=False)
        readings.append(scorer.measure(blurred.transpose(0, 1).byte()))
    assert right(scenes, readings)["shape"] >= 0.9, right(scenes, readings)


def test_the_track_matches_the_closed_form():
    scene = Scene(Thing("ball", "blue", size=0.2, x=0.1), "left", "grid")
    track = scorer.measure(world.render(scene, *SIZE)).track
    time = torch.linspace(0, 1, 25)
    torch.testing.assert_close(track[:, 0], 0.1 - world.TRAVEL_X * (time - 0.5), atol=0.004, rtol=0)
    assert track[:, 1].abs().max() < 0.004
    # The size is the root of the area of a disc of radius 0.2.
    assert (track[:, 2] - 0.2 * torch.pi**0.5).abs().max() < 0.012


@pytest.mark.parametrize("camera", ["pan", "push"])
def test_camera_motion_does_not_confuse_the_readings(camera):
    scene = Scene(Thing("star", "red", x=0.2), "still", "floor", camera)
    reading = scorer.measure(world.render(scene, *SIZE))
    assert reading.motion == "still"
    x_first, x_last = reading.track[[0, -1], 0].tolist()
    expected = 0.2 - world.PAN if camera == "pan" else 0.2 * (1 + world.PUSH)
    assert (x_first, x_last) == pytest.approx((0.2, expected), abs=0.005)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_empty_picture_reads_as_nothing(level):
    reading = scorer.measure(torch.full((3, 9, 96, 160), level).byte())
    assert (reading.colour, reading.shape, reading.motion) == ("none", "none", "none")
    assert reading.concept == 0 and reading.track.isnan().all()


def test_heldout_combinations_never_occur_in_training():
    def combination(scene):
        return scene.thing.shape, scene.thing.colour, scene.motion

    train = {combination(world.sample_scene(i)) for i in range(4000)}
    heldout = {combination(world.sample_scene(i, "heldout")) for i in range(1000)}
    assert not train & heldout
    assert {(shape, motion) for shape, _, motion in heldout} <= {(s, m) for s, _, m in train}
    # Six shapes, eight colours, eight motions, less two round shapes that do not spin.
    assert len(train | heldout) == 6 * 8 * 8 - 2 * 8
    assert not any(shape in world.ROUND and motion == "rotate" for shape, _, motion in train)


def test_every_thing_has_one_heldout_motion():
    for shape, colour in itertools.product(world.SHAPES, world.COLOURS):
        assert sum(world.is_heldout(shape, colour, motion) for motion in world.MOTIONS) == 1


def test_the_second_thing_never_has_the_colour_of_the_first():
    scenes = [world.sample_scene(i) for i in range(500)]
    seconds = [scene for scene in scenes if scene.second]
    assert 50 < len(seconds) < 250
    assert all(scene.second.colour != scene.thing.colour for scene in seconds)


def test_scenes_captions_and_renders_are_the_same_for_the_same_seed():
    assert world.sample_scene(7) == world.sample_scene(7) != world.sample_scene(8)
    scene = world.sample_scene(7)
    assert world.caption(scene, 3) == world.caption(scene, 3)
    assert torch.equal(world.render(scene, *SIZE), world.render(scene, *SIZE))


def test_an_unknown_split_is_a_value_error():
    with pytest.raises(ValueError, match="test"):
        world.sample_scene(0, "test")


def test_captions_describe_the_scene_in_several_phrasings():
    scene = Scene(
        Thing("ball", "orange"), "left", "floor", "pan", "dim", Thing("cube", "red", 0.08)
    )
    captions = {world.caption(scene, seed) for seed in range(40)}
    assert len(captions) == 6
    for text in captions:
        assert "an orange ball" in text.lower() and "left" in text and "plank floor" in text
        assert "small red cube" in text and "pans right" in text and "dim" in text
        assert text[0].isupper() and text.endswith(".")


def test_a_batch_equals_its_scenes_rendered_alone():
    scenes = [world.sample_scene(i) for i in range(12)]
    batch = world.render_batch(scenes, 9, 64, 96, 16.0, "cpu")
    assert batch.shape == (12, 3, 9, 64, 96) and batch.dtype == torch.uint8
    for scene, clip in zip(scenes, batch, strict=True):
        alone = world.render(scene, 9, 64, 96, 16.0)
        assert (alone.int() - clip.int()).abs().max() <= 1


def test_a_clip_at_twice_the_fps_contains_the_frames_of_the_slower_one():
    scene = world.sample_scene(5)
    slow, fast = world.render(scene, 25, 96, 160, 16.0), world.render(scene, 49, 96, 160, 32.0)
    assert (fast[:, ::2].int() - slow.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", world.SHAPES)
def test_edges_are_antialiased_and_shapes_fill_their_radius(shape):
    clip = world.render(Scene(Thing(shape, "red", 0.3), "still", "light"), 1, 160, 160, 16.0)[:, 0]
    background = clip[:, 0, 0]
    changed = (clip != background[:, None, None]).any(0)
    rows, columns = changed.nonzero().T
    reach = max((rows - 79.5).abs().max(), (columns - 79.5).abs().max()) / 160 / 0.3
    assert 0.85 < float(reach) < 1.35
    levels = clip[2].flatten().unique()
    assert len(levels) > 10, "a hard edge has only the colours of the parts"


def test_the_mascot_reads_as_the_concept_and_other_things_do_not(truth):
    concepts = world.concept_scenes(8, seed=3)
    assert {scene.motion for scene, _ in concepts} == set(world.MOTIONS)
    for scene, text in concepts:
        assert text.startswith("A video of sks teal robot ")
        reading = scorer.measure(world.render(scene, *SIZE))
        assert all(scorer.score(scene, reading).values()) and reading.concept > 0.9
        plain = replace(scene, thing=replace(scene.thing, accents=()))
        assert scorer.measure(world.render(plain, *SIZE)).concept < 0.1
    assert max(reading.concept for reading in truth[1]) < 0.1


def test_ordinary_scenes_are_mostly_robots_or_spinning_things():
    scenes, texts = zip(*world.ordinary_scenes(12, seed=0), strict=True)
    assert {scene.thing.shape for scene in scenes[::2]} == {"robot"}
    assert {scene.motion for scene in scenes[1::4]} == {"rotate"}
    assert len({scene.thing.shape for scene in scenes[1::2]}) > 2
    for scene, text in zip(scenes, texts, strict=True):
        assert not world.is_heldout(scene.thing.shape, scene.thing.colour, scene.motion)
        assert scene.thing.colour != world.MASCOT.colour and "sks" not in text.lower()


def test_the_dataset_is_complete_deterministic_and_not_overwritten(tmp_path):
    paths = dataset.write_mascots(tmp_path / "a", 3, 1, seed=0)
    again = dataset.write_mascots(tmp_path / "b", 3, 1, seed=0)
    assert [p.read_bytes() for p in paths] == [p.read_bytes() for p in again]
    found = [video.probe(path) for path in paths]
    sizes = collections.Counter((i.frames, i.height, i.width, i.fps) for i in found)
    assert sizes == collections.Counter(dataset.TAKES)
    for info in found:
        assert video.frames_at_policy(info, "resample", 16.0) == 25
    metas = sorted((tmp_path / "a" / "metas").iterdir())
    assert [meta.stem for meta in metas] == [path.stem for path in paths]
    assert ["sks teal robot" in meta.read_text() for meta in metas] == [True, True, True, False]

    paths[1].unlink()
    metas[2].write_text("my own words")
    kept = paths[0].stat().st_mtime_ns
    dataset.write_mascots(tmp_path / "a", 3, 1, seed=0)
    assert paths[1].read_bytes() == again[1].read_bytes()
    assert metas[2].read_text() == "my own words" and paths[0].stat().st_mtime_ns == kept
    assert {p.suffix for p in (tmp_path / "a").rglob("*") if p.is_file()} == {".mp4", ".txt"}
