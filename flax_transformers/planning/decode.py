"""Ahead-of-time plans of text generation: memory, FLOPs, and a bound on its speed.

The program is the one that ``generate`` runs: the prompts at once, then a loop with one token in
each iteration. Its cost without an iteration is that of the prompts; one iteration adds that of a
token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from flax_transformers.generation import decode, program
from flax_transformers.generation.buckets import bucket
from flax_transformers.generation.loop import Endings, TextLimits
from flax_transformers.generation.sampling import Sampling
from flax_transformers.models.config import EncoderDecoderConfig
from flax_transformers.models.layers.stack import separate_layers
from flax_transformers.monitoring.device_specs import device_spec
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.planning import plan
from flax_transformers.planning.hlo_cost import account
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.setup import make_trainer
from flax_transformers.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Generation of ``new_tokens`` after ``batch`` prompts. FLOPs and bytes are of one device."""

    topology: str
    devices: int
    chip: str
    mesh: dict[str, int]
    batch: int
    prompt_length: int
    new_tokens: int
    parameters: int
    cache: int
    """Bytes for all rows and layers, over all devices; the compiler chooses its sharding."""
    temporaries: int | None
    """With this device's part of the cache; None if the compiler ran out of memory."""
    total: int
    available: int | None
    fits: bool
    prompt_flops: float | None
    token_flops: float | None
    """FLOPs of one new token of each row."""
    token_memory_bytes: float | None
    prompt_roofline: plan.Roofline | None
    token_roofline: plan.Roofline | None
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """An upper bound for all rows together."""
        return None if self.token_roofline is None else self.batch / self.token_roofline.step


def plan_decode(
    config: TrainConfig,
    devices: Sequence[jax.Device],
    topology: str,
    *,
    batch: int,
    prompt_length: int,
    new_tokens: int,
) -> DecodePlan:
    """Compile ``generate`` for ``devices``, which need not be present.

    ``new_tokens`` determines the length of the cache; every token costs the same. Lengths are those
    of the buckets (``generation.buckets``). Raises UserError
    for a model that generates no text, and for more tokens than it has positions.
    """
    mesh = make_mesh(config.mesh, devices)
    trainer = make_trainer(config, mesh)
    lowered = lower_generate(trainer, batch, prompt_length, new_tokens)
    started = time.perf_counter()
    compiled, text, needed = plan.compile_to_text(lowered)
    seconds = time.perf_counter() - started
    chip = device_spec(devices[0].device_kind)
    counted: list[float | None] = [None, None, None]
    at_peak: list[plan.Roofline | None] = [None, None]
    if text is not None:
        shape, hosts = dict(mesh.shape), plan.hosts_of(mesh)
        prompt, both = (account(text, shape, hosts=hosts, unknown_rounds=n) for n in (0, 1))
        flops = plan.flops_of(prompt, config.model), plan.flops_of(both, config.model)
        counted = [flops[0], flops[1] - flops[0], both.memory_bytes - prompt.memory_bytes]
        if chip is not None:
            first = plan.roofline(prompt, flops[0], chip)
            at_peak = [first, plan.roofline(both, flops[1], chip).without(first)]
    found: Any = None if compiled is None else compiled.memory_analysis()
    total, available = needed or 0, None if chip is None else chip.available_bytes
    if found is not None:
        total = found.argument_size_in_bytes + found.temp_size_in_bytes
        total += found.output_size_in_bytes + found.generated_code_size_in_bytes
    return DecodePlan(
        topology=topology,
        devices=mesh.size,
        chip=devices[0].device_kind,
        mesh={name: size for name, size in mesh.shape.items() if size > 1},
        batch=batch,
        prompt_length=prompt_length,
        new_tokens=new_tokens,
        parameters=plan.bytes_on_device(trainer.abstract_params),
        cache=_cache_bytes(trainer, batch, prompt_length, new_tokens),
        temporaries=None if found is None else found.temp_size_in_bytes,
        total=total,
        available=available,
        fits=needed is None and not (available and total > available),
        prompt_flops=counted[0],
        token_flops=counted[1],
        token_memory_bytes=counted[2],
        prompt_roofline=at_peak[0],
        token_roofline=at_peak[1],
        compile_seconds=seconds,
    )


def lower_generate(
    trainer: Trainer, batch: int, prompt_length: int, new_tokens: int
) -> jax.stages.Lowered:
    """``generate``, or ``generate_target``, with greedy decoding, lowered without data."""
    decode.require_settings(new_tokens, Sampling(), None)
    # Under a mesh the arguments of ``generate`` are replicated.
    replicated: Any = partial(
        jax.ShapeDtypeStruct, sharding=NamedSharding(trainer.mesh, PartitionSpec())
    )
    scalar = replicated((), jnp.int32)
    ids = replicated((batch, bucket(prompt_length)), jnp.int32)
    key = replicated((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    limits = TextLimits(Endings(eos=replicated((1,), jnp.int32), pad=scalar), scalar)
    model, params, start = trainer.model, trainer.abstract_params, None
    if program.takes_separate_layers(trainer.mesh.devices.flatten().tolist()):
        params = jax.eval_shape(separate_layers, params)
    if isinstance(model.config, EncoderDecoderConfig):
        longest = max(prompt_length, 1 + new_tokens)
        decode.require_positions(model, longest, f"{longest} tokens")
        start = replicated((1,), jnp.int32)
    else:
        decode.require_writer(model)
        longest = prompt_length + new_tokens
        decode.require_positions(model, longest, f"{longest} tokens of prompt and text")
    with jax.set_mesh(trainer.mesh):
        return program.write.lower(
            model,
            params,
            program.GenerationRequest(ids, ids, limits, key, start),
            settings=program.Settings(bucket(new_tokens), Sampling()),
        )


def _cache_bytes(trainer: Trainer, batch: int, prompt_length: int, new_tokens: int) -> int:
    """Bytes of the cache, including keys and values of cross-attention."""
    model: Any = trainer.model
    new_tokens = bucket(new_tokens)
    ids = jnp.zeros((batch, bucket(prompt_length)), jnp.int32)
    if isinstance(trainer.model.config, EncoderDecoderConfig):
        slots, extra = 1 + new_tokens, {"decoder_input_ids": ids[:, :1]}
    else:
        slots, extra = ids.shape[1] + new_tokens, {}

    def cached(params: Any) -> Any:
        apply = partial(model.apply, {"params": params}, method="hidden_states")
        return apply(ids, jnp.ones_like(ids), cache=model.empty_cache(batch, slots), **extra).cache

    with jax.set_mesh(trainer.mesh):
        leaves = jax.tree.leaves(jax.eval_shape(cached, trainer.abstract_params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
