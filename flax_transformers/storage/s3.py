"""Checkpoints in s3://: orbax (0.12) uses tensorstore for gs:// only, which supports s3:// too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flax_transformers.errors import UserError
from flax_transformers.storage.folders import kvstore_spec

_SCHEME = "s3://"


@functools.cache
def patch_orbax() -> None:
    """Makes orbax hand s3:// paths to tensorstore, as it does with gs:// paths.

    Replaces three private functions of orbax by ones that know this scheme too. Raises UserError if
    orbax does not have them.
    """
    # ruff: noqa: TID251
    try:
        from orbax.checkpoint._src.path import gcs_utils
        from orbax.checkpoint._src.serialization import tensorstore_utils

        uses_driver = tensorstore_utils._use_gcs_driver
        normalize, spec = tensorstore_utils._normalize_path, gcs_utils.get_kvstore_for_gcs
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"this version of orbax cannot write to s3:// ({error}); use the one of "
            "constraints.txt, a gs:// workdir or a local one"
        ) from error

    tensorstore_utils._use_gcs_driver = _for_s3(lambda path: True, uses_driver)
    tensorstore_utils._normalize_path = _for_s3(lambda path: path.rstrip("/"), normalize)
    gcs_utils.get_kvstore_for_gcs = _for_s3(kvstore_spec, spec)


def _for_s3(ours: Callable[[str], Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(path: str, *arguments: Any, **named: Any) -> Any:
        return ours(path) if path.startswith(_SCHEME) else theirs(path, *arguments, **named)

    return chosen
