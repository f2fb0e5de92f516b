"""Cloze question answering on longer passages of novels, by a small ModernBERT.

Command:   python benchmarks/cloze_questions.py long.json data/standardebooks_en/books.jsonl.gz \\
               data/xquad/xquad.en.json.gz
           flax-transformers train modernbert_small_cloze_long \\
               --workdir runs/cloze_long \\
               --init-from runs/cloze --data.tokenizer.path runs/cloze/tokenizer \\
               --data.source.path long.json
           after modernbert_small_cloze.py
Data:      29,079 cloze questions about passages of 16 to 72 words, from 19 books of Standard Ebooks
           (CC0) and from the articles of XQuAD (CC BY-SA 4.0), without XQuAD's questions. The
           articles that modernbert_small_xquad.py holds out are held out here, too.
Hardware:  2 CPU cores
Expected:  not measured in its present form
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
        objective=QuestionAnswering(doc_stride=32, max_question_length=24),
        data=TextData(
            source=QuestionSource("long.json"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.25,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=800, sequence_length=112, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=600),
        evaluation=Evaluation(every_steps=400, max_examples=1000, batch_size=64),
        logging=Logging(every_steps=50),
    )
