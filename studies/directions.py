"""Both directions against left to right, and the size of the model (BERT, arXiv:1810.04805).

Command:   flax-transformers sweep studies/directions.py --workdir runs/directions
Data:      the documentation that is included in every Python installation
Hardware:  2 CPU cores, 57 minutes by two processes (measured while other jobs ran)
Result:    docs/results/directions.md: both directions clearly better; size matters little
Size:      7 variants x 3 seeds, 2 layers, 128 wide: 600 steps of pretraining, 150 of fine-tuning

Each model is fine-tuned on the tags of masking.py. All are a Llama (arXiv:2302.13971), so that the
directions differ by the mask of attention and by the objective alone: the base attends to all
tokens and is pretrained as a masked language model, ``left_to_right`` attends to earlier tokens,
in fine-tuning too, and is pretrained as a language model. ``untrained`` is the base without
pretraining.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import masking

from flax_transformers.families.llama import LlamaConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import TrainConfig

STEPS = 600


def left_to_right(base: TrainConfig) -> TrainConfig:
    model: Any = base.model
    return replace(base, model=replace(model, causal=True), objective=CausalLM())


def sized(layers: int, width: int) -> Callable[[TrainConfig], TrainConfig]:
    """Heads stay 32 wide, and the feed-forward twice as wide as the model."""

    def variant(base: TrainConfig) -> TrainConfig:
        model = replace(
            base.model,
            num_layers=layers,
            hidden_size=width,
            num_heads=width // 32,
            intermediate_size=2 * width,
        )
        return replace(base, model=model)

    return variant


def get_study() -> Study:
    base = masking.get_study().base
    optimizer: Any = base.optimizer
    return Study(
        base=replace(
            base,
            model=LlamaConfig(
                vocab_size=4096,
                hidden_size=128,
                num_layers=2,
                num_heads=4,
                intermediate_size=256,
                max_positions=64,
                causal=False,
                init_std=0.05,
                pad_id=0,
                bos_id=2,
                eos_ids=(3,),
            ),
            optimizer=replace(optimizer, schedule=replace(optimizer.schedule, warmup_steps=60)),
            phases=(replace(base.phases[0], steps=STEPS),),
            checkpoints=replace(base.checkpoints, every_steps=STEPS),
        ),
        variants={
            "both_directions": {},
            "left_to_right": left_to_right,
            "untrained": {"phases.0.steps": 1, "optimizer.schedule.warmup_steps": 0},
            "layers_1": sized(1, 128),
            "layers_4": sized(4, 128),
            "width_64": sized(2, 64),
            "width_256": sized(2, 256),
        },
        seeds=3,
        metric="eval/accuracy",
        fine_tune=masking.fine_tune,
        published=(
            "MNLI accuracy and SQuAD F1 of BERT base without next-sentence prediction: both "
            "directions 83.9 and 87.9, left to right 82.1 and 77.8; MNLI accuracy of 3, 6 and 12 "
            "layers of width 768: 77.9, 80.6 and 81.9 to 84.4"
        ),
        citation="Devlin et al., BERT, arXiv:1810.04805, tables 5 and 6",
        expected=(
            ("both_directions", "left_to_right"),
            ("both_directions", "untrained"),
            ("both_directions", "layers_1"),
            ("layers_4", "both_directions"),
            ("both_directions", "width_64"),
            ("width_256", "both_directions"),
        ),
    )
