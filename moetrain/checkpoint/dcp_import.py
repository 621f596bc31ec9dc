"""A DCP checkpoint with the names of `dcp.py`, however it is cut into chunks, as a new recovery point of a checkpoint folder."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from moetrain.base.checksum import crc32c
from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.dcp import AGAIN, FACTS, FORM, Facts, read_metadata, told
from moetrain.checkpoint.dcp_whole import check_facts, check_keys, parse
from moetrain.checkpoint.job import Receipt, SaveJob
from moetrain.checkpoint.merge import merge
from moetrain.checkpoint.plan import ObjectPlan, Part, lay_out
from moetrain.checkpoint.writer import attributes
from moetrain.store.backend import is_s3
from moetrain.store.boxes import Shape, overlap
from moetrain.store.encode import Encoded, bytes_of, encode, stored_dtype
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, Tensor
from moetrain.store.objects import CheckpointFolder

OBJECT_BYTES = 256 << 20  # what belongs to no expert is cut into objects of about this size


class DcpFolder:
    """Boxes of the tensors of a DCP checkpoint. Chunks that hold several experts are kept until `forget`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Metadata = read_metadata(path)
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(self.metadata, True)
        self._kept: dict[MetadataIndex, torch.Tensor] = {}

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        return {key: entry for key, entry in self.metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}

    def facts(self) -> Facts:
        """Raises CheckpointError when the checkpoint says nothing about progress and experts."""
        if FACTS not in self.metadata.state_dict_metadata:
            raise CheckpointError(f"{self.path} does not say how far training was and which tensors are experts.", FORM)
        index = MetadataIndex(FACTS)
        planner = _Into()
        self._read(ReadItem(LoadItemType.BYTE_IO, index, torch.Size((0,)), index, torch.Size((0,)), torch.Size((0,))), planner)
        try:
            facts = Facts(**json.loads(torch.load(BytesIO(planner.data), weights_only=True)))
            check_facts(facts)
        except ValueError as error:
            raise CheckpointError(f"The entry {FACTS} of {self.path} is damaged: {error}.", FORM) from error
        except Exception as error:  # somebody may have put anything there
            raise CheckpointError(f"The entry {FACTS} of {self.path} is damaged: {told(error)}.", FORM) from error
        return facts

    def box(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a tensor, in the type that the checkpoint gives it. Raises CheckpointError when it is not covered or unreadable."""
        entry = self.tensors()[key]
        whole, seen = torch.empty(shape, dtype=entry.properties.dtype), 0
        for number, chunk in enumerate(entry.chunks):
            cut = overlap(tuple(chunk.offsets), tuple(chunk.sizes), offset, shape)
            if cut is not None:
                values = self._chunk(key, number, chunk)[cut[0]]
                whole[cut[1]] = values
                seen += values.numel()
        if seen != whole.numel():
            raise CheckpointError(f"{self.path} holds {seen} of {whole.numel()} values of {key} at {list(offset)}.")
        return whole

    def forget(self) -> None:
        self._kept.clear()

    def _chunk(self, key: str, number: int, chunk: ChunkStorageMetadata) -> torch.Tensor:
        index = MetadataIndex(key, chunk.offsets, number)
        if index in self._kept:
            return self._kept[index]
        target = torch.empty(chunk.sizes, dtype=self.tensors()[key].properties.dtype)
        start = torch.Size((0,) * len(chunk.sizes))
        self._read(ReadItem(LoadItemType.TENSOR, index, start, index, start, chunk.sizes), _Into(target))
        if len(chunk.sizes) and chunk.sizes[0] > 1:
            self._kept[index] = target
        return target

    def _read(self, item: ReadItem, planner: "_Into") -> None:
        try:
            self._reader.read_data(LoadPlan([item]), planner).wait()
        except Exception as error:  # DCP checks nothing: a damaged file fails wherever it fails
            raise CheckpointError(f"{item.storage_index.fqn} in {self.path} cannot be read: {told(error)}.", AGAIN) from error


class _Into(LoadPlanner):
    """The planner of one read: into this tensor, or `data` for anything else."""

    def __init__(self, target: torch.Tensor | None = None) -> None:
        self._target = target
        self.data = b""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        self.data = value.read()

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert self._target is not None
        return self._target

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None: ...

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan([])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan


@dataclass(frozen=True)
class Source:
    """One logical tensor of ours and the DCP tensor that holds its values. `step`: the training step of the values."""

    part: Part
    key: str
    step: int

    def values(self, folder: DcpFolder) -> torch.Tensor:
        tensor = self.part.tensor
        lead = ((), ()) if tensor.expert is None else ((tensor.expert,), (1,))
        return folder.box(self.key, lead[0] + (0,) * len(tensor.shape), lead[1] + tensor.shape)


def read_into(folder: CheckpointFolder, source: DcpFolder, clock: Clock) -> Manifest:
    """Commits what the DCP checkpoint holds as the newest recovery point of the folder, which is claimed. A run can resume from it.

    One expert (or 256 MB of all else) is in memory at a time, more where a chunk holds several experts.
    Raises CheckpointError when something is missing or unreadable: the folder then has the recovery points it had, when a whole
    tensor is missing it is not even claimed, and where there was none there is none.
    """
    facts = source.facts()
    check_keys(facts, source.tensors().keys(), source.path)
    batches = list(_batches(_sources(source, facts)))
    places = () if is_s3(folder.path) else (folder.path, *folder.path.parents)  # an object store has no folders
    absent = [place for place in places if not folder.io.is_folder(place)]
    save = folder.claim(clock.now())
    job = SaveJob(
        folder=str(folder.path), save=save, parent=None, rank=0, world=1, index=facts.index, step=facts.step, mode=facts.mode,
        selection=None, objects=[], tensors=[], progress=facts.progress, keep=1, timeout_seconds=60.0,
    )  # fmt: skip
    whole = Receipt(0, facts.index, None, [], [])
    try:
        for batch in batches:
            records, tensors = _write(folder, source, batch, replace(job, step=batch[0].step))
            whole = replace(whole, objects=[*whole.objects, *records], tensors=[*whole.tensors, *tensors])
        manifest = replace(merge(job, [whole], None, clock.now()), ledger=facts.ledger)
        folder.commit(manifest)
    except (OSError, CheckpointError) as error:
        folder.abandon(save, str(error))
        if folder.path in absent and folder.newest_epoch() == save.epoch:  # nobody else came meanwhile
            _remove(folder, absent)
        raise
    return manifest


def _remove(folder: CheckpointFolder, made: list[Path]) -> None:
    """The folder, and those above it that were made for it."""
    with suppress(OSError):
        folder.io.remove_tree(folder.path)
        for place in made[1:]:
            place.rmdir()


def _sources(source: DcpFolder, facts: Facts) -> Iterator[Source]:
    """Every logical tensor that the checkpoint holds, stacks of experts taken apart."""
    bank_of = {name: bank for bank, about in facts.banks.items() for name in about["names"]}
    for key, entry in source.tensors().items():
        name, component = parse(key, source.path)
        dtype, shape = str(entry.properties.dtype).removeprefix("torch."), tuple(entry.size)
        bank = bank_of.get(name)
        if bank is None:
            yield Source(_part(name, component, None, None, dtype, shape), key, facts.step)
            continue
        if not shape or shape[0] != facts.banks[bank]["experts"]:
            raise CheckpointError(f"{key} has the shape {list(shape)}, but {bank} has {facts.banks[bank]['experts']} experts.", FORM)
        for expert, step in enumerate(facts.steps[bank][component]):
            yield Source(_part(name, component, bank, expert, dtype, shape[1:]), key, step)


def _part(name: str, component: str, bank: str | None, expert: int | None, dtype: str, shape: Shape) -> Part:
    return Part(Tensor(name, component, bank, expert, dtype, shape, (Piece((0,) * len(shape), shape, object=""),)), (0,))


def _batches(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """What goes into one share: experts whose values are of one step, or some of what belongs to no expert."""
    experts: dict[int, list[Source]] = defaultdict(list)
    dense: list[Source] = []
    for source in sources:
        if source.part.tensor.group is not None:
            experts[source.step].append(source)
            continue
        if dense and sum(member.part.num_bytes for member in [*dense, source]) > OBJECT_BYTES:
            yield dense
            dense = []
        dense.append(source)
    yield from ([dense] if dense else [])
    yield from experts.values()


def _write(folder: CheckpointFolder, source: DcpFolder, batch: list[Source], job: SaveJob) -> tuple[list[ObjectRecord], list[Tensor]]:
    """One share, durable when it returns: its objects, and the tensors in them."""
    share = folder.new_share(job.save, job.rank)
    plans = lay_out([replace(member.part, number=number) for number, member in enumerate(batch)])
    records: list[ObjectRecord] = []
    tensors: list[Tensor] = []

    def objects() -> Iterator[tuple[str, Encoded]]:
        bank = None
        for plan in plans:
            if plan.tensors[0].bank != bank:
                source.forget()
                bank = plan.tensors[0].bank
            name = f"{share}/{plan.label}"
            values, placed = _fill(source, plan, [batch[number] for number in plan.parts], name)
            encoded = encode(values, attributes(job, placed))
            num_bytes = len(encoded.metadata) + sum(len(buffer) for buffer in encoded.data)
            records.append(ObjectRecord(name, job.step, num_bytes, crc32c(encoded.metadata)))
            tensors.extend(placed)
            yield plan.label, encoded

    folder.put_share(share, objects())
    return records, tensors


def _fill(source: DcpFolder, plan: ObjectPlan, members: list[Source], name: str) -> tuple[np.ndarray, list[Tensor]]:
    """The values of an object, and its tensors with their place and checksum in it."""
    values, placed = np.empty(plan.size, stored_dtype(plan.dtype)), []
    for tensor, member in zip(plan.tensors, members, strict=True):
        (piece,) = tensor.pieces
        found = member.values(source)
        if member.part.is_value:
            piece = replace(piece, object=name, value=int(found.reshape(())))
        else:
            part = values[piece.start : piece.start + member.part.size]
            part[:] = found.contiguous().view(-1).view(getattr(torch, plan.dtype)).numpy()
            piece = replace(piece, object=name, crc=crc32c(bytes_of(part)))
        placed.append(replace(tensor, pieces=(piece,)))
    return values, placed
