"""What an engine shows of its state and a checkpointer saves: flat pieces of tensors with logical names. Pure data.

A fragment never spans two experts; a module shared by two layers appears once.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

COMPONENTS = ("master", "m", "v", "step")


@dataclass(frozen=True)
class Box:
    """A rectangle of the logical tensor: `offset[i] <= index[i] < offset[i] + shape[i]`."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> "Box":
        return cls((0,) * len(shape), shape)

    @property
    def size(self) -> int:
        return prod(self.shape)


@dataclass
class Fragment:
    """One rank's piece of one component of one parameter (or persistent buffer).

    name           parameter name, `blocks.0.moe.experts.down_proj`; the same on every rank and at every EP
    component      master (what the optimizer updates) | m | v (Adam moments) | step (Adam's count of updates, shape ())
    bank, expert   the expert bank and the expert's global number; both None for everything else
    logical_shape  of the whole parameter; for an expert, of that one expert's slice (no leading expert axis)
    box            which part of logical_shape `data` is; data.shape == box.shape
    holders        global ranks whose bytes for this box are equal; the writer is chosen among them
    data           a view into live state: it changes at the next update
    """

    name: str
    component: str
    bank: str | None
    expert: int | None
    logical_shape: tuple[int, ...]
    box: Box
    holders: tuple[int, ...]
    data: Tensor

    def __post_init__(self) -> None:
        assert tuple(self.data.shape) == self.box.shape, f"{self.key} shows {tuple(self.data.shape)} as {self.box}"

    @property
    def key(self) -> str:
        """Unique among logical tensors: `name:component` or `name:component:expert`."""
        return f"{self.name}:{self.component}" + ("" if self.expert is None else f":{self.expert}")

    @property
    def num_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


ModelState = list[Fragment]


def assemble(fragments: list[Fragment]) -> dict[str, Tensor]:
    """Whole logical tensors by key from the fragments of one or more ranks; for tests and one-process readers.

    Raises ValueError when a key is not covered completely.
    """
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for fragment in fragments:
        target = whole.setdefault(fragment.key, torch.empty(fragment.logical_shape, dtype=fragment.data.dtype))
        mask = seen.setdefault(fragment.key, torch.zeros(fragment.logical_shape, dtype=torch.bool))
        where = tuple(slice(o, o + s) for o, s in zip(fragment.box.offset, fragment.box.shape, strict=True))
        target[where] = fragment.data.detach().cpu()
        mask[where] = True
    for key, mask in seen.items():
        if not bool(mask.all()):
            raise ValueError(f"{key} is not covered: {int((~mask).sum())} of {mask.numel()} values are missing")
    return whole
