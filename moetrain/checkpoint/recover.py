"""Putting a recovery point back into live state, whatever the world size and expert placement it was saved with."""

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from moetrain.base.errors import CheckpointError
from moetrain.base.garbage import collector_paused
from moetrain.base.log import logger
from moetrain.checkpoint.choose import (
    Choice,
    Look,
    PointsInMemory,
    check_object,
    choose,
    glance,
    nothing_in_memory,
    read_values,
)
from moetrain.checkpoint.fill import OTHER_MODEL, as_tensor, dtype_name, fill, tensor_of
from moetrain.checkpoint.modes import is_derived
from moetrain.checkpoint.removed import removed
from moetrain.checkpoint.source import DISK, Memory, Sources
from moetrain.checkpoint.table import expert_table, size
from moetrain.model.state import ModelState
from moetrain.store.encode import ArrayReader
from moetrain.store.history import History
from moetrain.store.io import Io
from moetrain.store.manifest import Group, Manifest, ObjectRecord, Piece
from moetrain.store.objects import CheckpointFolder, resolve

Agree = Callable[[object], object]
"""Every rank gets what rank 0 passed; other ranks pass None. The identity in one process."""
Gather = Callable[[object], list[object]]
"""Every rank gets what every rank passed, in order of rank. A list of one in one process."""

MEET_SECONDS = 5.0  # far below any time limit of a collective


def alone(value: object) -> object:
    """The agreement of one process."""
    return value


@dataclass(frozen=True)
class LoadReport:
    """What was restored. `ages`: for every expert, how many steps older than `step` its state is."""

    folder: Path
    progress: dict
    seq: int
    step: int
    ages: dict[Group, int]
    remapped: list[str]
    damaged: list[str]
    is_converted: bool = False  # to another number type
    is_from_memory: bool = False  # of nodes; the folder may hold only an older recovery point
    weight_ages: dict[Group, int] = field(default_factory=dict)  # as `ages`, of the weights alone
    read: dict[str, int] = field(default_factory=dict)  # bytes by source, of all ranks

    def lines(self) -> list[str]:
        """Sentences for the log, with the age of every expert group as a table of layers by experts."""
        lines = [f"Resumed from step {self.step} (seq {self.seq}) in {self.folder}.", *self.damaged, *self.remapped]
        if self.read:
            lines.append("Read " + ", ".join(f"{size(num_bytes)} from {source}" for source, num_bytes in self.read.items()) + ".")
        if self.ages:
            lines += ["Age of every expert group in steps:", *expert_table(self.ages)]
        return lines

    def age_rows(self) -> list[list[int]]:
        """The ages as layers x experts."""
        return _rows(self.ages)

    def weight_age_rows(self) -> list[list[int]]:
        return _rows(self.weight_ages)


