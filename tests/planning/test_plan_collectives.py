"""What steps send on a TPU mesh, compiled by the real compiler, against the formulas stated in
``planning.hlo_cost``; and that their programs do not grow with their layers."""

import dataclasses

import jax
import pytest

from flax_transformers.families.llama import LlamaConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.planning.hlo_cost import account
from flax_transformers.planning.plan import lower_train_step
from flax_transformers.planning.topology import devices_of
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import Phase
from flax_transformers.training.setup import make_trainer
from tests.planning.traffic import sent_bytes

pytestmark = [pytest.mark.slow, pytest.mark.full]

ROWS, LENGTH, WIDTH, LAYERS = 16, 128, 1024, 2
MODEL = LlamaConfig(
    vocab_size=262,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=4,
    intermediate_size=4 * WIDTH,
    max_positions=LENGTH,
)
WEIGHTS = LAYERS * 16 * WIDTH**2  # four square ones in attention, three of 4 in the feed-forward


def compiled(mesh, remat="full", topology="v5e:2x2", **changes):
    """The text of the program, and the shape of its mesh."""
    config = dataclasses.replace(
        tiny_config("text.txt", "store"),
        model=dataclasses.replace(MODEL, **changes),
        objective=CausalLM(),
        compute=ComputeConfig("auto", remat=remat, attention="xla"),
        phases=(Phase(20, LENGTH, ROWS),),
        mesh=mesh,
    )
    trainer = make_trainer(config, make_mesh(config.mesh, devices_of(topology)))
    # In use, matmuls are not asked for more than bfloat16 products.
    with jax.default_matmul_precision("default"):
        text = lower_train_step(config, trainer, config.phases[0]).compile().as_text()
    return text, dict(trainer.mesh.shape)


def accounted(mesh, **changes):
    return account(*compiled(mesh, **changes))


@pytest.fixture(scope="module")
def fully_sharded():
    return accounted(MeshConfig(data=1, fsdp=4))


@pytest.fixture(scope="module")
def tensor_parallel():
    return accounted(MeshConfig(data=1, tensor=4), remat="none")


def test_full_sharding_gathers_weights_twice_and_scatters_gradients_once(fully_sharded):
    sent = sum(sent_bytes(fully_sharded).values())
    assert sent == pytest.approx(3 * 2 * WEIGHTS * 3 / 4, rel=0.1)
    assert {axes for _, axes in sent_bytes(fully_sharded)} == {("fsdp",)}


def test_parts_of_128_columns_are_scattered_too():
    found = accounted(MeshConfig(data=1, fsdp=8), topology="v5e:2x4")
    assert sum(sent_bytes(found).values()) == pytest.approx(3 * 2 * WEIGHTS * 7 / 8, rel=0.1)


def test_weights_of_all_layers_are_not_kept_rounded_beside_themselves():
    text, _ = compiled(MeshConfig(data=1, fsdp=4), remat="none")
    ours = f"[{LAYERS},{WIDTH // 4},{4 * WIDTH}]"
    assert f"f32{ours}" in text
    assert f"bf16{ours}" not in text


def test_tensor_parallelism_reduces_activations_four_times_a_layer(tensor_parallel):
    """And twice more: what the table of words gives, and the gradient that logits give back."""
    activations = 2 * ROWS * LENGTH * WIDTH
    sent = sum(sent_bytes(tensor_parallel).values())
    assert sent == pytest.approx((8 * LAYERS + 4) * activations * 3 / 4, rel=0.1)
    assert {axes for _, axes in sent_bytes(tensor_parallel)} == {("tensor",)}


def test_recomputed_layers_reduce_one_more_activation():
    """What attention gives; nothing needs what the feed-forward gives again."""
    activations = 2 * ROWS * LENGTH * WIDTH
    found = accounted(MeshConfig(data=1, tensor=4), remat="full")
    sent = sum(sent_bytes(found).values())
    assert sent == pytest.approx((10 * LAYERS + 4) * activations * 3 / 4, rel=0.03)


def test_matmuls_are_those_of_the_mathematics_and_the_chosen_recomputation(
    fully_sharded, tensor_parallel
):
    """A step multiplies three times forward; recomputed layers but for their last product, whose
    result nothing needs, make it four. Attention is over all pairs where it is plain matmuls."""
    tokens, table = ROWS * LENGTH / 4, 384 * WIDTH
    attention = LAYERS * 2 * LENGTH * WIDTH
    forward = 2 * tokens * (WEIGHTS + attention)
    head = 2 * tokens * table
    assert tensor_parallel.matmul_flops == pytest.approx(3 * (forward + head), rel=0.03)
    recomputed = forward - 2 * tokens * LAYERS * 4 * WIDTH**2
    assert fully_sharded.matmul_flops == pytest.approx(3 * (forward + head) + recomputed, rel=0.03)


def test_no_collective_moves_whole_activations_or_logits(fully_sharded, tensor_parallel):
    """Nothing larger than the largest weight of a layer, which the compiler pads a little; of
    logits there are only sums."""
    largest = max(array.bytes for one in fully_sharded.collectives for array in one.arrays)
    assert largest <= 1.05 * 2 * 4 * WIDTH**2
    logits = {(ROWS, LENGTH, 384), (ROWS * LENGTH, 384)}
    for one in (*fully_sharded.collectives, *tensor_parallel.collectives):
        assert logits.isdisjoint(array.shape for array in one.arrays)


def test_the_program_is_as_long_for_96_layers_as_for_12():
    narrow = {"hidden_size": 128, "intermediate_size": 256}
    few, many = (
        accounted(MeshConfig(data=1, fsdp=4), num_layers=layers, **narrow) for layers in (12, 96)
    )
    # Which copies are fetched ahead is the compiler's choice.
    assert many.num_instructions == pytest.approx(few.num_instructions, rel=0.05)
    assert not few.unknown and not many.unknown
