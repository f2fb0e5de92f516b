"""DeiT (Touvron et al., arXiv:2012.12877): ViT with a second token that learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax

from flax_transformers.families import vit
from flax_transformers.huggingface.family import Family
from flax_transformers.huggingface.weights import Weight, WeightTable, linear, norm
from flax_transformers.models.config import VisionConfig
from flax_transformers.models.heads import classify_vectors, label_layer
from flax_transformers.models.outputs import ModelOutput
from flax_transformers.models.vision import VisionForClassification, VisionModel, VisionWithPooler


class DeiTOutput(ModelOutput):
    """``logits`` are the mean of the two others, float32 [B, labels]."""

    cls_logits: jax.Array | None = None
    distillation_logits: jax.Array | None = None


class DeiTWithTeacher(VisionModel):
    """Two classifiers, of the class token and of the distillation token."""

    output = DeiTOutput

    def setup(self) -> None:
        super().setup()
        self.classification_head = label_layer(self.config, self.dtype, self.config.num_labels)
        self.distillation_head = label_layer(self.config, self.dtype, self.config.num_labels)

    def classify_both(
        self, hidden_BTD: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Logits float32 [B, labels] of the classifier and of the pupil of the teacher.

        Training has a loss on each (§3, "distillation through attention").
        """
        class_BC = classify_vectors(self.classification_head, hidden_BTD[:, 0])
        return class_BC, classify_vectors(self.distillation_head, hidden_BTD[:, 1])

    def classify(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, labels] to predict by: the mean of both."""
        class_BC, distilled_BC = self.classify_both(hidden_BTD)
        return (class_BC + distilled_BC) / 2

    def head_outputs(self, hidden_BTD: jax.Array, deterministic: bool) -> dict[str, jax.Array]:
        class_BC, distilled_BC = self.classify_both(hidden_BTD)
        return {
            "logits": self.classify(hidden_BTD),
            "cls_logits": class_BC,
            "distillation_logits": distilled_BC,
        }


ARCHITECTURES: dict[str, type[nn.Module]] = {
    "DeiTForImageClassificationWithTeacher": DeiTWithTeacher,
    "DeiTForImageClassification": VisionForClassification,
    "DeiTModel": VisionWithPooler,
}


@dataclass(frozen=True, kw_only=True)
class DeiTConfig(VisionConfig):
    """The distilled DeiT, B/16 by default. Without distillation it is a ViT, and published so."""

    architecture: str = "DeiTForImageClassificationWithTeacher"
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    norm_eps: float = 1e-12

    @property
    def tokens(self) -> tuple[str, ...]:
        return ("class_token", "distillation_token")


SIZES: dict[str, DeiTConfig] = {
    vit.size_name("deit", letters, 16, image_size): DeiTConfig(
        image_size=image_size,
        num_labels=vit.IMAGENET_LABELS,
        drop_path=0.1,  # table 9
        **vit.dimensions(letters),
    )
    for letters, image_size in (("ti", 224), ("s", 224), ("b", 224), ("b", 384))
}
"""The published distilled sizes, with ImageNet's labels."""


JSON = vit.VisionFields(defaults=DeiTConfig(), fixed={"model_type": "deit"})

_HEADS = {"DeiTForImageClassificationWithTeacher": "cls_classifier"}
"""What each architecture calls its classification head, if not "classifier"."""


def weights(config: DeiTConfig) -> WeightTable:
    """The names of DeiT's tensors."""
    token = "deit.embeddings.distillation_token"
    table = WeightTable(
        weights=(
            *vit.embedding_weights("deit.embeddings"),
            Weight("embeddings/distillation_token/embedding", token, "D->11D"),
            *vit.layer_weights("stack", "deit.encoder.layer"),
            *norm("final_norm", "deit.layernorm"),
            *linear("pooler/dense", "deit.pooler.dense", "D", "E"),
            *linear("classification_head", _HEADS.get(config.architecture, "classifier"), "D", "C"),
            *linear("distillation_head", "distillation_classifier", "D", "C"),
        ),
        renames=vit.RENAMES,
        prefix="deit.",
    )
    return table.bare() if config.architecture == "DeiTModel" else table


FAMILY = Family.of_table(
    JSON,
    architectures=ARCHITECTURES,
    sizes=SIZES,
    weights=weights,
)
