"""Specifications of accelerators from data sheets, per JAX device."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

from flax_transformers import ranges
from flax_transformers.errors import UserError

TERA = 1e12
GIGA = 1e9
_FRACTION = ranges.numbers(0, 100, above=True)  # above 1 with unified memory


@dataclass(frozen=True)
class DeviceSpec:
    """Specification of one device. Rates are peak rates."""

    kind: str
    """Whole words of ``jax.Device.device_kind``."""
    peak_flops: float
    """Dense bfloat16 FLOP/s."""
    memory_gib: float
    """Memory as reported by libtpu 0.0.52 on TPUs, which programs can use. On GPUs the total that
    the CUDA driver reports to programs, which is less than nvidia-smi's; JAX uses a part of it."""
    memory_bandwidth: float
    """Bytes/s."""
    ring_bandwidth: float
    """Bytes/s that a device sends in a ring along one mesh axis: two links of a TPU's torus, one in
    each direction, or a GPU's NVLink in one direction."""
    network_bandwidth: float
    """Bytes/s to other slices, or through a GPU's own adapter to other hosts of GPUs."""

    @property
    def is_gpu(self) -> bool:
        return not self.kind.startswith("TPU")

    @property
    def available_bytes(self) -> int:
        """Memory for programs. Raises UserError for a fraction that is no number above 0."""
        return int(self.memory_gib * 2**30 * (_gpu_fraction() if self.is_gpu else 1))


# The first entry whose words ``device_kind`` has is used. JAX calls the
# v5p "TPU v5" and the v5e "TPU v5 lite"; a TPU7x chip (2,307 TFLOP/s) is two JAX devices.
# Sources: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x (the network of v4,
# which is not given there, as that of v5p);
# NVIDIA's data sheets of the A100, H100, GH200, H200 and B200, with one 400 Gbit/s adapter (A100:
# 200) for each GPU. Memory of GPUs: device_memory_size of XLA's target_config/specs, and for the
# H100 NVL, H200 and GH200 the total that CUDA gives to PyTorch and other programs.
_V5E = (197 * TERA, 15.75, 819 * GIGA, 100 * GIGA, 3.125 * GIGA)
_V5P = (459 * TERA, 95.73, 2765 * GIGA, 200 * GIGA, 6.25 * GIGA)
_V6E = (918 * TERA, 31.24, 1638 * GIGA, 200 * GIGA, 12.5 * GIGA)
_B200 = (8000 * GIGA, 900 * GIGA, 50 * GIGA)
DEVICE_SPECS = (
    DeviceSpec("TPU v4 lite", 138 * TERA, 7.75, 614 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("TPU v4", 275 * TERA, 30.75, 1228 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("TPU v5 lite", *_V5E),
    DeviceSpec("TPU v5e", *_V5E),
    DeviceSpec("TPU v5", *_V5P),
    DeviceSpec("TPU v5p", *_V5P),
    DeviceSpec("TPU v6", *_V6E),
    DeviceSpec("TPU v6e", *_V6E),
    DeviceSpec("TPU7x", 2307 / 2 * TERA, 94.74, 7380 / 2 * GIGA, 100 * GIGA, 6.25 * GIGA),
    DeviceSpec("GB200", 2500 * TERA, 184.3, *_B200),
    DeviceSpec("B200", 2250 * TERA, 178.3, *_B200),
    DeviceSpec("GH200 480GB", 989 * TERA, 94.5, 4000 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("GH200 144G", 989 * TERA, 142.5, 4900 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("H200 NVL", 836 * TERA, 139.7, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("H200", 989 * TERA, 139.7, 4800 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("H100 NVL", 835 * TERA, 93.0, 3900 * GIGA, 300 * GIGA, 50 * GIGA),
    DeviceSpec("H100 PCIe", 756 * TERA, 79.1, 2000 * GIGA, 300 * GIGA, 50 * GIGA),
    DeviceSpec("H100", 989 * TERA, 79.1, 3350 * GIGA, 450 * GIGA, 50 * GIGA),
    DeviceSpec("A100-SXM4-40GB", 312 * TERA, 39.4, 1555 * GIGA, 300 * GIGA, 25 * GIGA),
    DeviceSpec("A100-PCIE-40GB", 312 * TERA, 39.4, 1555 * GIGA, 300 * GIGA, 25 * GIGA),
    DeviceSpec("A100", 312 * TERA, 79.2, 2039 * GIGA, 300 * GIGA, 25 * GIGA),
)


def _gpu_fraction() -> float:
    """The part of a GPU's memory that JAX gives to programs."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if text := os.environ.get(name):
            try:
                share = float(text)
            except ValueError:
                share = math.nan
            if fault := _FRACTION.fault(share):
                raise UserError(f"{name} is {ranges.shown(text)}; {fault}, or unset it")
            return share
    return 0.75  # JAX's default


def device_spec(device_kind: str) -> DeviceSpec | None:
    """The specification of a ``jax.Device.device_kind``, or None if it is unknown or a MIG slice of
    a GPU."""

    def has(words: str) -> bool:
        return re.search(rf"\b{re.escape(words)}\b", device_kind, re.IGNORECASE) is not None

    return None if has("MIG") else next((spec for spec in DEVICE_SPECS if has(spec.kind)), None)
