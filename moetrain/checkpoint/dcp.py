"""Recovery points as folders of torch.distributed.checkpoint (DCP) that its stock reader loads and reshards.

Names are those of the state dictionary {"model": ..., "optimizer": ...} as DCP flattens it. The experts of a bank are one tensor
[E, ...] with a chunk for each expert:

    model.<name>                            weights (float32 masters; of an expert with a newer bfloat16 copy that copy)
    optimizer.state.<name>.exp_avg          m
    optimizer.state.<name>.exp_avg_sq       v
    optimizer.state.<name>.step             Adam's count of updates, int64: () or, for experts, [E]
    moetrain                                a string of JSON: what else a recovery point says (`Facts`)
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from moetrain.base.errors import CheckpointError
from moetrain.base.files import sync, whole_folder
from moetrain.checkpoint.choose import open_object
from moetrain.checkpoint.recover import read_piece
from moetrain.store.encode import ArrayReader
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, Tensor
from moetrain.store.objects import CheckpointFolder

KEYS = {"master": "model.{}", "m": "optimizer.state.{}.exp_avg", "v": "optimizer.state.{}.exp_avg_sq", "step": "optimizer.state.{}.step"}
FACTS = "moetrain"
FORM = "It must be named as `moetrain checkpoint convert --to dcp` names it, the string `moetrain` included."
AGAIN = "Write it again, or take another step of the tree."
METADATA = ".metadata"  # written last: a folder without it is no checkpoint

Written = dict[MetadataIndex, _StorageInfo]
"""Where the chunks of one data file lie; paths as that checkpoint's `.metadata` says them."""
Find = Callable[[set[Path]], dict[Path, Written]]
"""What is known of data files that earlier checkpoints wrote."""


@dataclass(frozen=True)
class Facts:
    """What DCP has no place for. `banks`: parameter names and number of experts; `steps`: per bank and component the training step
    of every expert's values; `keys`: every tensor that belongs to it, none in checkpoints of older versions."""

    save: str
    step: int
    index: int
    mode: str
    progress: dict
    ledger: dict
    banks: dict[str, dict]
    steps: dict[str, dict[str, list[int]]]
    keys: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, point: Manifest) -> "Facts":
        banks: dict[str, dict] = {bank: {"experts": count, "names": []} for bank, count in point.banks().items()}
        steps: dict[str, dict[str, list[int]]] = {bank: {} for bank in banks}
        keys = set[str]()
        for tensor in freshest(point):
            keys.add(KEYS[tensor.component].format(tensor.name))
            if tensor.bank is None or tensor.expert is None:
                continue
            if tensor.name not in banks[tensor.bank]["names"]:
                banks[tensor.bank]["names"].append(tensor.name)
            row = steps[tensor.bank].setdefault(tensor.component, [point.step] * banks[tensor.bank]["experts"])
            row[tensor.expert] = min(row[tensor.expert], point.step_of(tensor))
        return cls(str(point.save), point.step, point.index, point.mode, point.progress, point.ledger, banks, steps, sorted(keys))

    def text(self) -> str:
        return json.dumps(asdict(self))


def freshest(point: Manifest) -> list[Tensor]:
    """The tensors of a recovery point, the bfloat16 copy of an expert's weight in place of an older master."""
    kept = (tensor for tensor in point.tensors.values() if tensor.component in KEYS)
    return [replace(point.newest_weights(tensor), component=tensor.component) for tensor in kept]


@dataclass(frozen=True)
class Chunk:
    """One piece of ours as a box of a DCP tensor."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    piece: Piece
    dtype: str

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.offset)

    def values(self, reader: ArrayReader) -> torch.Tensor:
        """Read and verified. Raises CheckpointError."""
        if self.piece.value is not None:
            return torch.tensor(self.piece.value, dtype=getattr(torch, self.dtype)).reshape(self.shape)
        return read_piece(reader, self.piece, self.dtype).reshape(self.shape)


def chunks_of(point: Manifest) -> list[Chunk]:
    """Every piece of a recovery point, an expert's with its number as a leading coordinate."""
    chunks = []
    for tensor in freshest(point):
        lead = ((), ()) if tensor.expert is None else ((tensor.expert,), (1,))
        for piece in tensor.pieces:
            offset, shape = lead[0] + piece.offset, lead[1] + piece.shape
            chunks.append(Chunk(KEYS[tensor.component].format(tensor.name), offset, shape, piece, tensor.dtype))
    return chunks


def tensors_of(point: Manifest) -> dict[str, TensorStorageMetadata]:
    """Shape, type and chunks of every DCP tensor. A bfloat16 copy that stands in for a float32 weight is cast by whoever loads it."""
    experts = point.banks()
    boxes: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    for chunk in chunks_of(point):
        boxes[chunk.key].append(ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)))
    found = {}
    for tensor in freshest(point):
        key = KEYS[tensor.component].format(tensor.name)
        shape = tensor.shape if tensor.bank is None else (experts[tensor.bank], *tensor.shape)
        dtype = point.tensors[tensor.key].dtype
        found[key] = TensorStorageMetadata(TensorProperties(getattr(torch, dtype)), torch.Size(shape), boxes[key])
    return found


