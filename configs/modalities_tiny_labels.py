"""Fine-tune the trunk of modalities_tiny on a few labels of one modality.

Command:   flax-transformers train modalities_tiny_labels --workdir runs/labels \\
               --init-from runs/modalities --data.examples-per-class 10
           where runs/modalities is the workdir of modalities_tiny. Without --init-from the same
           model is trained from random weights
Hardware:  2 CPU cores, 1 to 1.5 minutes (measured while other jobs ran)
Expected:  93.5, 87.8 and 95.7 % of 1,000 held-out words, from random weights 87.6, 88.0 and 89.5 %,
           chance 10 % (measured, 3 seeds)

The modality is "audio", ten spoken-like words of two vowels. For digits and moving digits replace
it in the objective and in the data.

Cannot be exported: transformers has no class for several modalities with one trunk.
"""

import dataclasses

from modalities_tiny import MODEL

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.generated import Tones
from flax_transformers.families.multimodal_mae import CLASSIFIER
from flax_transformers.objectives.modalities import ModalityClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(MODEL, architecture=CLASSIFIER),
        objective=ModalityClassification(modality="audio"),
        data=SignalData(sources=(Tones(name="audio", examples=4000, held_out=1000),)),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=0.05,
            layer_decay=0.75,
            schedule=Schedule("cosine", warmup_steps=30),
        ),
        phases=(Phase(steps=300, sequence_length=48, batch_size=50),),
        checkpoints=CheckpointConfig(every_steps=300),
        evaluation=Evaluation(every_steps=0, batch_size=100),
        seed=0,
    )
