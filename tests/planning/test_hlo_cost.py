"""Counts from the text of optimised programs, of a few lines and of real ones."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flax_transformers.planning.hlo_cost import SLICES, account
from flax_transformers.planning.hlo_text import (
    Array,
    Instruction,
    arrays,
    device_groups,
    parse_module,
)
from tests.planning.traffic import sent_bytes

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

# In the words of libtpu, cut down to what matters: a loop without a trip count, a matmul that is a
# convolution, an all-gather beside a matmul that stands in two fusions, and a reduce-scatter that
# is an all-reduce of which a slice is kept.
TPU = (Path(__file__).parent / "tpu_program.hlo").read_text()


def test_types_are_read_with_their_memory_space():
    text = "(bf16[8,1024]{1,0:T(8,128)(2,1)S(1)}, f32[]{:T(128)}, pred[3]{0})"
    assert arrays(text) == [Array("bf16", (8, 1024), 1), Array("f32", ()), Array("pred", (3,))]
    assert [one.bytes for one in arrays(text)] == [2 * 8 * 1024, 4, 3]


def test_a_text_that_is_not_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse_module("HloModule nothing")


def test_a_kernel_with_settings_on_several_lines_is_one_instruction():
    text = """
ENTRY %main (q: bf16[2,8,4]) -> bf16[2,8,4] {
  %q = bf16[2,8,4]{2,1,0} parameter(0)
  ROOT %flash.1 = bf16[2,8,4]{2,1,0} custom-call(%q, %q), custom_call_target="tpu_custom_call", a={{
"settings":"{}"
}}, metadata={op_name="step/attention"}, backend_config={"cost_estimate":{"flops":"99"}}
}
"""
    (call,) = account(text, {"data": 1}).kernels
    assert (call.name, call.op_name, call.estimate) == ("flash.1", "step/attention", 99)
    assert call.operands == (Array("bf16", (2, 8, 4)),) * 2


def test_what_hosts_carry_between_slices_is_a_collective_of_its_own():
    text = """
ENTRY %main (g: bf16[8,4]) -> bf16[8,4] {
  %g = bf16[8,4]{1,0} parameter(0)
  %t = token[] after-all()
  %s = (bf16[8,4]{1,0}, u32[], token[]) send(%g, %t), channel_id=2, ATTRIBUTES
  ROOT %out = bf16[8,4]{1,0} copy(%g)
}
""".replace(
        "ATTRIBUTES",
        'frontend_attributes={_xla_megascale_target="{1,3:5}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}',
    )
    (one,) = account(text, {"data": 4}).collectives
    assert (one.kind, one.axes, one.members) == ("all-reduce", (SLICES,), 4)
    assert one.sent_bytes == 2 * (2 * 8 * 4) * 3 / 4


@pytest.mark.parametrize(
    ("groups", "hosts", "per_host"),
    [
        ("replica_groups={{0,1},{2,3}}", [0, 0, 1, 1], None),
        ("replica_groups={{0,2},{1,3}}", [0, 0, 1, 1], 1),
        ("replica_groups={{0,1,2,3}}", [0, 0, 1, 1], 2),
        ("replica_groups={{0,1,2,3}}", [], None),
    ],
)
def test_a_collective_knows_whether_its_groups_reach_over_hosts(groups, hosts, per_host):
    text = f"""
ENTRY %main (g: bf16[8,4]) -> bf16[8,4] {{
  %g = bf16[8,4]{{1,0}} parameter(0)
  ROOT %sum = bf16[8,4]{{1,0}} all-reduce(%g), {groups}, to_apply=%add
}}
"""
    (one,) = account(text, {"data": 2, "fsdp": 2}, hosts=hosts).collectives
    assert one.per_host == per_host


def test_a_loop_of_a_tpu_program_counts_as_often_as_it_runs():
    found = account(TPU, MESH)
    assert not found.unknown
    assert found.matmul_flops == 6 * 2 * 16 * 8 * 8


def test_a_collective_that_overlaps_matmuls_counts_once():
    gather = next(c for c in account(TPU, MESH).collectives if c.kind == "all-gather")
    # Axis 0 of the compiler's mesh is data x fsdp, and its minor half is fsdp.
    assert (gather.axes, gather.members, gather.runs) == (("fsdp",), 2, 6)
    assert gather.bytes == 2 * 8 * 8
    assert gather.sent_bytes == 6 * gather.bytes / 2
    assert sum(c.kind == "all-gather" for c in account(TPU, MESH).collectives) == 1


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,3},{1,2}}", [[0, 3], [1, 2]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=3] {'b'}", [[0, 1, 2], [3, 4, 5]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=3], device_ids=([3,2]T(1,0)) {'a'}",
         [[0, 1], [2, 3], [4, 5]]),
    ],
)  # fmt: skip
def test_groups_of_devices_are_read_however_they_are_written(written, groups):
    devices = 1 + max(place for group in groups for place in group)
    one = Instruction("x", "f32[]", "all-reduce", (), "", written, False)
    assert sorted(device_groups(one, devices)) == groups


def test_an_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter():
    scatter = next(c for c in account(TPU, MESH).collectives if c.kind != "all-gather")
    assert (scatter.kind, scatter.axes, scatter.runs) == ("reduce-scatter", ("fsdp",), 1)
    assert scatter.sent_bytes == 4 * 8 * 8 / 2


def test_traffic_leaves_out_what_stays_on_the_chip_and_what_is_not_read():
    """Per round: a slice is read and written, one fusion aliases its operand and gives the rest to
    the chip's own memory, the other reads a, x (y is on the chip) and writes z."""
    a, x = 2 * 4 * 8, 2 * 16 * 8
    scattered = 4 * (8 * 8 + 4 * 8)
    scalars = 2 * 4 + 6 * 3 * 4  # a copy, and the counter
    assert account(TPU, MESH).memory_bytes == 6 * (2 * a + a + x + x) + scattered + scalars


