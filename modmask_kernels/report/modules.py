"""The learned modules to look at: for every weight, which masks keep it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgba
from matplotlib.image import imsave
from torch import Tensor

from ..files import write_text
from .html import template

Masks = Mapping[str, Tensor]

# Okabe and Ito's; green is what several masks keep
COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#8A7A00")
SHARED = "#009E73"
# weights beyond which a layer is counted and not drawn
MOST = 1 << 24


@dataclass(frozen=True)
class Layer:
    """A masked parameter on the page.

    Attributes:
        name, shape: of the parameter.
        image: PNG with one pixel per weight as a data URI, or None if it is too large.
        rows, columns: of the picture.
        kernel: pixels of an output and an input: those of a filter.
        gates: names of equal parts of the rows, if they are gates or projections.
        counts: (what, weights, per cent) by colour, first what no mask keeps.
    """

    name: str
    shape: str
    image: str | None
    rows: int
    columns: int
    kernel: tuple[int, int]
    gates: Sequence[str]
    counts: list[tuple[str, int, float]]


def owners(masks: Mapping[str, Tensor]) -> npt.NDArray[np.uint8]:
    """For every weight 0 if no mask keeps it, k if the k-th alone does, n + 1 if several do."""
    kept = np.stack([mask.cpu().numpy().astype(bool) for mask in masks.values()])
    count = kept.sum(0)
    alone = (kept * np.arange(1, len(kept) + 1).reshape(-1, *[1] * (kept.ndim - 1))).sum(0)
    return np.where(count > 1, len(kept) + 1, alone).astype(np.uint8)


def plane(codes: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """A parameter as a picture, outputs down and inputs across, and the pixels of each of them.

    Filters `[out, in, height, width]` lie beside each other as `height` x `width` pixels.
    """
    if codes.ndim <= 1:
        return codes.reshape(1, -1), (1, 1)
    if codes.ndim == 2:
        return codes, (1, 1)
    out, inputs, *kernel = codes.shape
    height, width = int(np.prod(kernel[:-1])), kernel[-1]
    picture = codes.reshape(out, inputs, height, width).transpose(0, 2, 1, 3)
    return picture.reshape(out * height, inputs * width), (height, width)


def gates_of(name: str, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """What equal parts of the rows are, as PyTorch orders them: gates, or query, key and value."""
    shape = shapes[name]
    if "in_proj_weight" in name and len(shape) == 2 and shape[0] == 3 * shape[1]:
        return ("query", "key", "value")
    recurrent = shapes.get(name.replace("weight_ih", "weight_hh"), ())
    if "weight_" in name and len(recurrent) == 2 and len(shape) == 2 and shape[0] == recurrent[0]:
        parts = recurrent[0] / recurrent[1]
        return {
            4: ("input gate", "forget gate", "cell", "output gate"),
            3: ("reset gate", "update gate", "new state"),
        }.get(int(parts) if parts == int(parts) else 0, ())
    return ()


def layers(masks: Mapping[str, Masks]) -> list[Layer]:
    """The parameters of several masks of one network.

    Args:
        masks: name of a function to its mask, at most `len(COLOURS)` of them.

    Raises:
        ValueError: too many masks, or masks of different networks.
    """
    if not 1 <= len(masks) <= len(COLOURS):
        raise ValueError(f"expected 1 to {len(COLOURS)} masks, got {len(masks)}")
    first, *others = masks.values()
    shapes = {name: tuple(first[name].shape) for name in first}
    for key, mask in zip(list(masks)[1:], others, strict=True):
        if {name: tuple(mask[name].shape) for name in mask} != shapes:
            raise ValueError(f"the mask {key} is of another network than {next(iter(masks))}")
    labels = ["none", *(f"{key} only" if len(masks) > 1 else key for key in masks)]
    labels += ["several"] if len(masks) > 1 else []
    palette = np.array(
        [(0.0, 0.0, 0.0, 0.0), *map(to_rgba, COLOURS[: len(masks)]), to_rgba(SHARED)]
    )
    result = []
    for name, shape in shapes.items():
        codes = owners({key: mask[name] for key, mask in masks.items()})
        counts = np.bincount(codes.ravel(), minlength=len(labels))
        picture, kernel = plane(codes)
        image = None
        if 0 < picture.size <= MOST:
            buffer = io.BytesIO()
            imsave(buffer, (255 * palette[picture]).round().astype(np.uint8), format="png")
            image = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        total = max(codes.size, 1)
        result.append(
            Layer(
                name=name,
                shape=" \N{MULTIPLICATION SIGN} ".join(map(str, shape)),
                image=image,
                rows=picture.shape[0],
                columns=picture.shape[1],
                kernel=kernel,
                gates=gates_of(name, shapes),
                counts=[
                    (label, int(count), 100 * int(count) / total)
                    for label, count in zip(labels, counts.tolist(), strict=True)
                ],
            )
        )
    return result


def write_modules(masks: Mapping[str, Masks], file: Path, title: str) -> str:
    """Write the page of the modules, self-contained; returns its path."""
    found = layers(masks)
    colours = ["", *COLOURS[: len(masks)], SHARED][: len(found[0].counts) if found else 1]
    text = template("modules.html").render(title=title, layers=found, colours=colours)
    write_text(file, text)
    return str(file)
