"""From logical axes to places on the mesh, for parameters and for batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flax_transformers.errors import UserError
from flax_transformers.parallel import rules
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import (
    batch_sharding,
    check_batch_size,
    check_sequence_length,
    host_rows,
    mesh_axes,
    parameter_shardings,
    place_rows,
    replicated,
)


def mesh_of(data=1, fsdp=1, tensor=1):
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[: data * fsdp * tensor])


def boxed(shape, names):
    """A tree with one abstract parameter, layer/kernel, that carries its axis names."""
    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    return {"layer": {"kernel": nn.LogicallyPartitioned(array, names)}}


def test_logical_names_become_mesh_axes():
    assert mesh_axes(PartitionSpec("batch", None, "embed", "mlp", "layers")) == PartitionSpec(
        ("data", "fsdp", "expert"), None, "fsdp", "tensor", None
    )


def test_a_name_without_a_rule_is_a_mistake_in_the_model():
    with pytest.raises(KeyError, match="no sharding rule for logical axis 'experts'"):
        parameter_shardings(boxed((4, 8), ("embed", "experts")), mesh_of())


def test_a_parameter_is_divided_as_its_names_say():
    tree = boxed((3, 8, 6), ("layers", "embed", "mlp"))
    sharding = parameter_shardings(tree, mesh_of(2, 2, 2))["layer"]["kernel"]
    assert sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.shard_shape((3, 8, 6)) == (3, 4, 3)


def test_a_parameter_without_logical_axes_is_replicated():
    tree = {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)}
    assert parameter_shardings(tree, mesh_of(fsdp=8))["scale"].is_fully_replicated


def test_a_parameter_with_fewer_logical_axes_than_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"parameter layer/kernel \(8, 6\) has logical axes"):
        parameter_shardings(boxed((8, 6), ("embed",)), mesh_of())


def test_a_size_that_does_not_divide_is_refused_with_the_sizes_that_fit():
    with pytest.raises(
        UserError,
        match="parameter layer/kernel: its 'heads' axis of 6 does not divide over mesh axis "
        "tensor=4; sizes that fit are 1, 2, 3, 6$",
    ):
        parameter_shardings(boxed((8, 6), ("embed", "heads")), mesh_of(1, 2, 4))


@pytest.mark.parametrize("tensor", [1, 2])
def test_two_axes_of_a_parameter_on_one_mesh_axis_are_refused(tensor):
    with pytest.raises(
        UserError,
        match="parameter layer/kernel has both 'heads' and 'mlp' on mesh axis 'tensor'",
    ):
        parameter_shardings(boxed((8, 8), ("heads", "mlp")), mesh_of(tensor=tensor))


def test_several_mesh_axes_that_do_not_divide_a_dimension_are_all_named(monkeypatch):
    monkeypatch.setitem(rules._AXES, "experts", ("data", "tensor"))
    divided = parameter_shardings(boxed((8, 4), ("experts", "embed")), mesh_of(2, 2, 2))
    assert divided["layer"]["kernel"].shard_shape((8, 4)) == (2, 2)
    with pytest.raises(
        UserError,
        match="'experts' axis of 6 does not divide over mesh axes data=2 x tensor=2; sizes that "
        "fit are 1, 2, 3, 6$",
    ):
        parameter_shardings(boxed((6, 4), ("experts", "embed")), mesh_of(2, 2, 2))


def test_experts_that_do_not_divide_are_refused():
    mesh = make_mesh(MeshConfig(data=1, expert=8))
    with pytest.raises(
        UserError,
        match="'expert' axis of 6 does not divide over mesh axis expert=8; sizes that fit are 1, "
        "2, 3, 6$",
    ):
        parameter_shardings(boxed((6, 4), ("expert", "embed")), mesh)


class TPUs:
    """A mesh of 64 TPU chips, as far as the rules look at one."""

    shape: ClassVar[dict[str, int]] = {"data": 1, "fsdp": 64, "tensor": 1}
    size = 64
    devices = np.array([SimpleNamespace(platform="tpu")])


@pytest.mark.parametrize(
    ("width", "leaves", "remedy"),
    [
        (4096, 64, "over 32 devices at most, and the batch over 2"),
        (64, 1, "over 1 devices at most, and the batch over 64"),
    ],
)
def test_shards_narrower_than_the_lanes_give_one_warning(
    caplog, monkeypatch, width, leaves, remedy
):
    monkeypatch.setattr(rules, "NamedSharding", lambda mesh, spec: spec)
    tree = boxed((width, 8), ("embed", "heads"))
    tree |= {"second": boxed((width, 8), ("embed", "heads"))["layer"]}
    parameter_shardings(tree, TPUs())
    (record,) = caplog.records
    assert record.getMessage() == (
        f"parameter layer/kernel: its width of {width} over mesh axis fsdp=64 leaves {leaves} per "
        "device, less than the 128 lanes of a TPU, so that collectives transfer far more than "
        f"necessary; shard it {remedy} times as many (--mesh.data)"
    )


def test_wide_shards_and_other_platforms_give_no_warning(caplog, monkeypatch):
    parameter_shardings(boxed((64, 8), ("embed", "heads")), mesh_of(fsdp=8))
    monkeypatch.setattr(rules, "NamedSharding", lambda mesh, spec: spec)
    parameter_shardings(boxed((8192, 8), ("embed", "heads")), TPUs())
    assert not caplog.records


def test_a_batch_that_divides_is_accepted():
    check_batch_size(16, 4, mesh_of(2, 2, 2))
    check_batch_size(7, 1, mesh_of(tensor=2))


@pytest.mark.parametrize(
    ("batch_size", "micro_batches", "near"),
    [
        (12, 2, r"\(8 parts\); use a multiple of 8, such as 8 or 16$"),
        (6, 1, r"\(4 parts\); use a multiple of 4, such as 4 or 8$"),
        (3, 1, r"\(4 parts\); use a multiple of 4, such as 4$"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_those_that_do(
    batch_size, micro_batches, near
):
    said = (
        f"batch_size {batch_size} does not divide over mesh data=2 x fsdp=2 and "
        f"micro_batches={micro_batches} {near}"
    )
    with pytest.raises(UserError, match=said):
        check_batch_size(batch_size, micro_batches, mesh_of(2, 2, 2))


def mesh_with_context(parts):
    return make_mesh(MeshConfig(data=8 // parts, context=parts))


def test_a_length_that_divides_is_accepted():
    check_sequence_length(32, mesh_with_context(4))
    check_sequence_length(33, mesh_of(2, 2, 2))
    check_sequence_length(None, mesh_of(2, 2, 2))


def test_a_length_that_does_not_divide_is_refused_with_one_that_does():
    said = "sequence_length 30 does not divide over mesh axis context=4; .*, such as 28$"
    with pytest.raises(UserError, match=said):
        check_sequence_length(30, mesh_with_context(4))


def test_images_have_no_positions_to_divide():
    with pytest.raises(UserError, match="mesh axis context=2 divides the positions of text, which"):
        check_sequence_length(None, mesh_with_context(2))


def test_one_process_loads_all_examples():
    rows = host_rows(batch_sharding(mesh_of(2, 1, 2)), 8)
    assert rows.tolist() == list(range(8))
    assert host_rows(replicated(mesh_of(2, 1, 2)), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("sizes", [(2, 1, 2), (2, 2, 2), (1, 1, 4)])
def test_each_device_holds_its_examples_of_the_batch(sizes):
    mesh = mesh_of(*sizes)
    sharding = batch_sharding(mesh)
    local = {"ids": np.arange(24).reshape(8, 3), "weights": np.arange(8, dtype=np.float32)}
    placed = place_rows(local, host_rows(sharding, 8), sharding, 8)
    parts = sizes[0] * sizes[1]
    for name, values in local.items():
        assert placed[name].sharding == sharding
        np.testing.assert_array_equal(placed[name], values)
        divided = np.split(values, parts)
        for shard in placed[name].addressable_shards:
            data, fsdp, *_ = np.argwhere(mesh.devices == shard.device)[0]
            np.testing.assert_array_equal(shard.data, divided[data * sizes[1] + fsdp])


def test_examples_of_a_process_are_found_by_their_index():
    """As on a process whose devices hold rows 2, 3, 6 and 7 of eight."""
    mesh = mesh_of(4)
    sharding = batch_sharding(mesh)
    rows = np.array([2, 3, 6, 7])
    asked = {}

    def remember(shape, sharding, part):
        indices = sharding.addressable_devices_indices_map(shape).values()
        asked.update({i[0].start: part(i).tolist() for i in indices if i[0].start in (2, 6)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "make_array_from_callback", remember)
        place_rows({"ids": rows * 10}, rows, sharding, 8)
    assert asked == {2: [20, 30], 6: [60, 70]}
