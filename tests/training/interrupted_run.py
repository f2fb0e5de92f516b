"""A training run for test_resume.py: ``interrupted_run.py FOLDER WORKDIR STOP``.

Trains 20 steps on FOLDER/text.txt, checkpoints every 7. At step STOP, with the last checkpoint
before it on disk, it kills itself.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.dataset import prepare
from flax_transformers.testing import tiny_config
from flax_transformers.training.config import Evaluation
from flax_transformers.training.loop import Outcome, train_prepared


def run(folder: Path, workdir: Path, stop: int = 20, number: int | None = None) -> Outcome:
    config = dataclasses.replace(
        tiny_config(folder / "text.txt", folder / "store", steps=20),
        checkpoints=CheckpointConfig(every_steps=7, keep_latest=5),
        evaluation=Evaluation(every_steps=stop),
    )

    def interrupt(snapshot):
        if snapshot.step == stop and number is not None:
            while not (workdir / "checkpoints" / str(stop // 7 * 7)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)
        return {}

    return train_prepared(config, prepare(config.data), workdir, [interrupt])


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), signal.SIGKILL)
