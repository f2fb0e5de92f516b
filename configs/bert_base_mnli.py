"""BERT base on MultiNLI: does the premise entail the hypothesis (arXiv:1810.04805 §4.1)?

Command:   flax-transformers train bert_base_mnli --workdir gs://bucket/mnli \\
               --init-from bert-base-uncased --data.tokenizer.path bert-base-uncased
           where bert-base-uncased is the folder with the published weights and vocab.txt
Hardware:  any; minutes on a TPU v5e slice of 8 chips (estimated)
Data:      TFDS glue/mnli; if it is not prepared, the error names the command that prepares it
           without TensorFlow. Its parts have different licences
Expected:  not run. The paper reports 84.6 % on the matched test set
"""

from dataclasses import replace

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import SIZES
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def source(split: str) -> LabelledSource:
    return LabelledSource("tfds:glue/mnli", split, text_field="premise", second_field="hypothesis")


def get_config() -> TrainConfig:
    return TrainConfig(
        model=replace(
            SIZES["bert-base"], architecture="BertForSequenceClassification", num_labels=3
        ),
        objective=SequenceClassification(),
        data=TextData(
            source=source("train"),
            validation_source=source("validation_matched"),
            tokenizer=TokenizerConfig("wordpiece", lowercase=True),
        ),
        optimizer=AdamW(
            learning_rate=3e-5,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=3_681),
        ),
        # Three epochs of 392,702 pairs, a tenth of them for the warm-up.
        phases=(Phase(steps=36_815, sequence_length=128, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=2_000),
        evaluation=Evaluation(every_steps=6_000, batch_size=256),
        logging=Logging(every_steps=100),
    )
