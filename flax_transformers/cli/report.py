"""``flax-transformers report``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from flax_transformers.cli.parsing import Flag, option, refuse_arguments
from flax_transformers.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from flax_transformers.reporting.attention_charts import AttentionMaps
    from flax_transformers.reporting.runs import ReportedRun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """Write one HTML page about runs and sweeps, which needs no network.

    It has the curves of all runs in the same charts with their baselines, the last scores, the
    differences of the configs, samples, pictures, reports of classes, and the tables of sweeps.
    """

    runs: Positional[Annotated[tuple[str, ...], option("RUN", "Workdirs of runs or of sweeps.")]]
    output: Annotated[str, option("FILE")] = "report.html"
    """The file to write."""
    attention: Flag = False
    """Also restore the newest checkpoint of each run, and show what its heads attend to on held-out
    examples."""

    def run(self, overrides: Sequence[str]) -> int:
        from etils import epath

        from flax_transformers.reporting.page import page
        from flax_transformers.reporting.runs import read
        from flax_transformers.storage.workdir import write_text

        refuse_arguments(overrides)
        if not self.runs:
            raise UserError("RUN is missing; give the workdir of at least one run or sweep")
        runs, sweeps = read(self.runs)
        if self.attention:
            runs = [_with_attention(run) for run in runs]
        write_text(epath.Path(self.output).expanduser(), page(runs, sweeps))
        print(self.output)
        return 0


def _with_attention(run: ReportedRun) -> ReportedRun:
    """``run`` with the attention of its newest checkpoint, or a note that says why not."""
    try:
        maps, step = _newest_attention(run.folder)
    except UserError as error:
        return replace(run, attention_note=f"no attention maps, because {error}")
    except Exception as error:  # of a user's model or data, which need not stop the other runs
        log.warning("no attention maps of %s", run.name, exc_info=True)
        fault = f"{type(error).__name__}: {error}"
        return replace(run, attention_note=f"no attention maps, because of {fault}")
    return replace(run, attention=maps, attention_note=f"step {step:,}")


def _newest_attention(folder: epath.Path) -> tuple[list[AttentionMaps], int]:
    """The maps of the newest checkpoint of a run on held-out examples, and its step."""
    from flax_transformers import runtime
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.data.dataset import open_dataset
    from flax_transformers.evaluation.held_out import held_out_batches
    from flax_transformers.reporting.attention import attention_maps
    from flax_transformers.restore import saved_config

    found = find_checkpoint(folder)
    config = saved_config(found)
    if config is None:
        raise UserError("the checkpoint belongs to no run, and says nothing of its data")
    restored = runtime.restore_model(found)
    tokenizer, target_tokenizer = restored.tokenizer, restored.target_tokenizer
    readers = {"tokenizer": tokenizer, "target_tokenizer": target_tokenizer}
    of_run = {name: reader for name, reader in readers.items() if reader is not None}
    # Opened, not prepared: a report should not start hours of work.
    prepared = runtime.fitted_data(config, open_dataset(config.data, of_run=of_run))
    batch = next(held_out_batches(config, prepared, config.phases[-1].sequence_length), None)
    if batch is None:
        raise UserError("the data has no held-out examples")
    maps = attention_maps(
        restored.model, restored.params, config.objective, batch, tokenizer, target_tokenizer
    )
    return maps, restored.step
