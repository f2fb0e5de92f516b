"""Writes videomae.npz: what Hugging Face's VideoMAE makes of random weights, videos and masks.

Run with torch and transformers installed: ``python -m tests.golden.videomae``. Of pretraining the
file holds the loss and its gradients as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.draw import draw, generator
from tests.golden.hub import Case, run_original
from tests.golden.mae import run_loss
from tests.golden.vit import draw_config

# transformers 5 saves these biases as ``q_bias`` and ``v_bias``, as the published files have them.
_DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_attention_heads": 3,
    "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 19,
}


def draw_masks(name: str, videos: int, tubelets: int, visible: int) -> np.ndarray:
    """Masks bool [videos, tubelets] with ``visible`` zeros each, of single tubelets, not tubes."""
    order = generator(f"{name}/mask").random_sample((videos, tubelets)).argsort(axis=1)
    return order.argsort(axis=1) >= visible


def _case(
    name: str,
    architecture: str,
    output: str,
    *,
    visible: int | None = None,
    frames: int = 6,
    **fields: Any,
) -> Case:
    config = draw_config(
        name,
        model_type="videomae",
        architectures=[architecture],
        num_frames=frames,
        **{"tubelet_size": 2} | fields,
    )
    side, tubelet = config["image_size"], config["tubelet_size"]
    tubelets = frames // tubelet * (side // config["patch_size"]) ** 2
    shape = (2, frames, config["num_channels"], side, side)
    inputs = {"pixel_values": draw("pixel_values", shape, name)}
    if visible is not None:
        inputs["bool_masked_pos"] = draw_masks(name, 2, tubelets, visible)
    return Case(name, config, inputs, {output: None})


# Of 9 patches of a frame, 8 are masked at the default ratio of 0.9: 3 of 27 tubelets are visible.
NORMED = _case(
    "videomae/normed", "VideoMAEForPreTraining", "logits",
    visible=3, use_mean_pooling=False, **_DECODER,
)  # fmt: skip
# 16 patches, 9 of them masked.
PLAIN = _case(
    "videomae/plain", "VideoMAEForPreTraining", "logits",
    visible=21, mask_ratio=0.6, image_size=16, norm_pix_loss=False, qv_bias=False,
    hidden_act="gelu_new", **_DECODER,
)  # fmt: skip
LABELLED = _case("videomae/labelled", "VideoMAEForVideoClassification", "logits")
FIRST = _case(
    "videomae/first", "VideoMAEForVideoClassification", "logits",
    use_mean_pooling=False, num_channels=1, tubelet_size=3,
)  # fmt: skip
ENCODER = _case(
    "videomae/encoder", "VideoMAEModel", "last_hidden_state", visible=3, use_mean_pooling=False
)

PRETRAINING = (NORMED, PLAIN)
CASES = (*PRETRAINING, LABELLED, FIRST, ENCODER)

if __name__ == "__main__":
    results = {f"{case.name}/{n}": v for case in CASES for n, v in run_original(case).items()}
    results |= {f"{case.name}/{n}": v for case in PRETRAINING for n, v in run_loss(case).items()}
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        **{name: value.astype(np.float32) for name, value in results.items()},
    )
