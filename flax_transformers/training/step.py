"""One training step and one evaluation step, as pure functions.

The loss of a step is, over the whole global batch, the sum over terms of
``coefficient * total(sum) / total(weight)``. Weights depend on the data alone, so each micro-batch
and each device divides by the same totals and the result does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from flax_transformers.errors import UserError
from flax_transformers.monitoring.throughput import StepReport, Sums
from flax_transformers.objectives.base import Batch, LossTerms, ModelFunctions, Objective, Params
from flax_transformers.optim.ema import EMAConfig, renew_average
from flax_transformers.optim.finite import is_finite
from flax_transformers.optim.guarded import Updated, choose, guarded_update
from flax_transformers.optim.selection import joined, merge, partition
from flax_transformers.optim.spike_detection import is_spike, renewed_mean
from flax_transformers.parallel.partitioning import gradients_reduced_in
from flax_transformers.parallel.rules import RULES, batch_sharding, replicated
from flax_transformers.training.state import TrainState


def model_functions(model: nn.Module) -> ModelFunctions:
    """The halves of a Linen model as pure functions of parameters."""

    def head(name: str, params: Params, rngs: Any, *arrays: Any, **inputs: Any) -> Any:
        return model.apply(
            {"params": params},
            *arrays,
            **inputs,
            deterministic="dropout" not in rngs,
            rngs=rngs,
            method=name,
        )

    def hidden_states(params: Params, batch: Batch, rngs: Any) -> Any:
        inputs = {name: batch[name] for name in model.inputs if name in batch}
        return head("hidden_states", params, rngs, **inputs)

    def unembedding(params: Params, hidden: jax.Array) -> Any:
        return model.apply({"params": params}, hidden, method="unembedding")

    return ModelFunctions(hidden_states, unembedding, head)


def check_fits(objective: Objective, model: nn.Module) -> None:
    """Raises UserError if the model lacks what the objective needs, or needs what it lacks."""
    needs, config = objective.needs, model.config
    name, architecture = type(objective).__name__, config.architecture or type(model).__name__
    lacking = [head for head in needs.heads if not hasattr(model, head)]
    lacking += [given for given in needs.inputs if given not in model.inputs]
    if lacking:
        raise UserError(
            f"objective {name} needs {lacking[0]}, which {architecture} does not have; choose "
            "another model.architecture, or another objective"
        )
    takes_targets = "decoder_input_ids" in model.inputs and "unembed" in needs.heads
    if takes_targets and "decoder_input_ids" not in needs.inputs:
        raise UserError(
            f"objective {name} gives no targets to the decoder of {architecture}; choose an "
            "objective for encoder-decoders, such as SpanCorruption"
        )
    causal = getattr(config, "causal", None)
    if needs.causal is not None and causal is not needs.causal:
        sees = "sees only what came before" if needs.causal else "sees both ways"
        raise UserError(
            f"objective {name} is for a model that {sees}, and {architecture} does not; choose "
            "another model, or another objective"
        )


def make_train_step(
    objective: Objective,
    functions: ModelFunctions,
    optimizer: optax.GradientTransformation,
    micro_batches: int,
    *,
    frozen: tuple[str, ...] = (),
    of_model: Callable[[Params], Params] = lambda params: params,
    ema: EMAConfig | None = None,
    gradient_reduce_dtype: str = "float32",
    skip_spikes_above: float | None = None,
    with_module_norms: bool = False,
    in_place: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepReport]]:
    """The step ``(state, batch) -> (state, report)``, not yet compiled.

    A step is skipped, and changes only the counters, if its gradients are not finite, if their norm
    is more than ``skip_spikes_above`` times its mean, or if what it would change would not be
    finite. The learning rate follows the number of updates made. ``frozen``: patterns of
    parameters that do not change. ``of_model`` merges adapters into the parameters; ``ema`` renews
    the average. ``with_module_norms``: report `module_norms`. ``in_place``: see `guarded_update`.
    """
    update = partial(_updated, optimizer, frozen, ema)
    terms_of, parts = _terms_and_parts(objective, micro_batches)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepReport]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        old = state.params, state.model_state

        def terms(part: Any, batch: Batch, rngs: Any) -> LossTerms:
            return terms_of(functions, of_model(joined(*merge(part, old))), batch, rngs)

        with gradients_reduced_in(gradient_reduce_dtype):
            changing, _ = partition(old, frozen)
            (grads, movement), sums = _gradients(terms, changing, batch, key, parts)
        moved = _moved(state.model_state, movement, micro_batches)
        grad_norm = optax.tree.norm(grads)
        usable, updates_made = jnp.isfinite(grad_norm), state.step - state.skipped
        if skip_spikes_above is not None:
            usable &= ~is_spike(grad_norm, state.norm_mean, updates_made, skip_spikes_above)
        if with_module_norms:
            sums |= module_norms("grad_norm", grads) | module_norms("param_norm", state.params)
        updated, update_is_finite = guarded_update(
            update, state, (grads, moved), usable, in_place=in_place
        )
        usable &= update_is_finite
        params, opt_state, average = updated
        mean = renewed_mean(grad_norm, state.norm_mean, updates_made)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~usable,
            consecutive_skips=jnp.where(usable, 0, state.consecutive_skips + 1),
            ema=average,
            norm_mean=choose(usable, mean, state.norm_mean),
            model_state=choose(usable, moved, state.model_state),
        )
        report = StepReport(
            sums=choose(usable, sums, jax.tree.map(jnp.zeros_like, sums)),
            grad_norm=grad_norm,
            skipped=new_state.skipped,
            consecutive_skips=new_state.consecutive_skips,
            update_is_finite=update_is_finite,
            updates=new_state.step - new_state.skipped,
            tokens=real_tokens(batch),
        )
        return new_state, report

    return train_step


def module_norms(name: str, tree: Params) -> Sums:
    """The norm of the arrays of each module, as metric ``optimizer/name/PATH``. That of a module
    of a stack is of all its layers."""
    modules: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        module = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        modules.setdefault(f"optimizer/{name}/{module}".rstrip("/"), []).append(leaf)
    one = jnp.ones((), jnp.float32)
    return {module: (optax.tree.norm(leaves), one) for module, leaves in modules.items()}


def real_tokens(batch: Batch) -> jax.Array | None:
    """Tokens that the model reads, without padding: the inputs of the encoder and of the decoder.

    None for a batch without ``input_ids``.
    """
    tokens = None
    for prefix in ("", "decoder_"):
        masks = (f"{prefix}segment_ids", f"{prefix}attention_mask", f"{prefix}input_ids")
        given = [batch[name] for name in masks if name in batch]
        if given:  # without a mask, all of them are tokens
            found = given[0] if len(given) > 1 else jnp.ones_like(given[0])
            tokens = jnp.count_nonzero(found) + (0 if tokens is None else tokens)
    return tokens


def _terms_and_parts(
    objective: Objective, micro_batches: int
) -> tuple[Callable[..., LossTerms], int]:
    """The terms, of all micro-batches together for a loss that couples the rows of the batch."""
    whole = getattr(objective, "whole_batch_terms", None)
    if whole is None:
        return objective.terms, micro_batches
    return partial(whole, chunks=micro_batches), 1


def _moved(model_state: Any, movement: Any, micro_batches: int) -> Any:
    """Running statistics after a step: their gradient is what they move by, here summed over
    micro-batches and the applications of their layer. Frozen ones have none and stay."""

    def move(old: jax.Array, by: Any) -> jax.Array:
        return old if isinstance(by, optax.MaskedNode) else old + by / micro_batches

    return jax.tree.map(move, model_state, movement)


def _updated(
    optimizer: optax.GradientTransformation,
    frozen: tuple[str, ...],
    ema: EMAConfig | None,
    state: TrainState,
    changes: tuple[Params, Any],
) -> tuple[Updated, jax.Array]:
    """Parameters, state of the optimizer and average after an update by ``changes``, the gradients
    and the new running statistics; whether all of these are finite."""
    grads, moved = changes
    trained, _ = partition(state.params, frozen)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    trained = optax.apply_updates(trained, updates)
    params, average = merge(trained, state.params), state.ema
    if ema is not None and average is not None:
        updates_made = state.step - state.skipped
        average = renew_average(ema, average, joined(params, moved), updates_made)
    return (params, opt_state, average), is_finite(trained, (opt_state, moved), average)


_TermsOf = Callable[[Params, Batch, Any], LossTerms]
"""The loss terms of ``(params, batch, rngs)``."""


def _gradients(
    terms: _TermsOf,
    params: Any,
    batch: Batch,
    key: jax.Array,
    micro_batches: int,
) -> tuple[Any, Sums]:
    """Gradients of the loss of the whole batch in float32, and its metric sums."""
    if micro_batches == 1:
        return _micro_gradients(terms, params, batch, key, weights=None)

    # Only the weights of this call are used: the compiler drops the model from it.
    whole = terms(params, batch, {})
    weights = {name: weight for name, (_, weight, _) in whole.losses.items()}

    def split(leaf: jax.Array) -> jax.Array:
        # Micro-batch k takes rows k, k + K, ...: each device splits the rows it already has.
        return leaf.reshape(-1, micro_batches, *leaf.shape[1:]).swapaxes(0, 1)

    def accumulate(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        index, micro_batch = numbered
        micro_key = jax.random.fold_in(key, index)
        part = _micro_gradients(terms, params, micro_batch, micro_key, weights)
        return jax.tree.map(jnp.add, total, part), None

    numbered = (jnp.arange(micro_batches), jax.tree.map(split, batch))
    first = jax.eval_shape(
        lambda: _micro_gradients(
            terms, params, jax.tree.map(lambda x: x[0], numbered[1]), key, weights
        )
    )
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    return jax.lax.scan(accumulate, zeros, numbered)[0]


def _micro_gradients(
    terms: _TermsOf,
    params: Params,
    batch: Batch,
    key: jax.Array,
    weights: dict[str, jax.Array] | None,
) -> tuple[Params, Sums]:
    """Gradients and metric sums of one micro-batch; ``weights`` are the whole batch's totals."""

    def loss(params: Params) -> tuple[jax.Array, Sums]:
        found = terms(params, batch, {"dropout": key})
        return total_loss(found, weights), found.metrics

    return jax.grad(loss, has_aux=True)(params)


