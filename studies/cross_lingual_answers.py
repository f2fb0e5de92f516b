"""A multilingual model, taught to answer in English, answers in other languages (XQuAD).

Command:   flax-transformers sweep studies/cross_lingual_answers.py \\
               --workdir runs/cross_lingual_answers
Data:      the texts of cross_lingual.py, and XQuAD (arXiv:1910.11856, CC BY-SA 4.0) in data/xquad:
           xquad.{en,de,es,ro}.json.gz, the same 1,190 questions in four languages
Hardware:  2 CPU cores, 39 minutes on one of them (measured while jobs ran on the other)
Result:    docs/results/cross_lingual_answers.md: no model of this size learns to answer
Size:      2 variants x 3 seeds, a ModernBERT of 2 layers, 128 wide: 1,200 steps of pretraining, 600
           on questions

The pretraining of cross_lingual.py. Each model is then fine-tuned on the English questions about 36
of the 48 articles and scored by the F1 of answers about the other 12. ``eval/others/f1``, of those
in German, Spanish and Romanian, ranks the models; the score of one language is ``--metric
eval/de/f1`` and so on, that of English ``--metric eval/en/f1``.
"""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cross_lingual
from etils import epath

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.storage.workdir import write_text
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import TrainConfig

XQUAD = "data/xquad/xquad.{}.json.gz"
OTHERS = ("de", "es", "ro")
TRAINING_ARTICLES, STEPS = 36, 600


def articles(language: str) -> list[Any]:
    return json.loads(gzip.decompress(Path(XQUAD.format(language)).read_bytes()))["data"]


def question_files(folder: epath.Path) -> dict[str, str]:
    """The path of the training questions, and those of the test questions of each language."""
    english, *others = [articles(language) for language in ("en", *OTHERS)]
    test = [language[TRAINING_ARTICLES:] for language in (english, *others)]
    sets = {
        "train": english[:TRAINING_ARTICLES],
        **dict(zip(("en", *OTHERS), test, strict=True)),
        "others": [article for language in test[1:] for article in language],
    }
    paths = {name: folder / f"{name}.json" for name in sets}
    for name, path in paths.items():
        if not path.exists():
            write_text(path, json.dumps({"data": sets[name]}))
    return {name: str(path) for name, path in paths.items()}


def fine_tune(config: TrainConfig, workdir: str) -> TrainConfig:
    """The fine-tuning of cross_lingual.py, on questions."""
    files = question_files(epath.Path(workdir).parent)
    tagging: Any = cross_lingual.fine_tune(config, workdir)
    return replace(
        tagging,
        model=replace(config.model, architecture="ModernBertForQuestionAnswering", dropout=0.1),
        objective=QuestionAnswering(doc_stride=64, max_question_length=40),
        data=replace(
            tagging.data,
            source=QuestionSource(files.pop("train")),
            validation_source=QuestionSource(files["en"]),
        ),
        optimizer=replace(tagging.optimizer, learning_rate=1e-3),
        phases=(replace(tagging.phases[0], steps=STEPS, sequence_length=128),),
        checkpoints=replace(tagging.checkpoints, every_steps=STEPS),
        evaluation=replace(
            tagging.evaluation,
            sets=tuple(EvaluationSet(name, QuestionSource(path)) for name, path in files.items()),
        ),
    )


def get_study() -> Study:
    study = cross_lingual.get_study()
    return replace(
        study,
        variants={name: study.variants[name] for name in ("multilingual", "untrained")},
        metric="eval/others/f1",
        fine_tune=fine_tune,
        published=(
            "F1 of answers after fine-tuning multilingual BERT on SQuAD in English: 83.5 in "
            "English, 70.6 in German, 75.5 in Spanish"
        ),
        citation=(
            "Artetxe et al., On the cross-lingual transferability of monolingual representations, "
            "arXiv:1910.11856, and Hu et al., XTREME, arXiv:2003.11080"
        ),
        expected=(("multilingual", "untrained"),),
    )
