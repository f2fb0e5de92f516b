"""Model FLOPs utilisation (MFU): how much of a chip's peak goes into the model's own mathematics.

The convention, used wherever this package says MFU (after PaLM, arXiv:2204.02311 §4.1 and
appendix B, with the two refinements at the end):

- Only matrix multiplications count, a multiply and an add being 2 FLOPs. Norms, activations,
  softmax, dropout, the optimizer and embedding look-ups count nothing.
- Forward and backward together cost three forwards: a weight of a matmul costs 6 FLOPs for each
  token that passes through it.
- Attention scores and their weighted sum of values each cost 2 FLOPs per query, key and unit of
  width forward: 12 with the backward pass.
- What is computed twice (rematerialisation) counts once.
- Refinement 1: causal attention counts half, since the mathematics needs half of the pairs,
  whether or not a kernel skips the others.
- Refinement 2: a weight counts for the tokens that need it. Logits for masked positions only cost
  6 FLOPs per weight and *masked* position; a router's unused experts cost nothing.

Peaks are dense bfloat16 peaks from the makers' data sheets, for one device as JAX counts devices.
"""

from __future__ import annotations

TERA = 1e12

# Looked up in this order: a kind is the first whose name occurs in ``device_kind``. JAX calls the
# v5p "TPU v5" and the v5e "TPU v5 lite"; a TPU7x chip (2,307 TFLOP/s) is two JAX devices.
PEAK_FLOPS_PER_SECOND: dict[str, float] = {
    "TPU v4 lite": 138 * TERA,
    "TPU v4": 275 * TERA,
    "TPU v5 lite": 197 * TERA,
    "TPU v5e": 197 * TERA,
    "TPU v5": 459 * TERA,
    "TPU v6": 918 * TERA,
    "TPU7x": 2307 / 2 * TERA,
    "GB200": 2500 * TERA,
    "B200": 2250 * TERA,
    "H200 NVL": 836 * TERA,
    "H200": 989 * TERA,
    "H100 NVL": 835 * TERA,
    "H100 PCIe": 756 * TERA,
    "H100": 989 * TERA,
    "A100": 312 * TERA,
}


def peak_flops_per_second(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, from ``jax.Device.device_kind``; None where not known."""
    kind = device_kind.lower()
    return next(
        (peak for name, peak in PEAK_FLOPS_PER_SECOND.items() if name.lower() in kind), None
    )


def mfu(
    flops_per_step: float, step_time_s: float, device_kind: str, n_devices: int
) -> float | None:
    """The fraction of all devices' peak that the model's FLOPs use; None where no peak is known.

    ``flops_per_step`` are those of the whole global batch, ``n_devices`` the devices it runs on.
    """
    peak = peak_flops_per_second(device_kind)
    if peak is None or step_time_s <= 0:
        return None
    return flops_per_step / (step_time_s * peak * n_devices)


def transformer_matmul_flops(
    *,
    tokens: int,
    matmul_parameters: int,
    num_layers: int,
    attention_width: int,
    key_length: int,
    causal: bool,
    head_tokens: int = 0,
    head_parameters: int = 0,
) -> float:
    """FLOPs of one training step, forward and backward, by the convention above.

    ``tokens``: positions that pass through the layers, over the whole batch.
    ``matmul_parameters``: weights of the layers' matmuls; no biases, norms or embedding tables.
    ``attention_width``: query heads times head width. ``key_length``: positions that a query may
    look at: the sequence length, or the window where that is shorter.
    ``head_tokens``, ``head_parameters``: positions that get logits, and the weights of the
    unembedding (tied or not) with its transform.

    A model whose layers differ, or that has two stacks, is a sum over calls.
    """
    weights = 6 * (tokens * matmul_parameters + head_tokens * head_parameters)
    attention = 12 * tokens * key_length * attention_width * num_layers
    return weights + attention * (0.5 if causal else 1.0)