def total_loss(terms: LossTerms, weights: dict[str, jax.Array] | None = None) -> jax.Array:
    """The scalar that is trained; a term whose total weight is zero contributes nothing."""
    loss = jnp.zeros(())
    for name, (value, weight, coefficient) in terms.losses.items():
        total = weight if weights is None else weights[name]
        mean = value / jnp.where(total == 0, 1.0, total)
        loss += coefficient * jnp.where(total == 0, 0.0, mean)
    return loss


def make_evaluation_step(
    objective: Objective, functions: ModelFunctions
) -> Callable[[Params, Batch], Sums]:
    """The step ``(params, batch) -> metric sums``, without dropout, not yet compiled."""

    def evaluation_step(params: Params, batch: Batch) -> Sums:
        return objective.terms(functions, params, batch, {}).metrics

    return evaluation_step


def compile_train_step(
    step: Callable[..., Any], abstract: TrainState, mesh: Mesh
) -> jax.stages.Wrapped:
    """``step`` under ``jax.jit`` with its shardings; it donates its state.

    Call (or lower) it under ``jax.set_mesh(mesh)``.
    """
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        _with_rules(step),
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=(placed, replicated(mesh)),
        donate_argnums=0,
    )


def compile_evaluation_step(
    step: Callable[..., Any], params: Params, mesh: Mesh, out: NamedSharding | None = None
) -> jax.stages.Wrapped:
    """``step`` under ``jax.jit``, for parameters that lie as ``params`` (abstract or real) do; its
    results lie as ``out`` says, by default on every device."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(
        _with_rules(step),
        in_shardings=(placed, batch_sharding(mesh)),
        out_shardings=out or replicated(mesh),
    )


def _with_rules(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` with the sharding rules in force while it is traced."""

    def ruled(*args: Any) -> Any:
        with nn.logical_axis_rules(RULES):
            return step(*args)

    ruled.__name__ = step.__name__  # the name of the program in traces and dumps
    return ruled
