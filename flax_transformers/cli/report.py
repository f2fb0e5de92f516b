"""``flax-transformers report``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional

from flax_transformers.cli.parsing import option, refuse_arguments
from flax_transformers.errors import UserError


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs and sweeps, which needs no network.

    It has the curves of all runs in the same charts with their baselines, the last scores, the
    differences of the configs, samples, pictures, reports of classes, and the tables of sweeps.
    """

    runs: Positional[Annotated[tuple[str, ...], option("RUN", "Workdirs of runs or of sweeps.")]]
    output: Annotated[str, option("FILE")] = "report.html"
    """The file to write."""

    def run(self, overrides: Sequence[str]) -> int:
        from etils import epath

        from flax_transformers.reporting.page import page
        from flax_transformers.reporting.runs import read
        from flax_transformers.storage.workdir import write_text

        refuse_arguments(overrides)
        if not self.runs:
            raise UserError("RUN is missing; give the workdir of at least one run or sweep")
        write_text(epath.Path(self.output), page(*read(self.runs)))
        print(self.output)
        return 0
