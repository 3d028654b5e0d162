"""Rendering: what is left out is what gives no pixel. That images are stock's is shown in test_simulator.py too."""

import mujoco
import numpy as np
import pytest

from vla_rl.simulation import rendering
from vla_rl.simulation.libero_env import build_simulator
from vla_rl.simulation.libraries import prepare_simulator
from vla_rl.simulation.rendering import is_outside, pyramid

SIZE = 64
VIEW = (-1.0, 1.0, -0.5, 0.5)  # 90 degrees wide


def cube(x, y, z, half=0.1):
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)])
    return np.array([x, y, z]) + half * signs  # [8, 3]


def test_a_box_is_outside_only_where_it_lies_beyond_one_side():
    boxes = {
        "ahead": (cube(0, 0, 2), False),
        "to the right": (cube(3, 0, 2), True),
        "at the right edge": (cube(2, 0, 2), False),
        "to the left": (cube(-3, 0, 2), True),
        "above": (cube(0, 1.5, 2), True),
        "below": (cube(0, -1.5, 2), True),
        "behind": (cube(0, 0, -2), True),
        "around the camera": (cube(0, 0, 0, half=5), False),
        "beyond a corner, but beyond no side": (cube(2.05, 1.05, 2, half=0.1), False),
    }
    outside = is_outside(np.stack([box for box, _ in boxes.values()]), VIEW)
    assert dict(zip(boxes, outside.tolist(), strict=True)) == {name: wanted for name, (_, wanted) in boxes.items()}


def test_pyramid_is_the_part_of_the_view_that_shows_the_points():
    square = np.array([[-0.2, -0.2, 2], [-0.2, 0.4, 2], [0.6, -0.2, 2], [0.6, 0.4, 2]])
    assert pyramid(square, VIEW) == pytest.approx((-0.1, 0.3, -0.1, 0.2))
    assert pyramid(np.add(square, [9, 0, 0]), VIEW) is None  # beside the view
    assert pyramid(square - [0, 0, 9], VIEW) is None  # behind
    assert pyramid(np.vstack([square, [[0, 0, -1]]]), VIEW) == VIEW  # on both sides of the camera: anywhere
    assert pyramid(square * [20, 20, 1], VIEW) == VIEW


SCENE = """
<mujoco>
  <visual><map znear="0.01"/></visual>
  <asset>
    <material name="mirror" reflectance="0.9" rgba="0.3 0.3 0.3 1"/>
    <mesh name="tetra" vertex="0 0 0  0.2 0 0  0 0.2 0  0 0 0.2"/>
  </asset>
  <worldbody>
    <light pos="0 0 3"/>
    <camera name="ahead" pos="0 -1.5 0.5" xyaxes="1 0 0 0 0.3 1" fovy="45"/>
    <geom name="floor" type="box" size="0.5 0.5 0.02" material="{material}" group="1"/>
    <geom name="seen" type="mesh" mesh="tetra" pos="0 0 0.1" rgba="1 0 0 1" group="1"/>
    <geom name="reflected" type="mesh" mesh="tetra" pos="0.5 2 1.1" rgba="0 1 0 1" group="1"/>
    <geom name="unseen" type="mesh" mesh="tetra" pos="0 -3 0.5" rgba="0 0 1 1" group="1"/>
  </worldbody>
</mujoco>
"""


@pytest.fixture(params=["mirror", ""], ids=["mirror", "no mirror"])
def renderer(request):
    """A mesh in view, one above it that only a mirror on the floor can show, and one behind the camera."""
    prepare_simulator()
    xml = SCENE.format(material="mirror") if request.param else SCENE.replace('material="{material}"', "")
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer = rendering.Renderer(model, data, SIZE, fast=False)
    yield renderer
    renderer.close()


@pytest.mark.libero
def test_what_only_a_mirror_shows_is_drawn_where_there_is_a_mirror(renderer):
    model, data = renderer.model, renderer.data
    names = {model.geom(geom).name for geom in renderer.culling.unseen(data, 0)}
    has_mirror = len(renderer.culling.mirrors) > 0
    assert names == ({"unseen"} if has_mirror else {"unseen", "reflected"})
    image = renderer.render("ahead")
    assert (model.geom_group == 1).all()  # as it was
    renderer.culling.possible = False
    np.testing.assert_array_equal(renderer.render("ahead"), image)
    model.geom("reflected").rgba[3] = 0
    assert np.array_equal(renderer.render("ahead"), image) != has_mirror  # so the scene does test the mirror


@pytest.mark.libero
def test_where_a_light_casts_shadows_everything_is_drawn(renderer):
    model = renderer.model
    model.light_castshadow[:] = 1
    culling = rendering.Culling(model)
    with culling.hide_unseen(renderer.data, 0):
        assert (model.geom_group == 1).all()


@pytest.mark.libero
@pytest.mark.parametrize(
    ("suite", "task"), [("libero_spatial", 0), pytest.param("libero_goal", 3, marks=pytest.mark.slow), ("libero_10", 2)]
)
def test_libero_images_are_the_same_with_everything_drawn(suite, task):
    """The arm moves through the view of both cameras; the stove of these scenes is a mirror."""
    cameras = ("agentview", "robot0_eye_in_hand")
    sim = build_simulator(suite, task, cameras, SIZE, fast=False, cache_gb=3)
    sim.reset(0, None, render=False)
    rng, hidden = np.random.default_rng(0), []
    for _ in range(8):
        action = rng.uniform(-1, 1, 7)
        for _ in range(6):
            sim.step(action, render=False)
        culled = [sim.renderer.render(camera) for camera in cameras]
        hidden.append([len(sim.renderer.culling.unseen(sim.data, sim.model.camera(name).id)) for name in cameras])
        sim.renderer.culling.possible = False
        whole = [sim.renderer.render(camera) for camera in cameras]
        sim.renderer.culling.possible = True
        np.testing.assert_array_equal(culled, whole)
    assert np.mean(hidden, axis=0).min() > 3  # meshes a picture
    assert len(sim.renderer.culling.mirrors) > 0
    sim.close()
