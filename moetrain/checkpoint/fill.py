"""Reads objects into live state: several side by side, and right into the tensors wherever what was saved has their shape."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from moetrain.base.cores import cores_of_rank
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.source import ObjectReader, Sources
from moetrain.model.state import Fragment, ModelState
from moetrain.store.boxes import overlap
from moetrain.store.encode import stored_dtype
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, Tensor

OTHER_MODEL = "The model's configuration is not the one that was saved."
READERS = 4  # threads: reading, checking and copying all let other threads run


@dataclass(frozen=True)
class Want:
    """A piece of an object, and the fragment that some of it belongs in."""

    piece: Piece
    dtype: str
    fragment: Fragment


def fill(manifest: Manifest, state: ModelState, sources: Sources) -> tuple[dict[str, str], Counter[str]]:
    """Object name -> damage of what could not be read; the fragments of the others are filled. And the bytes from memory, by source."""
    wanted: dict[str, list[Want]] = defaultdict(list)
    for fragment in state:
        tensor = manifest.newest_weights(tensor_of(manifest, fragment))
        for piece in tensor.pieces:
            if overlap(piece.offset, piece.shape, fragment.box.offset, fragment.box.shape) is None:
                continue
            if piece.value is not None:
                fragment.data.detach().fill_(piece.value)
            else:
                wanted[piece.object].append(Want(piece, tensor.dtype, fragment))
    damage: dict[str, str] = {}
    from_memory: Counter[str] = Counter()

    def read(record: ObjectRecord) -> tuple[str, Counter[str]]:
        reader = sources.open(record)
        return _read_object(reader, wanted[record.name]), reader.bytes_from

    copiers = min(READERS, cores_of_rank())  # what is in memory needs no waiting: more threads than cores push each other out of the caches
    with ThreadPoolExecutor(READERS, "checkpoint-read") as waiting, ThreadPoolExecutor(copiers, "checkpoint-copy") as copying:
        names = sorted(wanted, key=sources.is_here)
        futures = [(copying if sources.is_here(name) else waiting).submit(read, manifest.objects[name]) for name in names]
        for name, future in zip(names, futures, strict=True):
            sentence, count = future.result()
            from_memory.update(count)
            if sentence:
                damage[name] = sentence
    return damage, from_memory


def _read_object(reader: ObjectReader, wanted: list[Want]) -> str:
    """What is wrong with it; "" when everything is filled."""
    try:
        for want in sorted(wanted, key=lambda want: want.piece.start):
            own = own_memory(want)
            values = reader.read(want.piece, own)
            if values is not own:
                cut = overlap(want.piece.offset, want.piece.shape, want.fragment.box.offset, want.fragment.box.shape)
                assert cut is not None
                want.fragment.data.detach()[cut[1]].copy_(as_tensor(values, want.piece, want.dtype)[cut[0]])
    except CheckpointError as error:
        return error.message
    return ""


def own_memory(want: Want) -> np.ndarray | None:
    """The fragment's memory as flat stored values; None where the piece is another box or type than it, or its memory is elsewhere."""
    data, box = want.fragment.data.detach(), want.fragment.box
    is_same = (tuple(box.offset), tuple(box.shape), dtype_name(data)) == (want.piece.offset, want.piece.shape, want.dtype)
    if not is_same or data.device.type != "cpu" or not data.is_contiguous():
        return None
    return data.reshape(-1).view(torch.uint8).numpy().view(stored_dtype(want.dtype))


def tensor_of(manifest: Manifest, fragment: Fragment) -> Tensor:
    """Raises CheckpointError when there is none, or one of another shape."""
    tensor = manifest.tensors.get(fragment.key)
    if tensor is None:
        raise CheckpointError(f"The checkpoint of step {manifest.step} has no {fragment.key}.", OTHER_MODEL)
    if tensor.shape != tuple(fragment.logical_shape):
        shapes = f"{list(tensor.shape)} in the checkpoint and {list(fragment.logical_shape)} in this model"
        raise CheckpointError(f"{fragment.key} has shape {shapes}.", OTHER_MODEL)
    return tensor


def dtype_name(data: torch.Tensor) -> str:
    return str(data.dtype).removeprefix("torch.")


def as_tensor(values: np.ndarray, piece: Piece, dtype: str) -> torch.Tensor:
    """The flat stored values of a box as a tensor of its own type."""
    return torch.from_numpy(values).view(getattr(torch, dtype)).reshape(piece.shape)
