"""Bytes against subwords under typing noise (ByT5, arXiv:2105.13626, section 6).

Command:   flax-transformers sweep studies/typing_noise.py --workdir runs/typing_noise
Data:      19 books of Standard Ebooks (CC0) for span corruption, one JSON line per chapter with the
           key paragraphs, in data/standardebooks_en/books.jsonl.gz; and the tags of Universal
           Dependencies English EWT (CC BY-SA 4.0) for fine-tuning, in data/ud_english_ewt
Hardware:  2 CPU cores, 52 minutes on one of them (measured while other jobs ran)
Result:    docs/results/typing_noise.md: bytes lose less, but have not learned to read words
Size:      2 variants x 3 seeds, a T5 of 2 + 2 layers, 128 wide: 300 steps of span corruption, 600
           of tagging by the encoder

The recipes t5_small_books and byt5_small_books, each fine-tuned to name the part of speech of each
word. The test sentences are scored as they are, and with each character changed with a
probability of 10 %: left out, repeated or replaced by another letter, each equally often.
``eval/noisy/accuracy`` ranks the models; the other score is ``--metric eval/accuracy``.
"""

import gzip
import random
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

from etils import epath

import flax_transformers as ft
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.optim.optimizers import Muon
from flax_transformers.optim.schedules import Schedule
from flax_transformers.storage.workdir import write_text
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

EWT = "data/ud_english_ewt/en_ewt-ud-{}.conllu.gz"
NOISE = 0.1
STEPS, FINE_TUNING_STEPS = 300, 600


def with_noise(text: str, rng: random.Random) -> str:
    """``text`` as it might be typed: a tenth of its characters dropped, repeated or replaced."""
    typed = []
    for character in text:
        change = rng.choice(("drop", "repeat", "replace")) if rng.random() < NOISE else ""
        other = rng.choice(string.ascii_lowercase)
        typed.append({"drop": "", "repeat": 2 * character, "replace": other}.get(change, character))
    return "".join(typed)


def noisy_sentences() -> str:
    """The test sentences of EWT with noise, as CoNLL-U; the noise of a line is its own."""
    lines = gzip.decompress(Path(EWT.format("test")).read_bytes()).decode().splitlines()
    for number, line in enumerate(lines):
        fields = line.split("\t")
        if fields[0].isdecimal():
            fields[1] = with_noise(fields[1], random.Random(number)) or fields[1]
        lines[number] = "\t".join(fields)
    return "\n".join(lines) + "\n"


def fine_tune(config: TrainConfig, workdir: str) -> TrainConfig:
    """Tags by the encoder, with the tokenizer of the pretrained model."""
    noisy = epath.Path(workdir).parent / "noisy.conllu"
    if not noisy.exists():
        write_text(noisy, noisy_sentences())
    pretraining: Any = config.data
    in_bytes = pretraining.tokenizer.kind == "bytes"
    tokenizer = TokenizerConfig("bytes" if in_bytes else None, path=f"{workdir}/tokenizer")
    return replace(
        config,
        model=replace(config.model, architecture="T5ForTokenClassification", num_labels=17),
        objective=TokenClassification(),
        data=TextData(
            source=TaggedSource(EWT.format("train")),
            validation_source=TaggedSource(EWT.format("test")),
            tokenizer=tokenizer,
            shards=1,
        ),
        phases=(  # about as many characters
            Phase(steps=FINE_TUNING_STEPS, sequence_length=64, batch_size=48 if in_bytes else 16),
        ),
        evaluation=Evaluation(
            every_steps=0,
            batch_size=64,
            sets=(EvaluationSet("noisy", TaggedSource(str(noisy))),),
        ),
    )


def pretrained(name: str) -> TrainConfig:
    """The recipe ``name`` with as many steps for all."""
    config: Any = ft.recipe(name)
    return replace(
        config,
        optimizer=Muon(
            learning_rate=1e-2, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=100)
        ),
        phases=(replace(config.phases[0], steps=STEPS),),
        checkpoints=replace(config.checkpoints, every_steps=STEPS),
        evaluation=replace(config.evaluation, every_steps=0),
        logging=replace(config.logging, every_steps=50, tensorboard=False),
    )


def get_study() -> Study:
    return Study(
        base=pretrained("t5_small_books"),
        variants={"bytes": lambda base: pretrained("byt5_small_books"), "subwords": {}},
        seeds=3,
        metric="eval/noisy/accuracy",
        fine_tune=fine_tune,
        published=(
            "less accuracy lost by bytes than by subwords under each of the kinds of noise, on "
            "XNLI and TyDi QA"
        ),
        citation="Xue et al., ByT5, arXiv:2105.13626, section 6",
        expected=(("bytes", "subwords"),),
    )
