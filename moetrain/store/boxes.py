"""Rectangles of a logical tensor as (offset, shape): cutting one out of another, and whether some tile the whole. No torch."""

from math import prod

import numpy as np

Shape = tuple[int, ...]
Slices = tuple[slice, ...]


def overlap(a_offset: Shape, a_shape: Shape, b_offset: Shape, b_shape: Shape) -> tuple[Slices, Slices] | None:
    """Where two boxes meet, in the coordinates of each; None if they do not. Boxes of a scalar always meet."""
    in_a, in_b = [], []
    for a, a_size, b, b_size in zip(a_offset, a_shape, b_offset, b_shape, strict=True):
        start, stop = max(a, b), min(a + a_size, b + b_size)
        if start >= stop:
            return None
        in_a.append(slice(start - a, stop - a))
        in_b.append(slice(start - b, stop - b))
    return tuple(in_a), tuple(in_b)


def tiles(boxes: list[tuple[Shape, Shape]], shape: Shape) -> bool:
    """True if the boxes cover a tensor of this shape exactly once: inside it, pairwise apart, sizes adding up."""
    if boxes == [((0,) * len(shape), shape)]:
        return True
    if sum(prod(size) for _, size in boxes) != prod(shape) or not shape:
        return False
    start = np.array([offset for offset, _ in boxes]).reshape(len(boxes), len(shape))
    stop = start + np.array([size for _, size in boxes]).reshape(start.shape)
    if (start < 0).any() or (stop > np.array(shape)).any():
        return False
    meet = (np.maximum(start[:, None], start[None]) < np.minimum(stop[:, None], stop[None])).all(axis=2)
    return int(meet.sum()) == len(boxes)  # every box meets itself only