def path_of(key: str) -> tuple[str, ...]:
    """Where a flat key lies in the nested state dictionary."""
    if key.startswith("model."):
        return "model", key.removeprefix("model.")
    if key.startswith("optimizer.state."):
        name, _, leaf = key.removeprefix("optimizer.state.").rpartition(".")
        return "optimizer", "state", name, leaf
    return (key,)


def write_whole(folder: CheckpointFolder, point: Manifest, target: Path) -> None:
    """One recovery point as a DCP checkpoint complete in itself; `target` appears when it is whole.

    One piece is in memory at a time. Raises CheckpointError when the target is taken or a piece is damaged.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists.", "Give a folder that does not exist as --out.")
    with whole_folder(target.absolute()) as draft:
        _write_point(folder, point, draft, lambda record: draft, lambda files: {})


class Tree:
    """A folder of DCP checkpoints `step-<step>`, each of which holds what its save wrote and refers to older ones for the rest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder_of(self, step: int) -> Path:
        return self.path / f"step-{step}"

    def has(self, point: Manifest) -> bool:
        folder = self.folder_of(point.step)
        return (folder / METADATA).is_file() and (folder / facts_file(point)).is_file()

    def add(self, folder: CheckpointFolder, point: Manifest) -> Path:
        """Publishes a recovery point; of two with the same step the one added last stands. What older ones hold is not written again.

        A crash leaves the checkpoints that were there before; the next call goes on. Raises CheckpointError when a piece is damaged.
        """
        target = self.folder_of(point.step)
        target.mkdir(parents=True, exist_ok=True)
        _write_point(folder, point, target, lambda record: self.folder_of(record.step), partial(self._known, target))
        sync(self.path)
        return target

    def _known(self, target: Path, files: set[Path]) -> dict[Path, Written]:
        """Those of the files that published checkpoints refer to, paths as seen from `target`. Others may be torn and are written again."""
        known: dict[Path, Written] = defaultdict(dict)
        missing = {file for file in files if file.is_file()}
        names = (path.parent.name.removeprefix("step-") for path in self.path.glob(f"step-*/{METADATA}"))
        steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)  # somebody may keep a copy, step-7.bak
        for step in steps:  # the newest refer to almost all of them
            if not missing:
                break
            for index, info in read_metadata(self.folder_of(step)).storage_data.items():
                file = Path(os.path.normpath(self.folder_of(step) / info.relative_path))
                known[file][index] = _StorageInfo(os.path.relpath(file, target), info.offset, info.length)
                missing.discard(file)
        return known


def facts_file(point: Manifest) -> str:
    return f"{point.save}.{FACTS}.distcp"


def read_metadata(folder: Path) -> Metadata:
    """Raises CheckpointError when the folder is no DCP checkpoint. DCP's metadata is a pickle: read only what you trust."""
    if not (folder / METADATA).is_file():
        raise CheckpointError(f"{folder} is no DCP checkpoint: it has no file {METADATA}.", "Name the folder that dcp.save wrote.")
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged pickle does
        raise CheckpointError(f"{folder / METADATA} is damaged: {told(error)}.", AGAIN) from error


def told(error: Exception) -> str:
    """What DCP or a pickle said, in words that may stand in a sentence."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    first = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{first} ({type(error).__name__})" if first else type(error).__name__


def _write_point(folder: CheckpointFolder, point: Manifest, target: Path, place: Callable[[ObjectRecord], Path], find: Find) -> None:
    """The data files that are not to be found, then `.metadata`, which is the commit."""
    members: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks_of(point):
        members[chunk.piece.object].append(chunk)
    files = {name: place(point.objects[name]) / f"{name.replace('/', '.')}.distcp" for name in members}
    known, written = find(set(files.values())), Written()
    for name, chunks in members.items():
        file = files[name]
        if file in known and not known[file].keys() >= {chunk.index for chunk in chunks}:  # nothing that is referred to is replaced
            file = file.with_name(f"{file.stem}.{point.save}.distcp")
        if file not in known or not file.is_file():
            known[file] = _write_object(folder, point.objects[name], chunks, file, target)
        written |= {chunk.index: known[file][chunk.index] for chunk in chunks}
    with _new_file(target / facts_file(point)) as stream:
        written |= _put(stream, MetadataIndex(FACTS), Facts.of(point).text(), facts_file(point))
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors_of(point), FACTS: BytesStorageMetadata()}
    metadata = Metadata(entries, planner_data={key: path_of(key) for key in entries})
    FileSystemWriter(target).finish(metadata, [[WriteResult(index, info.length, info) for index, info in written.items()]])
    sync(target)


def _write_object(folder: CheckpointFolder, record: ObjectRecord, chunks: list[Chunk], file: Path, target: Path) -> Written:
    """One object of ours as one file of DCP's, in the frames its reader expects."""
    written: Written = {}
    reader = open_object(folder, record)
    with _new_file(file) as stream:
        for chunk in sorted(chunks, key=lambda chunk: chunk.piece.start):
            written |= _put(stream, chunk.index, chunk.values(reader), os.path.relpath(file, target))
    return written


def _put(stream: BinaryIO, index: MetadataIndex, value: torch.Tensor | str, path: str) -> Written:
    start = stream.tell()
    torch.save(value, stream)
    return {index: _StorageInfo(path, start, stream.tell() - start)}


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Written under another name, synced, then renamed: whole from its first moment. Replaces an earlier one of that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)
