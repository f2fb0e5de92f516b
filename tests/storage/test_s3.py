"""Patching orbax for s3://, without a cloud."""

from __future__ import annotations

import pytest
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from flax_transformers.errors import UserError
from flax_transformers.storage.s3 import patch_orbax


@pytest.fixture
def orbax(monkeypatch):
    """Orbax as it was before the test, and after it."""
    for module, name in (
        (tensorstore_utils, "_use_gcs_driver"),
        (tensorstore_utils, "_normalize_path"),
        (gcs_utils, "get_kvstore_for_gcs"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    patch_orbax.cache_clear()
    yield monkeypatch
    patch_orbax.cache_clear()


def spec(path):
    return tensorstore_utils.build_kvstore_tspec(path, use_ocdbt=True)["base"]


def test_arrays_in_s3_are_handed_to_its_driver_and_others_as_before(orbax, tmp_path):
    local, cloud = spec(str(tmp_path)), spec("gs://bucket/run/state")
    with pytest.raises(ValueError, match="should be absolute"):
        spec("s3://bucket/run/state")
    orbax.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    patch_orbax()
    found = spec("s3://bucket/run/state/")
    assert (found["driver"], found["bucket"], found["path"]) == ("s3", "bucket", "run/state")
    assert found["endpoint"] == "http://127.0.0.1:1"
    assert (spec(str(tmp_path)), spec("gs://bucket/run/state")) == (local, cloud)


def test_an_orbax_without_these_functions_is_refused(orbax):
    orbax.delattr(tensorstore_utils, "_use_gcs_driver")
    with pytest.raises(UserError, match="cannot write to s3://"):
        patch_orbax()
