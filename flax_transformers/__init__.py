"""Pretrain, fine-tune and run transformers in JAX and Flax: one core, one trainer, from a laptop's
CPU to TPU pods.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flax_transformers.version import __version__

if TYPE_CHECKING:
    from flax_transformers.cli.config_file import recipe
    from flax_transformers.config_json import register
    from flax_transformers.data.sequences import SequenceDataset
    from flax_transformers.evaluation.held_out import evaluation_batches
    from flax_transformers.export import push_to_hub
    from flax_transformers.huggingface.family import Family, published_sizes
    from flax_transformers.monitoring.sinks import MetricSink
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.pretrained import load_pretrained, load_tokenizer, save_pretrained
    from flax_transformers.reporting.attention import attention_probabilities
    from flax_transformers.run import train
    from flax_transformers.serving import export_program, load_program
    from flax_transformers.training.batches import training_batches
    from flax_transformers.training.callbacks import Callback
    from flax_transformers.training.trainer import Trainer

__all__ = [
    "Callback",
    "Family",
    "MetricSink",
    "SequenceDataset",
    "Trainer",
    "__version__",
    "attention_probabilities",
    "evaluation_batches",
    "export_program",
    "load_pretrained",
    "load_program",
    "load_tokenizer",
    "make_mesh",
    "published_sizes",
    "push_to_hub",
    "recipe",
    "register",
    "save_pretrained",
    "train",
    "training_batches",
]

_MODULES = {
    "Callback": "training.callbacks",
    "Family": "huggingface.family",
    "MetricSink": "monitoring.sinks",
    "SequenceDataset": "data.sequences",
    "Trainer": "training.trainer",
    "attention_probabilities": "reporting.attention",
    "evaluation_batches": "evaluation.held_out",
    "export_program": "serving",
    "load_pretrained": "pretrained",
    "load_program": "serving",
    "load_tokenizer": "pretrained",
    "make_mesh": "parallel.mesh",
    "published_sizes": "huggingface.family",
    "push_to_hub": "export",
    "recipe": "cli.config_file",
    "register": "config_json",
    "save_pretrained": "pretrained",
    "train": "run",
    "training_batches": "training.batches",
}
"""Where each public name is defined, below this package."""


def __getattr__(name: str) -> Any:
    # Imported on first use: data workers import this package and must not import jax.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
