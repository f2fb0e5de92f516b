"""Mesh sizes: what is filled in, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_transformers.errors import UserError
from flax_transformers.parallel.mesh import MeshConfig, arrange, make_mesh, resolve_mesh


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


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ((-1, -1, 1), "mesh data=-1 x fsdp=-1 is not valid"),
        ((0,), "mesh data=0 is not valid"),
        ((8, -2, 1), "mesh.fsdp is -2; it must be at least -1"),
    ],
)
def test_invalid_axes_are_refused(sizes, names):
    with pytest.raises(UserError, match=names):
        MeshConfig(*sizes)


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


def test_a_config_and_sizes_of_axes_are_not_mixed():
    with pytest.raises(UserError, match="a config or sizes of axes"):
        make_mesh(MeshConfig(), fsdp=2)


def test_a_mesh_may_take_some_of_the_devices():
    mesh = make_mesh(MeshConfig(-1, 1, 1), jax.devices()[3:5])
    assert list(mesh.devices.flat) == jax.devices()[3:5]


def slices(count, of, platform="tpu"):
    """Devices of ``count`` slices of ``of`` each, in an order that mixes them."""
    kind = {"platform": platform, "device_kind": platform, "core_on_chip": 0}
    numbers = [(index, slice_index) for index in range(of) for slice_index in range(count)]
    return [SimpleNamespace(id=i, slice_index=s, coords=(i, 0, 0), **kind) for i, s in numbers]


@pytest.mark.parametrize("shape", [(2, 4, 1, 1, 1), (4, 1, 1, 1, 2), (2, 1, 2, 2, 1)])
def test_only_data_crosses_slices(shape):
    grid = arrange(shape, slices(2, of=4))
    found = np.vectorize(lambda device: device.slice_index)(grid)
    assert grid.shape == shape and len({(d.id, d.slice_index) for d in grid.flat}) == 8
    by_data = np.repeat([0, 1], shape[0] // 2).reshape(-1, 1, 1, 1, 1)
    np.testing.assert_array_equal(found, np.broadcast_to(by_data, shape))


def test_slices_that_do_not_divide_data_are_refused():
    with pytest.raises(
        UserError,
        match="mesh data=1 does not divide over 2 slices, and no other axis can be divided over "
        "them; set data to a multiple of 2, and the other axes so that their product divides the 4 "
        "devices of a slice$",
    ):
        arrange((1, 8, 1, 1, 1), slices(2, of=4))


def test_any_axis_may_cross_hosts_of_gpus():
    grid = arrange((1, 8, 1, 1, 1), slices(2, of=4, platform="gpu"))
    assert grid.shape == (1, 8, 1, 1, 1)