def _rows(ages: dict[Group, int]) -> list[list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for (bank, _), age in ages.items():
        rows[bank].append(age)
    return list(rows.values())


def from_rank_zero(rank: int, agree: Agree, compute: Callable[[], str | None]) -> str | None:
    """What `compute` gives on rank 0, on every rank; a CheckpointError there is raised on every rank, so that none waits."""
    value = _value(agree(_answer(compute) if rank == 0 else None))
    assert value is None or isinstance(value, str)
    return value


def together(work: Callable[[], object], gather: Gather) -> list[object]:
    """What `work` gives on every rank, in order of rank; JSON-able. An error on one rank is a CheckpointError on every rank.

    Meanwhile the ranks meet every few seconds, so that no collective waits for a slow disk.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(_answer, work)
        answers: list[object] = [None]
        while None in answers:
            wait([future], MEET_SECONDS)
            answers = gather(future.result() if future.done() else None)
    own = future.result()
    if (own[0] or own[1]) and own not in answers:  # a `gather` that brings rank 0's answer only
        raise CheckpointError(f"The other ranks cannot hear what this one found: {own[1] or own[0]}.")
    return [_value(answer) for answer in answers]


def _answer(work: Callable[[], object]) -> list[object]:
    """[value, message, hint]: a message when there is no value."""
    try:
        return [work(), None, ""]
    except CheckpointError as error:
        return [None, error.message, error.hint]
    except OSError as error:
        return [None, f"{error.filename} cannot be used: {error.strerror}.", ""]
    except Exception as error:  # no memory left, or a mistake of ours: the other ranks wait for an answer all the same
        logger("checkpoint").exception("A step of the recovery failed.")
        return [None, f"The recovery failed on one rank: {type(error).__name__}: {error}.", "The log of that rank says where."]


def _value(answer: object) -> object:
    assert isinstance(answer, list | tuple)
    value, message, hint = answer
    if message is not None:
        raise CheckpointError(message, hint)
    return value


def agreed_choice(
    folder: Path, at: str, io: Io | None = None, look: Look = check_object, in_memory: PointsInMemory = nothing_in_memory
) -> Choice | None:
    """The recovery point to restore. `at`: auto (own folder, None when it has none) | must | never | a path.

    Of this run's own folder what lies in memory counts too, and where `in_memory` finds something there, a path only if that is damaged.
    By default all of it is read, so that it is known to be good before any state is touched.
    Raises CheckpointError when there is none (must, a path) or none is good.
    """
    if at == "never":
        return None
    path = folder if at in ("auto", "must") else resolve(Path(at))
    if path != folder and in_memory(History(None)):
        with suppress(CheckpointError):
            return choose(folder, io or Io(), look, in_memory)
    choice = choose(path, io or Io(), look, in_memory if path == folder else nothing_in_memory)
    if choice is None and at != "auto":
        raise CheckpointError(f"There is no checkpoint in {path}.", "Start anew with checkpoint.resume=auto.")
    return choice


@collector_paused()
def restore_together(
    folder: Path, at: str, state: ModelState, rank: int, world: int, gather: Gather, io: Io | None = None, memory: Memory | None = None,
    keep: int = 1,
) -> tuple[Choice, LoadReport] | None:  # fmt: skip
    """The same recovery point into the state of every rank; `folder`, `at` and errors as in `agreed_choice`, on every rank.

    Rank 0 chooses the newest, every rank checks every byte that it reads. What one of them finds damaged is passed over by all, which
    choose again, now at a glance on everything, and read again: after an error, and only then, the state is a mixture.
    `memory`: what lies in the memory of the nodes. An object there and its twin on disk have one name and two records: a finding is about
    the record that was read, so that damage in memory leaves what is on disk to be tried. `keep`: how many recovery points sweeps leave;
    rank 0 warns of others that are gone.
    """
    memory = memory or Memory.empty()
    found: dict[ObjectRecord, str] = {}

    def look(folder: CheckpointFolder, record: ObjectRecord, pieces: list[Piece]) -> str:
        if not found or record in found or record.name in memory:
            return found.get(record, "")
        return glance(folder, record, pieces)

    def pick() -> list | None:
        choice = agreed_choice(folder, at, io, look, memory.points) if rank == 0 else None
        if choice and not found:
            _warn_of_removed(CheckpointFolder(choice.folder, io or Io()), keep)
        return choice and [str(choice.folder), choice.manifest.to_bytes().decode(), choice.damage, choice.is_in_memory]

    while (picked := together(pick, gather)[0]) is not None:
        assert isinstance(picked, list)
        path, manifest, damage, is_in_memory = picked
        choice = Choice(Path(path), Manifest.from_bytes(manifest.encode(), "the manifest of rank 0"), damage, is_in_memory)
        _check_that_all_is_wanted(choice.manifest, state, world, gather)
        bad, read = _merged(together(partial(_read, choice, state, world, io or Io(), memory), gather))
        if not bad:
            return choice, replace(describe(choice, state, world), read=read)
        found |= {choice.manifest.objects[name]: sentence for name, sentence in bad.items()}
    if found:
        raise CheckpointError(f"The checkpoints in {folder} went away while one of them was read.", "Start again when the folder is back.")
    return None


def _check_that_all_is_wanted(manifest: Manifest, state: ModelState, world: int, gather: Gather) -> None:
    """Raises CheckpointError on every rank when none of them holds a tensor of the checkpoint: the next one could not refer to it."""
    own = {fragment.key for fragment in state}
    keys = [key for key, tensor in manifest.tensors.items() if not is_derived(tensor)]
    said = together(lambda: f"{sum(1 << bit for bit, key in enumerate(keys) if key in own):x}", gather)
    if len(said) != world:  # a `gather` that brings rank 0's answer only
        return
    held = 0
    for bits in said:
        held |= int(str(bits), 16)
    if left := [key for bit, key in enumerate(keys) if not held >> bit & 1]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise CheckpointError(f"The checkpoint of step {manifest.step} has {left[0]}{more}, which this model lacks.", OTHER_MODEL)


def _warn_of_removed(folder: CheckpointFolder, keep: int) -> None:
    with suppress(OSError, CheckpointError):  # of a damaged manifest the choice tells
        for sentence in removed(folder, keep):
            logger("checkpoint").warning(sentence)


def _read(choice: Choice, state: ModelState, world: int, io: Io, memory: Memory) -> list[dict]:
    describe(choice, state, world)
    folder = CheckpointFolder(choice.folder, io)
    before = folder.io.bytes_read
    damage, read = fill(choice.manifest, state, Sources(folder, memory))
    if from_disk := folder.io.bytes_read - before:
        read[DISK] = from_disk
    return [damage, dict(read)]


def _merged(findings: list[object]) -> tuple[dict[str, str], dict[str, int]]:
    """What the ranks found damaged, and the bytes they read, by source."""
    damage: dict[str, str] = {}
    read: Counter[str] = Counter()
    for found in findings:
        assert isinstance(found, list)
        damage |= found[0]
        read.update(found[1])
    return damage, dict(read)


def restore(choice: Choice, state: ModelState, world: int, io: Io | None = None) -> LoadReport:
    """Fills the fragments in place, cutting their boxes out of whatever boxes were saved. Every byte read is checked.

    Raises CheckpointError when a tensor is missing or has another shape, before anything is overwritten, and for damage.
    """
    report = describe(choice, state, world)
    damage, _ = fill(choice.manifest, state, Sources(CheckpointFolder(choice.folder, io or Io()), Memory.empty()))
    if damage:
        raise CheckpointError(" ".join(damage.values()))
    return report


def describe(choice: Choice, state: ModelState, world: int) -> LoadReport:
    """What restoring will do. Raises CheckpointError when a tensor is missing or has another shape."""
    manifest = choice.manifest
    remapped = []
    if manifest.world != world:
        remapped.append(f"It was saved by {manifest.world} ranks (ep {manifest.ep}) and is loaded by {world}.")
    types = {(tensor_of(manifest, fragment).dtype, dtype_name(fragment.data)) for fragment in state}
    if casts := sorted(f"{saved} to {live}" for saved, live in types if saved != live):
        remapped.append(f"Values are converted from {', '.join(casts)}.")
    return LoadReport(
        choice.folder, manifest.progress, manifest.seq, manifest.step, manifest.ages(), remapped, choice.damage, bool(casts),
        choice.is_in_memory, manifest.weight_ages(),
    )  # fmt: skip


def read_piece(reader: ArrayReader, piece: Piece, dtype: str) -> torch.Tensor:
    """A saved box as a tensor. Raises CheckpointError when it is damaged."""
    return as_tensor(read_values(reader, piece), piece, dtype)
