"""Cloze question answering on short passages of novels, by a small ModernBERT.

Command:   python benchmarks/cloze_questions.py short.json data/standardebooks_en/books.jsonl.gz \\
               --words 8 22 --share 0.7
           flax-transformers train modernbert_small_cloze --workdir runs/cloze \\
               --data.source.path short.json
Data:      42,170 cloze questions about passages of 8 to 22 words from 19 books of Standard Ebooks
           (CC0); about a quarter of the chapters is held out
Hardware:  2 CPU cores
Expected:  not measured in its present form

The first of three stages: modernbert_small_cloze_long.py starts from its weights, and
modernbert_small_xquad.py from the weights of the second stage. Short passages come first: on them,
a BERT with rotary positions and of this size learned within 500 steps to find the question's words
in the passage. On passages of about 40 words it had not learned it after 1,300 steps.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.modernbert import ModernBertConfig
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModernBertConfig(
            architecture="ModernBertForQuestionAnswering",
            vocab_size=4096,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            max_positions=128,
            global_every=1,
            init_std=0.08,
            pad_id=0,
        ),
        objective=QuestionAnswering(doc_stride=32, max_question_length=20),
        data=TextData(
            source=QuestionSource("short.json"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.25,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=800, sequence_length=52, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=600),
        evaluation=Evaluation(every_steps=400, max_examples=1000, batch_size=64),
        logging=Logging(every_steps=50),
    )
