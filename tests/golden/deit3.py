"""Writes deit3.npz: what a ViT with LayerScale makes of random weights and images.

Run with torch installed: ``python -m tests.golden.deit3``. transformers has no DeiT III, so the
original here is a few lines of torch that follow arXiv:2204.07118 and take weights by timm's names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.golden.draw import draw_weights
from tests.golden.hub import Case
from tests.golden.vit import draw_config, draw_images

NAME = "deit3/classifier"
CONFIG = draw_config(NAME, model_type="deit3", architectures=["DeiT3ForImageClassification"])
CASE = Case(NAME, CONFIG, {"pixel_values": draw_images(NAME, 3, 12, 12)}, {"logits": None})
CASES = (CASE,)


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a published file."""
    width, inner, patch = (
        CONFIG[name] for name in ("hidden_size", "intermediate_size", "patch_size")
    )
    block = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.proj.weight": (width, width),
        "attn.proj.bias": (width,),
        "ls1.gamma": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (inner, width),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (width, inner),
        "mlp.fc2.bias": (width,),
        "ls2.gamma": (width,),
    }
    return {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (CONFIG["image_size"] // patch) ** 2, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        **{
            f"blocks.{i}.{name}": shape
            for i in range(CONFIG["num_hidden_layers"])
            for name, shape in block.items()
        },
        "norm.weight": (width,),
        "norm.bias": (width,),
        "head.weight": (len(CONFIG["id2label"]), width),
        "head.bias": (len(CONFIG["id2label"]),),
    }


def run_torch() -> Any:
    """Logits [3, labels], in float64."""
    import torch
    from torch.nn import functional

    w = {name: torch.tensor(v).double() for name, v in draw_weights(shapes(), NAME).items()}
    heads, width, eps = (
        CONFIG[name] for name in ("num_attention_heads", "hidden_size", "layer_norm_eps")
    )

    def linear(x: Any, name: str) -> Any:
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Any, name: str) -> Any:
        return functional.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    images = torch.tensor(CASE.inputs["pixel_values"]).double()
    x = functional.conv2d(
        images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], CONFIG["patch_size"]
    )
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    x = torch.cat([w["cls_token"].expand(len(x), 1, width), x], dim=1)
    for i in range(CONFIG["num_hidden_layers"]):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        qkv = qkv.reshape(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(x.shape)
        x = x + w[f"{block}.ls1.gamma"] * linear(seen, f"{block}.attn.proj")
        inner = functional.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + w[f"{block}.ls2.gamma"] * linear(inner, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


if __name__ == "__main__":
    results = {f"{NAME}/logits": run_torch().numpy().astype(np.float32)}
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **results)
