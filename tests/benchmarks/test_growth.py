"""The exponents that ``benchmarks/growth.py`` fits."""

import importlib.util
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "benchmarks/growth.py"


@pytest.fixture(scope="module")
def growth():
    spec = importlib.util.spec_from_file_location("growth", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_exponent_of_a_power_is_found(growth):
    values = [1.0, 2.0, 8.0]
    assert growth.exponent(values, [3 * value**1.5 for value in values]) == pytest.approx(1.5)


def test_a_row_has_the_exponent_over_all_values_and_of_the_last_two(growth, tmp_path):
    amounts = {1: 1.0, 2: 1.0, 4: 4.0}  # constant, and then squared
    rows = [
        {"axis": "depth", "value": value, **dict.fromkeys(growth.QUANTITIES, amount)}
        for value, amount in amounts.items()
    ]
    *_, line = growth.table(rows).splitlines()
    assert line.startswith("| depth | 1 to 4 | 1.00 / 2.00 |")
    growth.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
