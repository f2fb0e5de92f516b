"""``flax-transformers train``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from flax_transformers.cli.parsing import Flag, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import parse_integer

if TYPE_CHECKING:  # the command line answers --help without waiting for jax
    from flax_transformers.training.config import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a model, or resume a run from its newest checkpoint.

    Any field of the config can be set, as in --optimizer.learning-rate 3e-4; "train CONFIG --help"
    lists all of them.
    """

    config: Positional[Annotated[str | None, option("CONFIG")]] = None
    """A recipe's name, such as bert_tiny, or a config file.

    Without it, the run in the workdir resumes.
    """
    workdir: Annotated[str | None, option("DIR")] = None
    """Folder or bucket for all files of the run."""
    print_config: Flag = False
    """Print the resolved config and stop."""
    profile: Annotated[str | None, option("FIRST:LAST")] = None
    """Trace these steps, into profile/ of the workdir (TensorBoard, xprof, Perfetto)."""
    dump_hlo: Annotated[str | None, option("DIR")] = None
    """Write the training step to this folder as text, lowered and compiled."""

    def run(self, overrides: Sequence[str]) -> int:
        from flax_transformers.config_json import to_json

        config = self._config(overrides)
        if self.print_config:
            print(json.dumps(to_json(config), indent=2))
            return 0
        if self.workdir is None:
            raise UserError("--workdir is missing; name a folder for checkpoints and metrics")
        profile = _steps(self.profile)

        from flax_transformers import run as runs
        from flax_transformers.monitoring.profiling import Profiling
        from flax_transformers.parallel.distributed import PREEMPTED

        with self._naming_paths(config):
            outcome = runs.train(
                config,
                self.workdir,
                overrides=overrides,
                profiling=Profiling(profile, self.dump_hlo),
            )
        return PREEMPTED if outcome.preempted else 0

    @contextlib.contextmanager
    def _naming_paths(self, config: TrainConfig) -> Iterator[None]:
        """Errors name the option of a missing path, or say that a saved path is relative."""
        from flax_transformers.cli.config_file import missing_paths, naming_options

        if self.config is not None:
            with naming_options(config):
                yield
            return
        try:
            yield
        except UserError as error:
            missing = missing_paths(config)
            name, path = next((m for m in missing if not os.path.isabs(m[1])), (None, ""))
            if name is None:
                raise
            raise UserError(
                f"{error} (the saved config has the relative path {path!r}, which is not in "
                f"{os.getcwd()}: start the command in the folder where the run was started, or set "
                f"--{name})"
            ) from error

    def _config(self, overrides: Sequence[str]) -> TrainConfig:
        """The config of the file, or of the run whose newest checkpoint is in the workdir."""
        from flax_transformers.cli.config_file import load_config

        if self.config is not None:
            return load_config(self.config, overrides)
        if self.workdir is None:
            raise UserError(
                "CONFIG is missing; name a config file, or the --workdir of a run to resume"
            )

        from flax_transformers import runtime
        from flax_transformers.checkpointing.manager import find_checkpoint
        from flax_transformers.checkpointing.step_directories import has_checkpoint
        from flax_transformers.restore import saved_config
        from flax_transformers.storage.workdir import open_workdir

        runtime.start(None)
        if not has_checkpoint(open_workdir(self.workdir)):
            raise UserError(
                f"--workdir {self.workdir} holds no checkpoint to resume from; name the CONFIG of "
                "the run"
            )
        config = saved_config(find_checkpoint(self.workdir))
        if config is None:
            raise UserError(
                f"--workdir {self.workdir} holds converted weights and no run to resume; name a "
                f"CONFIG and another --workdir, and start from the weights with --init-from "
                f"{self.workdir}"
            )
        return override(config, overrides)


def _steps(text: str | None) -> tuple[int, int] | None:
    """The first and the last step of ``FIRST:LAST``."""
    if text is None:
        return None
    first, last = (parse_integer(part) for part in text.partition(":")[::2])
    if first is None or last is None or not 1 <= first <= last:
        raise UserError(
            f"--profile {text} names no steps; give the first and the last, as in 10:15"
        )
    return first, last
