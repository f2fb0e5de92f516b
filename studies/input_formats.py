"""RoBERTa's input formats, next-sentence prediction, static masks and large batches.

Command:   flax-transformers sweep studies/input_formats.py --workdir runs/input_formats
Data:      the documentation that is included in every Python installation
Hardware:  2 CPU cores, 51 minutes by two processes (measured while other jobs ran)
Result:    docs/results/input_formats.md: no published direction appears; too little pretraining
Size:      6 variants x 3 seeds, a BERT of 2 layers, 128 wide: 1,000 steps of pretraining, 150 of
           fine-tuning

Each model sees 32,000 sequences of 64 tokens, and is then fine-tuned on the tags of masking.py.
``large_batches`` has batches of eight times the size at seven times the rate, as in table 3 of the
paper, and an eighth of the steps.
"""

from dataclasses import replace
from typing import Any

import masking

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.sweeps.study import Study, Variant
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

STEPS, BATCH, RATE, WARMUP = 1000, 32, 1e-3, 100


def next_sentences(*, single_sentences: bool) -> Variant:
    def variant(base: TrainConfig) -> TrainConfig:
        return replace(
            base,
            model=replace(base.model, architecture="BertForPreTraining"),
            objective=NextSentence(single_sentences=single_sentences),
        )

    return variant


def get_study() -> Study:
    pairs: Any = ft.recipe("bert_tiny_pairs")
    return Study(
        base=replace(
            pairs,
            model=replace(pairs.model, architecture="BertForMaskedLM"),
            objective=MaskedLM(),
            optimizer=replace(
                pairs.optimizer,
                learning_rate=RATE,
                schedule=replace(pairs.optimizer.schedule, warmup_steps=WARMUP),
            ),
            phases=(Phase(steps=STEPS, sequence_length=64, batch_size=BATCH),),
            checkpoints=CheckpointConfig(every_steps=STEPS),
            evaluation=Evaluation(every_steps=0, batch_size=64),
            logging=Logging(every_steps=50, tensorboard=False),
        ),
        variants={
            "segment_pairs": next_sentences(single_sentences=False),
            "sentence_pairs": next_sentences(single_sentences=True),
            "full_sentences": {},
            "doc_sentences": {"objective.cross_documents": False},
            "static_masks": {"objective.static_epochs": 1},
            "large_batches": {
                "phases.0.batch_size": 8 * BATCH,
                "phases.0.steps": STEPS // 8,
                "optimizer.learning_rate": 7 * RATE,
                "optimizer.schedule.warmup_steps": WARMUP // 8,
            },
        },
        seeds=3,
        metric="eval/accuracy",
        baseline="full_sentences",
        fine_tune=masking.fine_tune,
        published=(
            "MNLI accuracy of BERT base: segment pairs 84.0 and sentence pairs 82.9 with "
            "next-sentence prediction, full sentences 84.7 and document sentences 84.7 without; "
            "static masks 84.3, dynamic 84.0; batches of 256 84.7, of 2,000 at seven times the "
            "rate 85.2"
        ),
        citation="Liu et al., RoBERTa, arXiv:1907.11692, tables 1 to 3",
        expected=(
            ("full_sentences", "segment_pairs"),
            ("doc_sentences", "segment_pairs"),
            ("segment_pairs", "sentence_pairs"),
            ("large_batches", "full_sentences"),
        ),
    )
