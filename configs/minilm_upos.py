"""Part-of-speech tagging of English, from a published sentence encoder.

Command:   flax-transformers train configs/minilm_upos.py --workdir runs/minilm_upos
               --init-from all-MiniLM-L6-v2 --data.tokenizer.path all-MiniLM-L6-v2
           where all-MiniLM-L6-v2 is the published folder (sentence-transformers)
Data:      Universal Dependencies English EWT (CC BY-SA 4.0), 12,544 training sentences, scored on
           its test file of 2,077. Set --data.source.path and --data.validation-source.path if the
           files are elsewhere
Hardware:  2 CPU cores
Expected:  not measured yet
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            architecture="BertForTokenClassification",
            hidden_size=384,
            num_layers=6,
            num_heads=12,
            intermediate_size=1536,
            num_labels=17,
        ),
        objective=TokenClassification(),
        data=TextData(
            source=TaggedSource("data/ud_english_ewt/en_ewt-ud-train.conllu.gz"),
            validation_source=TaggedSource("data/ud_english_ewt/en_ewt-ud-test.conllu.gz"),
            tokenizer=TokenizerConfig(),
            shards=1,
        ),
        optimizer=AdamW(learning_rate=3e-4, schedule=Schedule("linear", warmup_steps=80)),
        phases=(Phase(steps=1176, sequence_length=64, batch_size=32),),  # three epochs
        checkpoints=CheckpointConfig(every_steps=1176),
        evaluation=Evaluation(every_steps=392, batch_size=64),
        logging=Logging(every_steps=20),
    )
