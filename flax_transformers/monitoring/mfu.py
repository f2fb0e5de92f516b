"""Model FLOPs utilisation (MFU): how much of a chip's peak goes into the model's own mathematics.

The convention, used wherever this package says MFU (after PaLM, arXiv:2204.02311 §4.1 and
appendix B, with the two refinements at the end):

- Only matrix multiplications count, a multiply and an add being 2 FLOPs. Norms, activations,
  softmax, dropout, the optimizer and embedding look-ups count nothing.
- Forward and backward together cost three forwards: a weight of a matmul costs 6 FLOPs for each
  token that passes through it.
- Attention scores and their weighted sum of values each cost 2 FLOPs per query, key and unit of
  width forward: 12 with the backward pass.
- A weight that is not trained costs 4: it has no gradient, but passes on that of its output. Below
  everything that is trained nothing is passed on: such a weight costs 2, and attention a third. A
  kernel with low-rank adapters counts as trained.
- What is computed twice (rematerialisation) counts once.
- Refinement 1: causal attention counts half, since the mathematics needs half of the pairs,
  whether or not a kernel skips the others.
- Refinement 2: a weight counts for the tokens that need it. Logits for masked positions only cost
  6 FLOPs per weight and *masked* position; a router's unused experts cost nothing.

Peak FLOPs are those of ``monitoring.device_specs``.
"""

from __future__ import annotations

from flax_transformers.monitoring.device_specs import device_spec


def mfu(
    flops_per_step: float, step_time_s: float, device_kind: str, n_devices: int
) -> float | None:
    """The fraction of all devices' peak that the model's FLOPs use; None where no peak is known.

    ``flops_per_step`` are those of the whole global batch, ``n_devices`` the devices it runs on.
    """
    chip = device_spec(device_kind)
    if chip is None or step_time_s <= 0:
        return None
    return flops_per_step / (step_time_s * chip.peak_flops * n_devices)


def transformer_matmul_flops(
    *,
    tokens: int,
    matmul_parameters: float,
    num_layers: int,
    attention_width: float,
    key_length: float,
    causal: bool,
    head_tokens: int = 0,
    head_parameters: int = 0,
) -> float:
    """FLOPs of one training step, forward and backward, by the convention above.

    ``tokens``: positions that pass through the layers, over the whole batch.
    ``matmul_parameters``: weights of the layers' matmuls; no biases, norms or embedding tables.
    ``attention_width``: query heads times head width. ``key_length``: positions that a query may
    look at: the sequence length, or fewer where there is a window (the mean over layers).
    ``head_tokens``, ``head_parameters``: positions that get logits, and the weights of the
    unembedding (tied or not) with its transform.

    A model whose layers differ, or that has two stacks, is a sum over calls.
    """
    weights = 6 * (tokens * matmul_parameters + head_tokens * head_parameters)
    attention = 12 * tokens * key_length * attention_width * num_layers
    return weights + attention * (0.5 if causal else 1.0)
