"""Strong baselines without a model, on the held-out data of a config.

    python -m benchmarks.baselines configs/transformer_tatoeba.py [--section.field value ...]

Prints a line for each: a byte trigram, copying (BART, translation), a dictionary of IBM model 1,
the most frequent tag of each word, the text around the words of a question, and the mean image.
Each is scored on the same examples, and in the same metric, as the model of the config.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from benchmarks.baselines.questions import question_baselines
from benchmarks.baselines.tagging import tagging_baselines
from benchmarks.baselines.text import text_baselines
from benchmarks.baselines.translation import translation_baselines
from flax_transformers.cli.config_file import load_config
from flax_transformers.data.dataset import prepare
from flax_transformers.evaluation.baselines import Baseline
from flax_transformers.evaluation.reconstructions import constant_guess
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.training.config import TrainConfig


def mean_image(config: TrainConfig, prepared: Any) -> list[Baseline]:
    """The error of the mean training image, for masked autoencoders."""
    return [constant_guess(config, prepared, "mean image", lambda mean_TK: mean_TK)]


BASELINES = {
    SequenceToSequence: translation_baselines,
    TokenClassification: tagging_baselines,
    QuestionAnswering: question_baselines,
    MaskedImage: mean_image,
}


def main(path: str, overrides: list[str]) -> None:
    config = load_config(path, overrides)
    config = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, max_examples=None)
    )
    score = BASELINES.get(type(config.objective), text_baselines)
    for name, part in prepare(config.data).components:
        for baseline in score(config, part):
            print((baseline.of_part(name) if name else baseline).line(), flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m benchmarks.baselines CONFIG [--section.field value ...]")
    main(sys.argv[1], sys.argv[2:])
