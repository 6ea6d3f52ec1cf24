"""Motion in closed form, and its tracker: lines, circles, bounces."""

import math
from dataclasses import replace

import pytest
import torch

from cosmos_cli.model import video
from cosmos_cli.model.tiny import dataset, scorer, trajectory, world
from cosmos_cli.model.tiny.trajectory import BORDER_X, BORDER_Y, Trajectory
from cosmos_cli.model.tiny.world import Scene, Thing

SIZE = (25, 96, 160, 16.0)
TIME = torch.linspace(0, 1, 25)


def test_a_line_has_a_constant_velocity_and_a_circle_a_constant_radius():
    line, circle = Trajectory((0.4, -0.2)), Trajectory(radius=0.2, phase=0.25, turns=-0.5)
    x, y = trajectory.positions([(0.1, 0.0, 0.1)] * 2, [line, circle], TIME)
    torch.testing.assert_close(x[0], 0.1 + 0.4 * TIME)
    torch.testing.assert_close(y[0], -0.2 * TIME)
    torch.testing.assert_close(torch.hypot(x[1] - 0.1, y[1]), torch.full((25,), 0.2))
    # A quarter turn is straight down. Half a turn back is straight up.
    assert (x[1, 0].item(), y[1, 0].item()) == pytest.approx((0.1, 0.2), abs=1e-6)
    assert (x[1, -1].item(), y[1, -1].item()) == pytest.approx((0.1, -0.2), abs=1e-6)


def test_a_bounce_is_the_mirror_image_of_the_line_behind_the_border():
    start, size = (BORDER_X - 0.3, BORDER_Y - 0.25, 0.2), 0.2
    free, walls = Trajectory((0.6, 0.2)), Trajectory((0.6, 0.2), walls=True)
    (free_x, x), (free_y, y) = trajectory.positions([start] * 2, [free, walls], TIME)
    for line, bounced, border in ((free_x, x, BORDER_X), (free_y, y, BORDER_Y)):
        limit = border - size
        torch.testing.assert_close(bounced, torch.where(line > limit, 2 * limit - line, line))
    assert free_x.max() > BORDER_X


def test_a_bounce_keeps_its_speed_between_both_walls():
    walls = Trajectory((3.0, 0.0), walls=True)
    x, _ = trajectory.positions([(0.0, 0.0, 0.2)], [walls], torch.linspace(0, 10, 1001))
    assert x.abs().max() <= BORDER_X - 0.2 + 1e-5
    steps = x[0].diff().abs()
    assert (steps > 0.0299).float().mean() > 0.95


def test_a_thing_that_stands_still_stays_to_the_bit():
    x, y = trajectory.positions([(0.123, -0.456, 0.2)], [trajectory.STILL], TIME)
    assert torch.equal(x, torch.full((1, 25), 0.123)) and torch.equal(
        y, torch.full((1, 25), -0.456)
    )


def extent(scene: Scene) -> tuple[float, float]:
    """Return the distance in x and y by which the thing exceeds the borders."""
    thing = scene.thing
    at = trajectory.positions([(thing.x, thing.y, thing.size)], [scene.motion], TIME)
    borders = (BORDER_X, BORDER_Y)
    return tuple((p.abs().max() + thing.size - b).item() for p, b in zip(at, borders, strict=True))


def test_held_out_motion_and_bounces_stay_inside_and_some_training_scenes_leave():
    inside = [world.free_scene(i, "heldout") for i in range(200)]
    inside += [world.bounce_scene(i) for i in range(200)]
    assert max(max(extent(scene)) for scene in inside) < 1e-5
    leaving = [max(extent(world.free_scene(i))) > 0 for i in range(200)]
    assert leaving == [i % 8 == 0 for i in range(200)]


def test_the_first_bounce_is_after_the_nine_given_frames():
    for seed in range(200):
        scene = world.bounce_scene(seed)
        start = [(scene.thing.x, scene.thing.y, scene.thing.size)]
        line = replace(scene.motion, walls=False)
        (x, free_x), (y, free_y) = trajectory.positions(start * 2, [scene.motion, line], TIME)
        bounced = (x - free_x).abs() > 1e-4
        assert not bounced[:9].any() and bounced[18:].any()
        torch.testing.assert_close(y, free_y)
        speed, upwards = scene.motion.velocity
        assert abs(speed) >= trajectory.SMALLEST_BOUNCE_SPEED and not upwards


def test_the_caption_does_not_tell_the_motion():
    scene = world.free_scene(3, "heldout")
    captions = {world.caption(world.free_scene(i), 0).split(" that moves ")[1] for i in range(40)}
    assert all("left" not in words and "circle" not in words for words in captions)
    still = replace(scene, motion=Trajectory((0.1, 0.2), walls=True))
    assert world.caption(scene, 0) == world.caption(still, 5)


def test_scenes_of_a_split_differ_from_those_of_another():
    assert world.free_scene(1) == world.free_scene(1) != world.free_scene(1, "heldout")
    assert world.bounce_scene(1) != world.bounce_scene(1, "heldout")


def test_clips_of_bounces_have_one_shape_so_that_no_wall_is_cropped(tmp_path):
    written = dataset.write_bounces(tmp_path, 2, 1, seed=0)
    assert [path.stem.rsplit("_", 1)[1] for path in written[:2]] == ["bounce", "bounce"]
    for path in written:
        info = video.probe(path)
        assert info.width / info.height == BORDER_X / BORDER_Y
        assert video.frames_at_policy(info, "resample", 16.0) == 25
        assert "that moves" in (tmp_path / "metas" / f"{path.stem}.txt").read_text()


def test_the_tracker_follows_the_closed_form_in_any_light():
    for light in ("day", "dim"):
        motion = Trajectory(radius=0.2, phase=0.1, turns=0.7)
        scene = Scene(Thing("ring", "green", 0.17, 0.1, 0.0), motion, "floor", light=light)
        track = scorer.track(world.render(scene, *SIZE), "green")
        x, y = trajectory.positions([(0.1, 0.0, 0.17)], [motion], TIME)
        assert (track - torch.stack([x[0], y[0]], 1)).norm(dim=1).max() * 96 < 0.2


def test_the_tracker_ignores_a_thing_of_another_colour():
    scene = Scene(Thing("ball", "blue", 0.17), Trajectory((0.3, 0.0)), "grid")
    beside = replace(scene, second=Thing("cube", "red", 0.08, 0.6, 0.35))
    alone, both = (scorer.track(world.render(s, *SIZE), "blue") for s in (scene, beside))
    assert (alone - both).norm(dim=1).max() * 96 < 0.1


def test_the_tracker_sees_nothing_where_the_colour_is_missing():
    grey = torch.full((3, 4, 96, 160), 128).byte()
    grey[0, 2, 40:60, 40:60], grey[1:, 2, 40:60, 40:60] = 220, 40
    seen = ~scorer.track(grey, "red").isnan().any(1)
    assert seen.tolist() == [False, False, True, False]
    assert math.isnan(scorer.track(grey, "blue")[2, 0])