def test_of_a_stack_only_the_slice_is_read_however_deep_it_is_taken():
    text = """
%slicing (s: f32[9,4], i: s32[]) -> f32[1,4] {
  %s = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,4]{1,0} dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,4}
}

%doubling (s: f32[9,4], i: s32[]) -> f32[1,4] {
  %s = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,4]{1,0} fusion(%s, %i), kind=kLoop, calls=%slicing
  ROOT %two = f32[1,4]{1,0} add(%one, %one)
}

ENTRY %main (s: f32[9,4], i: s32[]) -> f32[1,4] {
  %s = f32[9,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = f32[1,4]{1,0} fusion(%s, %i), kind=kLoop, calls=%doubling
}
"""
    assert account(text, {"data": 1}).memory_bytes == 4 * 4 + 4 + 4 * 4  # a slice, i, the result


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def test_matmuls_in_a_loop_of_a_real_program():
    def run(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    text = compiled(run, jnp.ones((4, 16)), jnp.ones((7, 16, 16)))
    found = account(text, {"data": 1})
    assert found.matmul_flops == 7 * 2 * 4 * 16 * 16
    assert not found.unknown


def test_convolutions_count_neither_padding_nor_dilation():
    def flops(**settings):
        left, right = jnp.ones((2, 3, 8)), jnp.ones((5, 3, 3))
        text = compiled(lambda a, b: jax.lax.conv_general_dilated(a, b, **settings), left, right)
        return account(text, {"data": 1}).matmul_flops / (2 * 2 * 3 * 5)

    assert flops(window_strides=(1,), padding=[(0, 0)]) == 6 * 3
    assert flops(window_strides=(1,), padding=[(1, 1)]) == 8 * 3 - 2
    assert flops(window_strides=(2,), padding=[(0, 0)]) == 3 * 3
    # Of 15 places, 8 hold a number: of the 13 windows 7 meet two of them and 6 meet one.
    assert flops(window_strides=(1,), padding=[(0, 0)], lhs_dilation=(2,)) == 7 * 2 + 6


def test_collectives_of_a_real_program_are_those_of_its_mesh():
    mesh = jax.make_mesh((2, 2, 2), tuple(MESH), axis_types=(AxisType.Auto,) * 3)

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    x = jax.ShapeDtypeStruct((16, 32), np.float32, sharding=place(("data", "fsdp")))
    up = jax.ShapeDtypeStruct((32, 64), np.float32, sharding=place("fsdp", "tensor"))
    down = jax.ShapeDtypeStruct((64, 32), np.float32, sharding=place("tensor", "fsdp"))

    def layer(x, up, down):
        whole = [
            jax.lax.with_sharding_constraint(up, place(None, "tensor")),
            jax.lax.with_sharding_constraint(down, place("tensor", None)),
        ]
        hidden = jax.lax.with_sharding_constraint(x @ whole[0], place(("data", "fsdp"), "tensor"))
        return jax.lax.with_sharding_constraint(hidden @ whole[1], place(("data", "fsdp")))

    text = jax.jit(layer).lower(x, up, down).compile().as_text()
    found = account(text, MESH)
    assert found.matmul_flops == 2 * 2 * 4 * 32 * 32
    assert sent_bytes(found) == {
        ("all-gather", ("fsdp",)): 2 * (4 * 32 * 32) / 2,
        ("all-reduce", ("tensor",)): 2 * (4 * 4 * 32) / 2,
    }
