"""A multilingual model, taught names in English, finds names in other languages (mBERT).

Command:   flax-transformers sweep studies/cross_lingual_names.py --workdir runs/cross_lingual_names
Data:      the texts of cross_lingual.py, and of Universal NER (arXiv:2311.09122, CC BY-SA 4.0) in
           data/uner the files en_ewt-ud-dev.iob2.gz and en_ewt-ud-test.iob2.gz to train on, and
           {en_pud,da_ddt,de_pud,sk_snk}-ud-test.iob2.gz
Hardware:  2 CPU cores, 32 minutes on one of them (measured while other jobs ran)
Result:    docs/results/cross_lingual_names.md: hardly any transfer, and not by pretraining
Size:      2 variants x 3 seeds, a ModernBERT of 2 layers, 128 wide: 1,200 steps of pretraining, 800
           on names

The pretraining of cross_lingual.py. Each model is then fine-tuned on the persons, places and
organizations in 4,078 English sentences and scored by the F1 of whole names. That of the 2,626
sentences in Danish, German and Slovak, ``eval/others/entity_f1``, ranks them; the score of one
language is ``--metric eval/da/entity_f1`` and so on, that of other English sentences ``--metric
eval/en/entity_f1``.
"""

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import cross_lingual
from etils import epath

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.storage.workdir import write_text
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import TrainConfig

UNER = "data/uner/{}-ud-{}.iob2.gz"
LANGUAGES = {"en": "en_pud", "da": "da_ddt", "de": "de_pud", "sk": "sk_snk"}


def names_in(path: str) -> TaggedSource:
    return TaggedSource(path, word_column=1, tag_column=2)


def fine_tune(config: TrainConfig, workdir: str) -> TrainConfig:
    """The fine-tuning of cross_lingual.py, on names; the training files become one."""
    english = epath.Path(workdir).parent / "english.iob2"
    if not english.exists():
        files = (Path(UNER.format("en_ewt", split)) for split in ("dev", "test"))
        write_text(english, b"\n".join(gzip.decompress(f.read_bytes()) for f in files).decode())
    tagging: Any = cross_lingual.fine_tune(config, workdir)
    test_files = {name: UNER.format(file, "test") for name, file in LANGUAGES.items()}
    others = UNER.format("[!eh]*", "test")  # en, and hr, which has names of a further kind
    return replace(
        tagging,
        model=replace(tagging.model, num_labels=7),
        data=replace(
            tagging.data,
            source=names_in(str(english)),
            validation_source=names_in(test_files["en"]),
        ),
        evaluation=replace(
            tagging.evaluation,
            sets=tuple(
                EvaluationSet(name, names_in(path))
                for name, path in {**test_files, "others": others}.items()
            ),
        ),
    )


def get_study() -> Study:
    study = cross_lingual.get_study()
    return replace(
        study,
        variants={name: study.variants[name] for name in ("multilingual", "untrained")},
        metric="eval/others/entity_f1",
        fine_tune=fine_tune,
        published=(
            "F1 of names after fine-tuning multilingual BERT on English: 90.7 in English, 69.7 in "
            "German, 73.6 in Spanish, 77.4 in Dutch"
        ),
        citation="Pires et al., How multilingual is Multilingual BERT?, arXiv:1906.01502, table 1",
        expected=(("multilingual", "untrained"),),
    )
