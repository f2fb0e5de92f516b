"""The table of chips."""

import pytest

from flax_transformers.errors import UserError
from flax_transformers.monitoring.device_specs import device_spec


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


@pytest.mark.parametrize(
    "device_kind",
    [
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    ],
)
def test_other_gpus_of_similar_names_and_slices_are_unknown(device_kind):
    assert device_spec(device_kind) is None


@pytest.mark.parametrize(
    ("device_kind", "total"),
    [
        ("NVIDIA A100-SXM4-80GB", 85_100_068_864),
        ("NVIDIA A100-SXM4-40GB", 42_331_013_120),
        ("NVIDIA H100 80GB HBM3", 84_942_979_072),
        ("NVIDIA H200", 139.8 * 2**30),
        ("NVIDIA GH200 480GB", 94.5 * 2**30),
        ("NVIDIA GH200 144G HBM3e", 153_008_209_920),
        ("NVIDIA B200", 191_514_411_008),
        ("NVIDIA GB200", 197_897_748_480),
    ],
)
def test_memory_is_the_total_that_cuda_reports_for_the_gpu(device_kind, total):
    assert device_spec(device_kind).memory_gib * 2**30 == pytest.approx(total, rel=2e-3)


def test_a_cpu_and_an_unknown_accelerator_are_no_chips():
    assert device_spec("cpu") is None
    assert device_spec("NVIDIA Something Else") is None


FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@pytest.fixture
def no_fraction(monkeypatch):
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", FRACTIONS)
def test_programs_get_a_fraction_of_the_memory_of_a_gpu(no_fraction, monkeypatch, name):
    whole = 79.1 * 2**30
    assert device_spec("NVIDIA H100 80GB HBM3").available_bytes == int(0.75 * whole)
    monkeypatch.setenv(name, "0.9")
    assert device_spec("NVIDIA H100 80GB HBM3").available_bytes == int(whole * 0.9)
    assert device_spec("TPU v5e").available_bytes == 15.75 * 2**30


@pytest.mark.parametrize("value", ["0", "-1", "nan", "most"])
def test_a_fraction_of_memory_that_is_no_share_is_refused(no_fraction, monkeypatch, value):
    monkeypatch.setenv(FRACTIONS[0], value)
    with pytest.raises(UserError, match=f"^XLA_CLIENT_MEM_FRACTION is '{value}'; .*, or unset it$"):
        _ = device_spec("NVIDIA A100-SXM4-80GB").available_bytes
