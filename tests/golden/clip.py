"""Writes clip.npz: what Hugging Face's CLIP makes of random weights, images and texts.

Run with torch and transformers installed: ``python -m tests.golden.clip``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from tests.golden.draw import draw, generator
from tests.golden.hub import Case, write_goldens

OUTPUTS = ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")
IMAGES, TEXTS, LENGTH = 3, 4, 11
WORDS, END = 83, 71


def draw_tower(name: str, **fields: Any) -> dict[str, Any]:
    """One encoder, with an odd number of heads and sizes that divide by nothing."""
    random = generator(f"{name}/config")
    heads = int(random.choice([3, 5]))
    return {
        "num_attention_heads": heads,
        "hidden_size": heads * int(random.choice([4, 8])),
        "num_hidden_layers": int(random.randint(2, 4)),
        "intermediate_size": int(random.randint(20, 50)),
        "layer_norm_eps": float(random.choice([1e-6, 1e-5, 1e-3])),
    } | fields


def draw_inputs(name: str, channels: int, side: int) -> dict[str, np.ndarray]:
    """Images, and texts of several lengths that end with ``END`` and are padded with higher ids."""
    random = generator(f"{name}/ids")
    ids = random.randint(3, END, (TEXTS, LENGTH))
    for row, end in enumerate((4, LENGTH - 1, 7, 1)):
        ids[row, end] = END
        ids[row, end + 1 :] = WORDS - 1
    pixels = draw("pixel_values", (IMAGES, channels, side, side), name)
    return {"input_ids": ids.astype(np.int32), "pixel_values": pixels}


def _case(name: str, text: dict[str, Any], vision: dict[str, Any], **fields: Any) -> Case:
    text = draw_tower(f"{name}/text", vocab_size=WORDS, max_position_embeddings=13, **text)
    vision = draw_tower(f"{name}/vision", **{"image_size": 12, "patch_size": 4, **vision})
    inputs = draw_inputs(name, vision.get("num_channels", 3), vision["image_size"])
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "text_config": {"eos_token_id": END, "bos_token_id": 2, "pad_token_id": 1, **text},
        "vision_config": vision,
        **fields,
    }
    return Case(name, config, inputs, dict.fromkeys(OUTPUTS))


END_ID = _case("clip/end_id", {}, {}, projection_dim=9)
HIGHEST_ID = _case(
    "clip/highest_id",
    {"eos_token_id": 2, "hidden_act": "gelu"},
    {"hidden_act": "gelu_new", "num_channels": 1, "patch_size": 5},
    projection_dim=14, logit_scale_init_value=1.5,
)  # fmt: skip
"""In this one the highest id of a text is its end: the first place of padding."""
MASKED = _case("clip/masked", {}, {"hidden_act": "relu"}, projection_dim=6)
MASKED = replace(
    MASKED,
    inputs=MASKED.inputs
    | {"attention_mask": (MASKED.inputs["input_ids"] != WORDS - 1).astype(np.int32)},
)
ENLARGED = _case("clip/enlarged", {}, {}, projection_dim=8)
ENLARGED = replace(
    ENLARGED,
    inputs=ENLARGED.inputs | {"pixel_values": draw("larger", (IMAGES, 3, 20, 24), ENLARGED.name)},
    extra={"interpolate_pos_encoding": True},
)


def tower_case(name: str, of: Case, architecture: str, output: str) -> Case:
    """One encoder of a case as a model of its own, its tensors named as in published files."""
    side = "text" if "Text" in architecture else "vision"
    shared = {key: of.config[key] for key in ("projection_dim",) if key in of.config}
    config = {
        "model_type": f"{of.config['model_type']}_{side}_model",
        "architectures": [architecture],
        **shared,
        **of.config[f"{side}_config"],
    }
    wanted = ("pixel_values",) if side == "vision" else ("input_ids", "attention_mask")
    inputs = {key: value for key, value in of.inputs.items() if key in wanted}
    return Case(
        name,
        config,
        inputs,
        {
            "last_hidden_state": "attention_mask" if "attention_mask" in inputs else None,
            output: None,
        },
        extra=of.extra if side == "vision" else {},
        # transformers 5 leaves out the prefix where the encoder is the whole model.
        renames={rf"^(?!{side}_model\.|(text|visual)_projection)": f"{side}_model."},
    )


def classifier_case(name: str, of: Case, architecture: str) -> Case:
    """The image encoder of a case with a classifier; the file describes both encoders."""
    config = {**of.config, "architectures": [architecture], "num_labels": 5}
    inputs = {"pixel_values": of.inputs["pixel_values"]}
    return Case(name, config, inputs, {"logits": None}, extra=of.extra)


TOWERS = (
    tower_case("clip/text", END_ID, "CLIPTextModel", "pooler_output"),
    tower_case("clip/text_highest_id", HIGHEST_ID, "CLIPTextModel", "pooler_output"),
    tower_case("clip/text_masked", MASKED, "CLIPTextModelWithProjection", "text_embeds"),
    tower_case("clip/vision", HIGHEST_ID, "CLIPVisionModel", "pooler_output"),
    tower_case("clip/vision_enlarged", ENLARGED, "CLIPVisionModelWithProjection", "image_embeds"),
)
PAIRS = (END_ID, HIGHEST_ID, MASKED, ENLARGED)
CLASSIFIER = classifier_case("clip/classifier", HIGHEST_ID, "CLIPForImageClassification")
CASES = (*PAIRS, *TOWERS, CLASSIFIER)

if __name__ == "__main__":
    write_goldens(CASES, __file__)
