"""Writes mae.npz: what Hugging Face's ViTMAE makes of random weights, images and masks.

Run with torch and transformers installed: ``python -m tests.golden.mae``. Tables of positions are
drawn too: that they are loaded is all that counts. Of pretraining the file holds the loss and its
gradients as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.draw import generator
from tests.golden.hub import Case, load_original, run_original, torch_inputs
from tests.golden.vit import draw_config, draw_images

# transformers 5 saves these layers under another name than the published files have.
PUBLISHED = {r"^decoder\.decoder_encoder\.layer\.": "decoder.decoder_layers."}


def _case(name: str, architecture: str, outputs: tuple[str, ...], **fields: Any) -> Case:
    config = draw_config(name, model_type="vit_mae", architectures=[architecture], **fields)
    patches = (config["image_size"] // config["patch_size"]) ** 2
    noise = generator(f"{name}/noise").random_sample((3, patches)).astype(np.float32)
    images = draw_images(name, config["num_channels"], *[config["image_size"]] * 2)
    return Case(
        name,
        config,
        {"pixel_values": images, "noise": noise},
        dict.fromkeys((*outputs, "mask", "ids_restore")),
        renames=PUBLISHED,
    )


_DECODER = {
    "decoder_hidden_size": 12,
    "decoder_num_attention_heads": 3,
    "decoder_num_hidden_layers": 2,
    "decoder_intermediate_size": 19,
}
NORMED = _case(
    "mae/normed", "ViTMAEForPreTraining", ("logits",),
    image_size=16, norm_pix_loss=True, **_DECODER,
)  # fmt: skip
PLAIN = _case(
    "mae/plain", "ViTMAEForPreTraining", ("logits",),
    mask_ratio=0.6, num_channels=1, qkv_bias=False, hidden_act="gelu_new", **_DECODER,
)  # fmt: skip
ENCODER = _case("mae/encoder", "ViTMAEModel", ("last_hidden_state",), mask_ratio=0.5)

PRETRAINING = (NORMED, PLAIN)
CASES = (*PRETRAINING, ENCODER)


def run_loss(case: Case) -> dict[str, np.ndarray]:
    """The loss, and its gradients by the names of the original's parameters."""
    with tempfile.TemporaryDirectory() as folder:
        model = load_original(case, Path(folder))
    for name, tensor in model.named_parameters():
        if name.endswith(("position_embeddings", "decoder_pos_embed")):
            tensor.requires_grad_(False)  # as in a new model; loading forgets it
    output = model(**torch_inputs(case))
    output.loss.backward()
    return {"loss": output.loss.detach().numpy()} | {
        f"gradients/{name}": tensor.grad.numpy()
        for name, tensor in model.named_parameters()
        if tensor.grad is not None
    }


if __name__ == "__main__":
    results = {f"{case.name}/{n}": v for case in CASES for n, v in run_original(case).items()}
    results |= {f"{case.name}/{n}": v for case in PRETRAINING for n, v in run_loss(case).items()}
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        **{name: value.astype(np.float32) for name, value in results.items()},
    )
