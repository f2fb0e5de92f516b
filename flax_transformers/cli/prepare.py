"""``flax-transformers prepare``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from flax_transformers.cli.parsing import Config, Flag, option
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog

if TYPE_CHECKING:
    from flax_transformers.data.base import Compare, EvaluationSet
    from flax_transformers.data.config import DataConfig


@dataclass(frozen=True)
class Prepare:
    """Train the tokenizer and write the stores of a config, ahead of training.

    Any field of the config can be set, as in --data.store DIR. At most one of --begin, --shard and
    --verify can be given.
    """

    config: Config
    output: Annotated[str | None, option("DIR")] = None
    """Folder or bucket of the store (default: data.store)."""
    begin: Flag = False
    """Only make what --shard jobs need: the tokenizer, and the list of duplicate documents."""
    shard: Annotated[str | None, option("I/N")] = None
    """Only do the share of job I of N, from 0, such as $SLURM_ARRAY_TASK_ID/100. The last job to
    end finishes the store, and so does the command without --shard."""
    verify: Flag = False
    """Read every byte of a finished store, and of its source if that still exists; also those of
    evaluation sets."""

    def run(self, overrides: Sequence[str]) -> int:
        from flax_transformers.cli.config_file import load_config, naming_options

        if self.begin + self.verify + (self.shard is not None) > 1:
            raise UserError("--begin, --shard and --verify exclude each other; give one of them")
        config = load_config(self.config, overrides)
        watchdog.start(config.limits)
        with watchdog.phase("prepare"), naming_options(config):
            return _prepare(self, config.data, config.evaluation.sets)


def _prepare(arguments: Prepare, data: DataConfig, sets: Sequence[EvaluationSet]) -> int:
    from flax_transformers.data import dataset

    compare: Compare = "content" if arguments.verify else "sizes"
    if arguments.verify:
        data = replace(data, verify=False)  # every file is read below
    if arguments.begin:
        dataset.prepare_common(data, arguments.output)
        print("ready for the --shard jobs; run the command without --shard at the end")
        return 0
    if arguments.shard is not None:
        job, jobs = _job(arguments.shard)
        prepared = dataset.prepare_share(data, arguments.output, job, jobs)
        if prepared is None:
            print(f"share {job}/{jobs} is done; other shares are not")
            return 0
    else:
        prepared = dataset.prepare(data, arguments.output, compare=compare)
    if arguments.output is not None:
        data = replace(data, store=arguments.output)
    of_run = dataset.tokenizers(prepared)
    stores = [prepared]
    for one in sets:
        data_of_set = data.of_evaluation_set(one, prepared.label_names)
        stores.append(dataset.prepare(data_of_set, of_run=of_run, compare=compare))
    if arguments.verify:
        for store in stores:
            store.verify()
        print("every file matches its checksum")
    for store in stores:
        print(store.summary)
        print(f"store: {store.directory}")
    return 0


def _job(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--shard is {text!r}; give the index of the job and the number of jobs, 0/8 to 7/8"
        )
    return int(match[1]), int(match[2])
