"""BERT (Devlin et al., arXiv:1810.04805): sizes, configuration and weight names."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn

from flax_transformers.models.config import Execution, TransformerConfig
from flax_transformers.models.encoder import EncoderForMaskedLM


@dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """The published BERT: post-norm, learned positions, two token types; base size by default."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    norm_place: str = "post"
    norm_eps: float = 1e-12
    token_types: int = 2
    embedding_norm: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.1

    def build(self, execution: Execution) -> nn.Module:
        return EncoderForMaskedLM(self, execution)
