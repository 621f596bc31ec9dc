"""How fast states are written and read back, for tools/bench_checkpoint.py: contenders, and beside them plain writes, reads and copies."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import Crc32cCodec

from moetrain.checkpoint.choose import check, check_object, choose, glance
from moetrain.checkpoint.fill import tensor_of
from moetrain.store.direct import DirectWriter
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tools.checkpoint_figures import ALL_COPIED, ALL_READ, FROM_MEMORY, LIST, OURS, PERSIST, RAW_DIRECT, RAW_READ, RAW_WRITE, VERIFY, ZARR
from tools.contenders import Contender, Live, Ours, Tensors, sync


def write_rates(live: Live, contenders: list[Contender], pairs: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of a save from the call until it is durable, all ranks at once, once a round; raw write+fsync and zarr-python beside it."""
    payload = torch.cat([tensor.flatten().view(torch.uint8) for tensor in live.mine.values() if tensor.numel()]).numpy()
    writers: dict[str, Callable[[int], None]] = {contender.name: partial(save_whole, contender) for contender in contenders}
    writers[RAW_WRITE] = lambda step: write_raw(folder / f"copy-{live.world.rank}" / "raw", payload)
    writers[RAW_DIRECT] = lambda step: write_direct(folder / f"copy-{live.world.rank}" / "direct", payload)
    writers[ZARR] = lambda step: write_zarr(folder / f"copy-{live.world.rank}" / "zarr", payload)
    found: dict[str, list[float]] = {name: [] for name in writers}
    persisted: list[float] = []
    for number in range(pairs):
        first = number % len(writers)  # a disk may have rested while the one before it computed
        for name, write in [*writers.items()][first:] + [*writers.items()][:first]:
            remove_copies(folder, live.world.rank)  # what an earlier one wrote is not a part of the next write
            live.world.barrier(f"before {name}")
            started = time.perf_counter()
            write(10_000 + number)
            found[name].append(time.perf_counter() - started)
        persisted += [contender.committed_seconds for contender in contenders if contender.name == OURS and isinstance(contender, Ours)]
        for contender in contenders:
            contender.tidy()
    return found | {PERSIST: persisted}


def save_whole(contender: Contender, step: int) -> None:
    contender.save(step)
    contender.before_update()
    contender.drain()


def remove_copies(folder: Path, rank: int) -> None:
    copies = folder / f"copy-{rank}"
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir()


def write_raw(path: Path, payload: np.ndarray) -> None:
    """`path` does not exist: removing a file of this size takes a quarter as long as writing it."""
    with path.open("xb", buffering=0) as file:
        view, written = payload.data, 0
        while written < len(view):
            written += file.write(view[written:])
        os.fsync(file.fileno())


def write_direct(path: Path, payload: np.ndarray) -> None:
    with path.open("xb", buffering=0) as file:
        written = DirectWriter().write(file.fileno(), [payload.data], lambda: None)
        file.write(payload.data[written:])
        os.fsync(file.fileno())


def write_zarr(folder: Path, payload: np.ndarray) -> None:
    """zarr-python with the codecs of our objects: inner chunks of 4 MiB with crc32c; then what it leaves out, the syncs."""
    values = payload[: payload.size // 4 * 4].view(np.float32)
    chunk = min(1 << 20, values.size)
    shard = -(-values.size // chunk) * chunk
    array = zarr.create_array(
        store=str(folder), shape=values.shape, dtype="float32", chunks=(chunk,), shards=(shard,), compressors=Crc32cCodec(),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    array[:] = values
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def forget(paths: list[Path]) -> None:
    """Asks the system to drop clean pages of these files, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(paths: list[Path]) -> None:
    buffer = bytearray(16 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_into(contents: list[tuple[Path, np.ndarray]]) -> None:
    """Files into memory that is there, as a load does that checks nothing and copies nothing."""
    for path, memory in contents:
        with path.open("rb", buffering=0) as file:
            file.readinto(memory.data)


def copy_into(copies: Tensors, live: Live) -> None:
    """What a recovery from memory cannot do without."""
    for name, tensor in live.whole.items():
        tensor.copy_(copies[name])


def recoveries(live: Live, contenders: list[Contender], pairs: int, cold: bool) -> dict[str, list[float]]:
    """Seconds of a whole load of every contender, all ranks at once; of ours also the parts, and the floors: plain reads, a plain copy."""
    ours = next(contender for contender in contenders if isinstance(contender, Ours))
    ours.drain()
    live.world.barrier("before the loads")  # rank 0 sweeps after a commit; what the other ranks list must stay
    folder, point = CheckpointFolder(ours.folder, Io()), ours.point()
    mine = {name for name in point.objects if f"/{live.world.rank:05d}-" in name}
    share = replace(
        point,
        objects={name: record for name, record in point.objects.items() if name in mine},
        tensors={key: tensor for key, tensor in point.tensors.items() if {piece.object for piece in tensor.pieces} <= mine},
    )
    files = [ours.folder / "objects" / name / "c.0" for name in sorted(mine)]
    files = [path for path in files if path.exists()]
    readers: dict[str, Callable[[], object]] = {contender.name: contender.load for contender in contenders}
    readers[FROM_MEMORY] = ours.load_from_memory
    readers[LIST] = lambda: choose(ours.folder, Io(), glance)
    readers[VERIFY] = lambda: check(folder, share, check_object)
    readers[RAW_READ] = lambda: read_raw(files)
    needed = {piece.object for fragment in live.fragments for piece in tensor_of(point, fragment).pieces if piece.value is None}
    contents = [
        (path, np.ones(path.stat().st_size, np.uint8)) for path in (ours.folder / "objects" / name / "c.0" for name in sorted(needed))
    ]
    readers[ALL_READ] = lambda: read_into(contents)
    readers[ALL_COPIED] = lambda: copy_into(copies, live)
    copies = {name: tensor.clone() for name, tensor in live.whole.items()}
    found: dict[str, list[float]] = {name: [] for name in readers}
    everything = [path for contender in contenders if contender.folder.exists() for path in contender.folder.rglob("*") if path.is_file()]
    for number in range(pairs + 1):
        first = number % len(readers)  # a disk may have rested while the one before it computed
        for name, read in [*readers.items()][first:] + [*readers.items()][:first]:
            if cold and live.world.is_main:
                forget(everything)
            live.world.barrier(f"before {name}")
            started = time.perf_counter()
            read()
            if number:  # the first one warms up
                found[name].append(time.perf_counter() - started)
    return found
