"""The program of generation that is planned is the one that runs, and counted as a hand counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.generation import program
from flax_transformers.generation.decode import generate
from flax_transformers.generation.translate import generate_target
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.planning.decode import lower_generate, plan_decode
from flax_transformers.planning.topology import devices_of
from flax_transformers.testing import tiny_config
from flax_transformers.training.setup import make_trainer

BATCH, PROMPT, NEW, WIDTH, LAYERS, WORDS = 4, 16, 8, 256, 3, 512
TEXT = {"batch": BATCH, "prompt_length": PROMPT, "new_tokens": NEW}
DECODER = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    num_layers=LAYERS,
    num_heads=4,
    intermediate_size=4 * WIDTH,
    max_positions=64,
)
WHOLE = MeshConfig()
WEIGHTS = LAYERS * 16 * WIDTH**2  # four square ones in attention, three of 4 in the feed-forward


def of_decoder(mesh=WHOLE):
    config = tiny_config("text.txt", "store")
    return dataclasses.replace(
        config, model=DECODER, objective=CausalLM(), mesh=mesh, compute=ComputeConfig("auto")
    )


def planned(topology, mesh=WHOLE, **changes):
    config = of_decoder(mesh)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    return plan_decode(config, devices_of(topology), topology, **TEXT)


def of_encoder_decoder():
    model = dataclasses.replace(
        T5Config(),
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_heads=4,
        intermediate_size=4 * WIDTH,
    )
    return dataclasses.replace(of_decoder(), model=model, objective=SpanCorruption())


def lowered_by(run, trainer, monkeypatch):
    """The program that ``run`` would have compiled, at real arrays."""
    texts, original = [], program.write

    class Lowered(Exception):
        pass

    def lowering(*arguments, **settings):
        texts.append(original.lower(*arguments, **settings).as_text())
        raise Lowered

    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding),
        trainer.abstract.params,
    )
    monkeypatch.setattr(program, "write", lowering)
    with jax.set_mesh(trainer.mesh), pytest.raises(Lowered):
        run(trainer.model, params, np.ones((BATCH, PROMPT)), max_new_tokens=NEW, eos_id=1)
    return texts[0]


@pytest.mark.parametrize(
    ("make", "run"), [(of_decoder, generate), (of_encoder_decoder, generate_target)]
)
def test_the_program_that_is_planned_is_the_one_that_generates(make, run, monkeypatch):
    config = dataclasses.replace(make(), mesh=MeshConfig(data=2, tensor=4))
    trainer = make_trainer(config, make_mesh(config.mesh))
    planned = lower_generate(trainer, BATCH, PROMPT, NEW).as_text()
    assert planned == lowered_by(run, trainer, monkeypatch)


def test_a_token_multiplies_by_each_weight_once_at_any_prompt_length():
    found = planned("cpu:1")
    key = LAYERS * 2 * 2 * BATCH * WIDTH  # of each query, and its value
    scores = key * (PROMPT + NEW)  # that of the token itself is no matrix product
    assert found.token_flops == 2 * BATCH * (WEIGHTS + WORDS * WIDTH) + scores
    weights = 2 * BATCH * (PROMPT * WEIGHTS + WORDS * WIDTH)
    assert found.prompt_flops == weights + PROMPT * PROMPT * key
    slots = BATCH * (PROMPT + NEW)
    assert found.cache == pytest.approx(LAYERS * 2 * slots * WIDTH * 4, rel=0.01)
    assert found.fits and found.tokens_per_second is None  # there is no spec of this device


def test_an_encoder_decoder_keeps_the_prompts_keys_and_multiplies_by_the_decoder_alone():
    found = plan_decode(of_encoder_decoder(), devices_of("cpu:1"), "cpu:1", **TEXT)
    kept = LAYERS * 2 * BATCH * (PROMPT + 1 + NEW) * WIDTH * 4
    assert found.cache == pytest.approx(kept, rel=0.01)
    weights = LAYERS * (6 + 8) * WIDTH**2  # of cross-attention queries and outputs alone
    scores = LAYERS * 2 * 2 * BATCH * WIDTH * (PROMPT + 1 + NEW)
    assert found.token_flops == 2 * BATCH * (weights + WORDS * WIDTH) + scores


WIDE = {"hidden_size": 2048, "intermediate_size": 8192}


@pytest.mark.slow
def test_on_a_tpu_a_token_is_bound_by_memory():
    weights = LAYERS * 16 * 2048**2
    found = planned("v5e:2x2", MeshConfig(data=4), **WIDE)
    assert found.fits and found.token_roofline.bound_by == "memory"
    assert found.tokens_per_second == BATCH / found.token_roofline.step
    # In 16 bits, for the cast stands before the loop; what the chip's own memory keeps is not read.
    assert weights < found.token_memory_bytes < 2.1 * weights


@pytest.mark.full
@pytest.mark.slow
def test_on_a_tpu_tensor_parallelism_divides_the_weights_of_a_token():
    divided = planned("v5e:2x2", MeshConfig(data=1, tensor=4), **WIDE)
    assert divided.token_memory_bytes < 0.3 * LAYERS * 16 * 2048**2
    assert divided.token_roofline.interconnect["tensor"] > 0


def test_a_text_longer_than_the_positions_is_refused():
    config = dataclasses.replace(of_decoder(), model=GPT2Config(max_positions=64))
    with pytest.raises(
        UserError, match="72 tokens of prompt and text are more than the model's 64"
    ):
        plan_decode(config, devices_of("cpu:1"), "cpu:1", batch=1, prompt_length=64, new_tokens=8)
