"""Shapes of the parameters of a model."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.placement import boxed_shapes, names_of_logits
from flax_transformers.testing import tiny_architecture


@dataclass
class PlainConfig:
    """Not frozen, so that a model with it cannot be hashed."""

    width: int


class UserModel(nn.Module):
    config: PlainConfig

    def example_inputs(self) -> dict[str, Any]:
        return {"x": jnp.zeros((1, 2))}

    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        return nn.Dense(self.config.width, use_bias=False)(x)


def test_the_config_of_a_users_model_may_change() -> None:
    config = PlainConfig(4)
    model = UserModel(config)
    assert boxed_shapes(model)["Dense_0"]["kernel"].shape == (2, 4)
    config.width = 8
    assert boxed_shapes(model)["Dense_0"]["kernel"].shape == (2, 8)


def test_logits_do_not_depend_on_the_head_of_values() -> None:
    model = build_model(tiny_architecture("LlamaForCausalLMWithValueHead"))
    assert names_of_logits(model) == {"words", "stack", "final_norm", "lm_head"}
