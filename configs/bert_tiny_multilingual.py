"""A tiny BERT on the Universal Declaration of Human Rights in twelve languages.

Command:   flax-transformers train bert_tiny_multilingual --workdir runs/multilingual
Data:      the Universal Declaration of Human Rights, one text file per language, as in the NLTK
           corpus udhr2 (public domain), in data/udhr2; some languages have several versions
Hardware:  2 CPU cores, about 12 minutes
Expected:  loss not measured in its present form. 12,800 examples, from 736 in Japanese to 1,966 in
           Greek, which has four times as many tokens (measured on 2026-11-23)

Languages are sampled in proportion to size**0.7, as for the published multilingual BERT
(github.com/google-research/bert/blob/master/multilingual.md). The log shows the number of examples
and the scores of each language.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

LANGUAGES = "arb deu ell eng fra hin jpn kor rus spa swh tur".split()


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            vocab_size=4000,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=64,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=MaskedLM(),
        data=MixedText(
            components=tuple(
                Component(name=name, source=TextSource(f"data/udhr2/{name}*.txt", documents="line"))
                for name in LANGUAGES
            ),
            exponent=0.7,
            tokenizer=TokenizerConfig("unigram", vocab_size=4000),
            validation_fraction=0.1,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=400, sequence_length=64, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=100),
        logging=Logging(every_steps=20),
    )
