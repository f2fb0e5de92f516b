"""Attention maps as SVG: one image of all maps of a stack, which charts show whole or in part."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

_CELL = 10
"""Units of an SVG for a token, whose name is as high."""
_LABEL, _LABEL_LENGTH = 62, 10
"""Width of the names of tokens in units, and their letters."""
_TILE, _GAP, _MARGIN = 48, 4, 26
_OF_TEXT, _OF_IMAGE = (60, 143, 214), (255, 106, 20)
"""Colors that show on light and dark pages, and on pictures."""
_STRONGEST_ON_IMAGE = 0.8
"""Opacity of the patch that is attended to most: the picture below it stays visible."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention in one stack of layers, of one example.

    ``probabilities`` float32 [L, N, T, S]; of an image [L, N, R, C], of its class token, or the
    mean of all patches. ``layers`` are the numbers of the layers, ``queries`` and ``keys`` the
    tokens, ``picture`` the image in [0, 1], [height, width, 1 or 3].
    """

    title: str
    probabilities: np.ndarray
    layers: tuple[int, ...]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    picture: np.ndarray | None = None


def attention_chart(maps: AttentionMaps, key: str) -> str:
    """Elements for all maps of a stack; ``key`` begins their ids, and is unique in a page."""
    if maps.picture is not None:
        return _overview(maps, key)
    return _overview(maps, key) + _labels(maps, key) + "".join(_layers(maps, key))


def _overview(maps: AttentionMaps, key: str) -> str:
    """Small maps, a row for each layer and a column for each head, over the picture if any."""
    layers, heads, rows, columns = maps.probabilities.shape
    height = _TILE * rows / columns
    step = _TILE + _GAP, height + _GAP
    width, whole = _MARGIN + heads * step[0], _MARGIN + layers * step[1]
    parts = [_defined(maps, key)]
    for head in range(heads):
        x = _MARGIN + head * step[0] + _TILE / 2
        parts.append(f'<text x="{x:.1f}" y="{_MARGIN - 8}" text-anchor="middle">{head}</text>')
    for i, layer in enumerate(maps.layers):
        y = _MARGIN + i * step[1]
        parts.append(
            f'<text x="{_MARGIN - 8}" y="{y + height / 2 + 4:.1f}" text-anchor="end">{layer}</text>'
        )
        for head in range(heads):
            x = _MARGIN + head * step[0]
            place = f'x="{x:.1f}" y="{y:.1f}" width="{_TILE}" height="{height:.1f}"'
            parts.append(_tile(maps, key, place, i, head))
    label = escape(f"{maps.title}: layers in rows, heads in columns")
    return (
        f'<div class="wide" tabindex="0"><svg class="maps" role="img" aria-label="{label}" '
        f'style="min-width:{width * 0.75:.0f}px;max-width:{width * 1.5:.0f}px" '
        f'viewBox="0 0 {width:.1f} {whole:.1f}">{"".join(parts)}</svg></div>'
    )


def _defined(maps: AttentionMaps, key: str) -> str:
    """What tiles show parts of: the image of all maps, a pixel for each probability, and the
    picture."""
    layers, heads, rows, columns = maps.probabilities.shape
    size = f'width="{heads * columns}" height="{layers * rows}"'
    found = f'<image id="{key}" class="sharp" {size} href="{_png(_colored(maps))}"/>'
    if maps.picture is not None:
        pixels = np.broadcast_to(maps.picture, (*maps.picture.shape[:2], 3))
        size = f'width="{columns}" height="{rows}" preserveAspectRatio="none"'
        found += f'<image id="{key}-picture" {size} href="{_png(pixels)}"/>'
    return f"<defs>{found}</defs>"


def _tile(maps: AttentionMaps, key: str, place: str, layer: int, head: int) -> str:
    """The map of one head at a ``place`` of a chart."""
    rows, columns = maps.probabilities.shape[2:]
    picture = f'<use href="#{key}-picture"/>' if maps.picture is not None else ""
    left, top = head * columns, layer * rows
    return (
        f'<svg {place} viewBox="0 0 {columns} {rows}">{picture}'
        f'<use href="#{key}" x="{-left}" y="{-top}"/><path class="frame" '
        f'd="M0 0H{columns}V{rows}H0Z"/></svg>'
    )


def _colored(maps: AttentionMaps) -> np.ndarray:
    """Float [L * R, N * C, 4]: one color, as opaque as a probability is high in its map."""
    values = maps.probabilities
    layers, heads, rows, columns = values.shape
    opacity = values / np.maximum(values.max(axis=(2, 3), keepdims=True), 1e-9)
    color = _OF_TEXT
    if maps.picture is not None:
        opacity, color = opacity * _STRONGEST_ON_IMAGE, _OF_IMAGE
    opacity = opacity.transpose(0, 2, 1, 3).reshape(layers * rows, heads * columns, 1)
    constant = np.broadcast_to(np.array(color) / 255.0, (*opacity.shape[:2], 3))
    return np.concatenate([constant, opacity], axis=-1)


def _png(pixels: np.ndarray) -> str:
    """A picture [height, width, 3 or 4] in [0, 1] as the URI of a PNG."""
    from matplotlib.image import imsave  # slow to import

    content = io.BytesIO()
    whole = np.ascontiguousarray(np.rint(np.clip(pixels, 0, 1) * 255.0).astype(np.uint8))
    imsave(content, whole, format="png")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _labels(maps: AttentionMaps, key: str) -> str:
    """The names of the tokens around a map, which the maps of all heads share."""
    texts = [
        f'<text x="{_LABEL - 3}" y="{_LABEL + (i + 0.78) * _CELL:.1f}" text-anchor="end">'
        f"{escape(_short(token))}</text>"
        for i, token in enumerate(maps.queries)
    ]
    for i, token in enumerate(maps.keys):
        x = _LABEL + (i + 0.78) * _CELL
        turned = f'transform="translate({x:.1f} {_LABEL - 3}) rotate(-90)"'
        texts.append(f"<text {turned}>{escape(_short(token))}</text>")
    return (
        f'<svg class="hidden" width="0" height="0"><defs><g id="{key}-tokens" class="tokens">'
        f"{''.join(texts)}</g></defs></svg>"
    )


def _short(token: str) -> str:
    return token if len(token) <= _LABEL_LENGTH else f"{token[: _LABEL_LENGTH - 1]}…"


def _layers(maps: AttentionMaps, key: str) -> Sequence[str]:
    """The maps of each layer with their tokens, below a summary to click on; one is open."""
    heads, rows, columns = maps.probabilities.shape[1:]
    size = _LABEL + columns * _CELL, _LABEL + rows * _CELL
    place = f'x="{_LABEL}" y="{_LABEL}" width="{columns * _CELL}" height="{rows * _CELL}"'
    found = []
    for i, layer in enumerate(maps.layers):
        cards = "".join(
            f'<figure><figcaption>layer {layer}, head {head}</figcaption><svg class="maps" '
            f'role="img" aria-label="layer {layer}, head {head}" viewBox="0 0 {size[0]} {size[1]}">'
            f'<use href="#{key}-tokens"/>{_tile(maps, key, place, i, head)}</svg></figure>'
            for head in range(heads)
        )
        opened = " open" if i == len(maps.layers) - 1 else ""
        found.append(
            f'<details name="{key}"{opened}><summary>layer {layer}</summary>'
            f'<div class="heads">{cards}</div></details>'
        )
    return found
