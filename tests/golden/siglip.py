"""Writes siglip.npz: what Hugging Face's SigLIP makes of random weights, images and texts.

Run with torch and transformers installed: ``python -m tests.golden.siglip``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.golden.clip import (
    IMAGES,
    OUTPUTS,
    WORDS,
    classifier_case,
    draw_inputs,
    draw_tower,
    tower_case,
)
from tests.golden.draw import draw
from tests.golden.hub import Case, write_goldens


def _case(name: str, text: dict[str, Any], vision: dict[str, Any]) -> Case:
    vision = draw_tower(f"{name}/vision", **{"image_size": 12, "patch_size": 4, **vision})
    text = draw_tower(f"{name}/text", vocab_size=WORDS, max_position_embeddings=11, **text)
    text |= {"projection_size": vision["hidden_size"], "eos_token_id": 1, "bos_token_id": None}
    config = {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "text_config": text,
        "vision_config": vision,
    }
    inputs = draw_inputs(name, vision.get("num_channels", 3), vision["image_size"])
    return Case(name, config, inputs, dict.fromkeys(OUTPUTS))


PLAIN = _case("siglip/plain", {}, {})
MASKED = _case(
    "siglip/masked",
    {"hidden_act": "gelu"},
    {"hidden_act": "quick_gelu", "num_channels": 1, "patch_size": 5},
)
MASKED = replace(
    MASKED,
    inputs=MASKED.inputs
    | {"attention_mask": (MASKED.inputs["input_ids"] != WORDS - 1).astype(np.int32)},
)
ENLARGED = _case("siglip/enlarged", {}, {})
ENLARGED = replace(
    ENLARGED,
    inputs=ENLARGED.inputs | {"pixel_values": draw("larger", (IMAGES, 3, 20, 24), ENLARGED.name)},
    extra={"interpolate_pos_encoding": True},
)

TOWERS = (
    tower_case("siglip/text", PLAIN, "SiglipTextModel", "pooler_output"),
    tower_case("siglip/text_masked", MASKED, "SiglipTextModel", "pooler_output"),
    tower_case("siglip/vision", MASKED, "SiglipVisionModel", "pooler_output"),
    tower_case("siglip/vision_enlarged", ENLARGED, "SiglipVisionModel", "pooler_output"),
)
PAIRS = (PLAIN, MASKED, ENLARGED)
CLASSIFIER = classifier_case("siglip/classifier", MASKED, "SiglipForImageClassification")
CASES = (*PAIRS, *TOWERS, CLASSIFIER)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
