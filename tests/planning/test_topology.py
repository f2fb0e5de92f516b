"""Names of topologies."""

from __future__ import annotations

import pytest

from flax_transformers.planning.topology import with_grid


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("v4-8", "v4:2x2x1"), ("v5p-16", "v5p:2x2x2"), ("v5p-64", "v5p:2x4x4"),
        ("v5p-256", "v5p:4x4x8"), ("v5p-2048", "v5p:8x8x16"), ("v5litepod-16", "v5e:4x4"),
        ("v5e-8", "v5e:2x4"), ("v6e-256", "v6e:16x16"), ("2xv5e-64", "2xv5e:8x8"),
        ("v5e:4x8", "v5e:4x8"), ("h100:8", "h100:8"),
        ("v5p-24", "v5p-24"), ("v3-8", "v3-8"),  # refused as they are
    ],
)  # fmt: skip
def test_slices_of_google_cloud_have_the_grids_of_its_tables(name, grid):
    assert with_grid(name) == grid
