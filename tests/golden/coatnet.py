"""Writes coatnet.npz: what timm's CoAtNet makes of random weights and images, also in training.

Run with torch and timm installed: ``python -m tests.golden.coatnet``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.draw import draw_weights, generator
from tests.golden.hub import Case
from tests.golden.vit import draw_images

LABELS = 7


def _case(name: str, architecture: str, height: int, width: int, **arguments: Any) -> Case:
    """Odd widths and numbers of heads, and at least one layer after the first of a stage."""
    size = height if height == width else [height, width]
    arguments |= {"transformer_dim_head": 4, "img_size": size}
    config = {
        "architectures": ["CoAtNetForImageClassification"],
        "architecture": architecture,
        "num_classes": LABELS,
        "global_pool": "avg",
        "model_args": arguments,
    }
    images = draw_images(name, arguments.get("in_chans", 3), height, width)
    return Case(name, config, {"pixel_values": images}, {"logits": None})


PAPER = _case(
    "coatnet/paper", "coatnet_0_224", 64, 96,
    stem_width=[5, 7], embed_dim=[6, 9, 12, 20], depths=[2, 1, 3, 2], head_hidden_size=20,
)  # fmt: skip
TRAINED = _case(
    "coatnet/trained", "coatnet_0_rw_224", 64, 64,
    stem_width=[5, 7], embed_dim=[6, 12, 20, 28], depths=[1, 3, 2, 1], in_chans=1,
)  # fmt: skip
LATER = _case(
    "coatnet/later", "coatnet_2_rw_224", 32, 96,
    stem_width=[6, 6], embed_dim=[6, 8, 12, 20], depths=[1, 1, 1, 2],
    transformer_norm_eps=1e-3, conv_norm_eps=1e-3,
)  # fmt: skip
CASES = (PAPER, TRAINED, LATER)

TARGETS = generator("coatnet/targets").randint(0, LABELS, 3)
"""Labels of the images of ``PAPER``, for a step of training."""


def import_timm() -> Any:
    """timm, also where torchvision's compiled operators do not fit torch: CoAtNet needs none."""
    import torch

    try:
        import timm
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import timm
    return timm


def load_original(case: Case) -> Any:
    """The original with drawn weights and running statistics, in float64."""
    import torch

    config = case.config
    model = import_timm().create_model(
        config["architecture"], num_classes=config["num_classes"], **config["model_args"]
    )
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    tensors = draw_weights(shapes, case.name)
    model.load_state_dict({name: torch.tensor(value) for name, value in tensors.items()})
    return model.double().eval()


def run_original(case: Case) -> dict[str, np.ndarray]:
    """Logits [3, labels], in float64."""
    import torch

    images = torch.tensor(case.inputs["pixel_values"]).double()
    return {"logits": load_original(case)(images).detach().numpy()}


def train_original(case: Case) -> dict[str, np.ndarray]:
    """Loss and gradients with batch statistics, and the running statistics after it."""
    import torch

    model = load_original(case).train()
    logits = model(torch.tensor(case.inputs["pixel_values"]).double())
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(TARGETS))
    loss.backward()
    results = {"loss": loss.detach().numpy()}
    for name, parameter in model.named_parameters():
        results[f"gradients/{name}"] = parameter.grad.numpy()
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            results[f"running/{name}"] = buffer.numpy()
    return results


if __name__ == "__main__":
    found = {
        f"{case.name}/{name}": value.astype(np.float32)
        for case in CASES
        for name, value in run_original(case).items()
    }
    found |= {
        f"training/{name}": value.astype(np.float32)
        for name, value in train_original(PAPER).items()
    }
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)
