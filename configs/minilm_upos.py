"""Part-of-speech tagging of English, from a published sentence encoder.

Command:   flax-transformers train minilm_upos --workdir runs/minilm_upos \\
               --init-from all-MiniLM-L6-v2 --data.tokenizer.path all-MiniLM-L6-v2
           where all-MiniLM-L6-v2 is the published folder (sentence-transformers)
Data:      as modernbert_small_upos.py: Universal Dependencies English EWT (CC BY-SA 4.0)
Expected:  accuracy 96.7 % per word, one seed, in 44 minutes on two CPU cores that had other work
           (measured, bfloat16). The same task from random weights, modernbert_small_upos, reaches
           91.8 %, and the most frequent tag of each word 86.2 %. Published: UDPipe 1 94.4 %, UDify
           (from multilingual BERT) 96.3 %
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
        optimizer=AdamW(
            learning_rate=3e-4,
            weight_decay=0.01,
            schedule=Schedule("linear", warmup_steps=80),
        ),
        phases=(Phase(steps=1176, sequence_length=48, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=1176),
        evaluation=Evaluation(every_steps=392, batch_size=64),
        logging=Logging(every_steps=20),
    )
