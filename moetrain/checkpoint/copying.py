"""From live fragments to the arena: the one place where saving touches tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from moetrain.checkpoint.arena import Arena
from moetrain.checkpoint.plan import ObjectPlan, Part
from moetrain.model.state import ModelState
from moetrain.store.encode import stored_dtype
from moetrain.store.manifest import Piece, Tensor


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


def parts_of(state: ModelState) -> list[Part]:
    """The fragments without their data, in the same order."""
    parts = []
    for fragment in state:
        piece = Piece(tuple(fragment.box.offset), tuple(fragment.box.shape), object="")
        dtype = str(fragment.data.dtype).removeprefix("torch.")
        shape = tuple(fragment.logical_shape)
        tensor = Tensor(fragment.name, fragment.component, fragment.bank, fragment.expert, dtype, shape, (piece,))
        parts.append(Part(tensor, tuple(fragment.holders)))
    return parts


@torch.no_grad()
def copy_fragments(state: ModelState, plans: list[ObjectPlan], arena: Arena, ready: Ready) -> list[ObjectPlan]:
    """Copies the planned fragments; complete when it returns. The plans come back with the values of integer scalars."""
    filled = []
    with ready.stream():
        for plan in plans:
            tensors = []
            for number, tensor in zip(plan.parts, plan.tensors, strict=True):
                data, (piece,) = state[number].data.detach(), tensor.pieces
                if Part(tensor, ()).is_value:
                    piece = replace(piece, value=int(data))
                else:
                    offset = plan.offset + piece.start * stored_dtype(plan.dtype).itemsize
                    target = torch.frombuffer(arena.memory, dtype=data.dtype, count=data.numel(), offset=offset)
                    target.view(data.shape).copy_(data)
                tensors.append(replace(tensor, pieces=(piece,)))
            filled.append(replace(plan, tensors=tensors))
    return filled
