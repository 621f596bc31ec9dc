"""From live fragments to slots of the arena: the one place where saving touches tensors."""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from moetrain.checkpoint.plan import ObjectPlan, Part
from moetrain.model.state import Fragment, ModelState
from moetrain.store.encode import stored_dtype
from moetrain.store.manifest import WEIGHT16, Piece, Tensor


class Ready:
    """The moment of a save on the GPU: the copy reads what was computed before it, on a stream of its own. Nothing on a CPU."""

    def __init__(self, state: ModelState) -> None:
        self._device = next((fragment.data.device for fragment in state if fragment.data.is_cuda), None)
        if self._device is not None:
            self._event = torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Copies inside start after that moment and are complete at the end."""
        if self._device is None:
            yield
            return
        stream = torch.cuda.Stream(self._device)
        stream.wait_event(self._event)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()


def shown(state: ModelState, mode: str) -> ModelState:
    """What a checkpoint of this mode may hold: with `weights16` also every expert's master as bfloat16, converted while it is copied."""
    if mode != "weights16":
        return state
    return state + [replace(fragment, component=WEIGHT16) for fragment in state if fragment.bank and fragment.component == "master"]


def parts_of(state: ModelState) -> list[Part]:
    """The fragments without their data, in the same order."""
    parts = []
    for number, fragment in enumerate(state):
        piece = Piece(tuple(fragment.box.offset), tuple(fragment.box.shape), object="")
        dtype = "bfloat16" if fragment.component == WEIGHT16 else str(fragment.data.dtype).removeprefix("torch.")
        shape = tuple(fragment.logical_shape)
        tensor = Tensor(fragment.name, fragment.component, fragment.bank, fragment.expert, dtype, shape, (piece,))
        parts.append(Part(tensor, tuple(fragment.holders), number))
    return parts


@torch.no_grad()
def copy_fragments(state: ModelState, plans: list[ObjectPlan], slots: Sequence[mmap.mmap], ready: Ready) -> list[ObjectPlan]:
    """Copies the planned parts of fragments, each object into its slot; complete when it returns.

    The plans come back with the values of integer scalars.
    """
    filled = []
    with ready.stream():
        for plan, slot in zip(plans, slots, strict=True):
            tensors = []
            for number, tensor in zip(plan.parts, plan.tensors, strict=True):
                data, (piece,) = cut(state[number], tensor), tensor.pieces
                if Part(tensor, ()).is_value:
                    piece = replace(piece, value=int(data))
                else:
                    offset = piece.start * stored_dtype(plan.dtype).itemsize
                    target = torch.frombuffer(slot, dtype=getattr(torch, tensor.dtype), count=data.numel(), offset=offset)
                    target.view(data.shape).copy_(data)
                tensors.append(replace(tensor, pieces=(piece,)))
            filled.append(replace(plan, tensors=tensors))
    return filled


def cut(fragment: Fragment, tensor: Tensor) -> torch.Tensor:
    """The rows of a fragment that the one piece of `tensor` names, a view."""
    (piece,) = tensor.pieces
    starts = [mine - whole for mine, whole in zip(piece.offset, fragment.box.offset, strict=True)]
    return fragment.data.detach()[tuple(slice(start, start + size) for start, size in zip(starts, piece.shape, strict=True))]
