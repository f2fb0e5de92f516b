"""What accelerators can do, by the makers' data sheets, for one device as JAX counts devices."""

from __future__ import annotations

from dataclasses import dataclass

TERA = 1e12
GIGA = 1e9


@dataclass(frozen=True)
class DeviceSpec:
    """One device. Rates are peaks: what runs is slower.

    ``memory_gib`` is what programs have of the main memory: on TPUs what libtpu 0.0.52 gives them,
    on GPUs all of it (JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says more).
    ``ring_bandwidth``: bytes/s that a device sends in a ring along one axis of a mesh: two links of
    a TPU's torus, one in each direction, or a GPU's NVLink in one direction.
    ``network_bandwidth``: bytes/s to other slices, or to other hosts of GPUs.
    """

    kind: str
    """What occurs in ``jax.Device.device_kind``."""
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    memory_gib: float
    memory_bandwidth: float
    """Bytes/s."""
    ring_bandwidth: float
    network_bandwidth: float


# Looked up in this order: a device is the first whose kind occurs in its ``device_kind``. JAX calls
# the v5p "TPU v5" and the v5e "TPU v5 lite"; a TPU7x chip (2,307 TFLOP/s) is two JAX devices.
# Sources: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x (peaks, bandwidth of
# memory, of links and of the network; v4's network, which is not given there, as the v5p's);
# NVIDIA's data sheets of the A100 80 GB, H100, H200 and B200, with one 400 Gbit/s adapter (A100:
# 200) for each GPU.
_V5E = (197 * TERA, 15.75, 819 * GIGA, 100 * GIGA, 3.125 * GIGA)
_V5P = (459 * TERA, 95.73, 2765 * GIGA, 200 * GIGA, 6.25 * GIGA)
_V6E = (918 * TERA, 31.24, 1638 * GIGA, 200 * GIGA, 12.5 * GIGA)
_B200 = (8000 * GIGA, 900 * GIGA, 50 * GIGA)
CHIPS = (
    DeviceSpec("TPU v4 lite", 138 * TERA, 7.75, 614 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("TPU v4", 275 * TERA, 30.75, 1228 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("TPU v5 lite", *_V5E),
    DeviceSpec("TPU v5e", *_V5E),
    DeviceSpec("TPU v5", *_V5P),
    DeviceSpec("TPU v6", *_V6E),
    DeviceSpec("TPU7x", 2307 / 2 * TERA, 94.74, 7380 / 2 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("GB200", 2500 * TERA, 173.2, *_B200),
    DeviceSpec("B200", 2250 * TERA, 167.6, *_B200),
    DeviceSpec("H200 NVL", 836 * TERA, 131.3, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("H200", 989 * TERA, 131.3, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("H100 NVL", 835 * TERA, 87.5, 3900 * GIGA, 300 * GIGA, 50 * GIGA),
    DeviceSpec("H100 PCIe", 756 * TERA, 74.5, 2000 * GIGA, 300 * GIGA, 50 * GIGA),
    DeviceSpec("H100", 989 * TERA, 74.5, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("A100", 312 * TERA, 74.5, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
)


def device_spec(device_kind: str) -> DeviceSpec | None:
    """The chip of a ``jax.Device.device_kind``; None where it is not known."""
    kind = device_kind.lower()
    return next((chip for chip in CHIPS if chip.kind.lower() in kind), None)
