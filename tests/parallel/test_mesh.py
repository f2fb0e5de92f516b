"""Mesh sizes: what is filled in, and what is refused."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from flax_transformers.errors import UserError
from flax_transformers.parallel.mesh import MeshConfig, make_mesh, resolve_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(1, -1, 1), (1, 8, 1)),
        (MeshConfig(2, 2, -1), (2, 2, 2)),
        (MeshConfig(2, 4, -1), (2, 4, 1)),
        (MeshConfig(4, 1, 2), (4, 1, 2)),
    ],
)
def test_minus_one_takes_the_devices_that_are_left(config, sizes):
    assert resolve_mesh(config, 8) == MeshConfig(*sizes)


@pytest.mark.parametrize("config", [MeshConfig(-1, -1, 1), MeshConfig(0), MeshConfig(8, -2, 1)])
def test_what_is_no_grid_is_refused(config):
    with pytest.raises(UserError, match=f"mesh data={config.data}.* is not a grid"):
        resolve_mesh(config, 8)


@pytest.mark.parametrize(
    "config", [MeshConfig(-1, 3, 1), MeshConfig(-1, 16, 1), MeshConfig(2, 2, 1), MeshConfig(16)]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config):
    shown = f"mesh data={config.data}( x fsdp={config.fsdp})? does not fit 8 devices;"
    with pytest.raises(UserError, match=shown):
        resolve_mesh(config, 8)


def test_one_device_is_said_in_the_singular():
    with pytest.raises(UserError, match="does not fit 1 device; set the axes"):
        resolve_mesh(MeshConfig(2), 1)


def test_a_mesh_holds_each_device_once_under_axes_left_to_the_compiler():
    mesh = make_mesh(MeshConfig(2, -1, 2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_may_take_some_of_the_devices():
    mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices()[3:5])
    assert list(mesh.devices.flat) == jax.devices()[3:5]
