"""Question answering on Wikipedia articles, by a small ModernBERT.

Command:   flax-transformers train modernbert_small_xquad --workdir runs/xquad \\
               --init-from runs/cloze_long --data.tokenizer.path runs/cloze/tokenizer
           after modernbert_small_cloze_long.py
Data:      XQuAD English (CC BY-SA 4.0), 1,190 questions about 48 articles; all 402 questions about
           a quarter of the articles are held out. Set --data.source.path if the file is elsewhere
Hardware:  2 CPU cores
Expected:  not measured in its present form; the baseline, window overlap with the question's words,
           has an F1 of 16.3 %
"""

import modernbert_small_cloze

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=modernbert_small_cloze.get_config().model,
        objective=QuestionAnswering(doc_stride=64, max_question_length=40),
        data=TextData(
            source=QuestionSource("data/xquad/xquad.en.json.gz"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.25,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=5e-4, b2=0.98, schedule=Schedule("linear", warmup_steps=25)),
        phases=(Phase(steps=250, sequence_length=128, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=250),
        evaluation=Evaluation(every_steps=250, batch_size=64),
        logging=Logging(every_steps=20),
    )
