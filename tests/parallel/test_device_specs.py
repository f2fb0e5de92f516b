"""The table of chips."""

import pytest

from flax_transformers.parallel.device_specs import device_spec


@pytest.mark.parametrize(
    ("device_kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU v6e", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_peaks_are_found_under_the_names_that_devices_give(device_kind, teraflops):
    assert device_spec(device_kind).peak_flops == teraflops * 1e12


def test_a_cpu_and_an_unknown_accelerator_are_no_chips():
    assert device_spec("cpu") is None
    assert device_spec("NVIDIA Something Else") is None
