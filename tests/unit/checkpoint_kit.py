"""A small training state at any layout, ranks simulated in one process, a node's agent without a process, and a look into the folder."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier
from zlib import crc32

import torch

from moetrain.base.clock import SystemClock
from moetrain.checkpoint.agent import Agent
from moetrain.checkpoint.arena import SHARED_MEMORY, Arena, free_bytes, own_folder
from moetrain.checkpoint.checkpointer import Checkpointer
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.pending import Pending
from moetrain.checkpoint.recover import LoadReport
from moetrain.checkpoint.serve import answer_of
from moetrain.checkpoint.turns import Turns
from moetrain.checkpoint.wire import Refused, WireError
from moetrain.dist.board import DictBoard
from moetrain.model.state import Box, Fragment, ModelState, assemble
from moetrain.routing.placement import Placement
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest
from moetrain.store.objects import CheckpointFolder

BANKS = ("blocks.0.moe.experts", "blocks.1.moe.experts")
NUM_EXPERTS = 4
DENSE = {"embedding.weight": (11, 3), "final_norm.weight": (3,)}
EXPERT = {"gate_up_proj": (4, 3), "down_proj": (3, 2)}


def logical(key: str, component: str, shape: tuple[int, ...], version: int) -> torch.Tensor:
    """The value of a whole tensor: depends on its key and the version only."""
    if component == "step":
        return torch.tensor(version)
    return torch.randn(shape, generator=torch.Generator().manual_seed(crc32(f"{key} {version}".encode())))


def fragment(name: str, component: str, bank: str | None, expert: int | None, shape, box: Box, holders, version: int) -> Fragment:
    key = f"{name}:{component}" + ("" if expert is None else f":{expert}")
    where = tuple(slice(o, o + s) for o, s in zip(box.offset, box.shape, strict=True))
    return Fragment(name, component, bank, expert, shape, box, tuple(holders), logical(key, component, shape, version)[where].clone())


def state_of(rank: int, world: int, ep: int, version: int, sharded: bool = False) -> ModelState:
    """What one rank holds after `version` steps. `sharded`: dense parameters cut along dim 0 over all ranks, some shards empty."""
    state = []
    for name, shape in DENSE.items():
        for component in ("master", "m", "v", "step"):
            if component == "step":
                state.append(fragment(name, component, None, None, (), Box.whole(()), range(world), version))
            elif not sharded:
                state.append(fragment(name, component, None, None, shape, Box.whole(shape), range(world), version))
            elif (size := min(shape[0], (rank + 1) * -(-shape[0] // world)) - (start := rank * -(-shape[0] // world))) > 0:
                box = Box((start,) + (0,) * (len(shape) - 1), (size, *shape[1:]))
                state.append(fragment(name, component, None, None, shape, box, [rank], version))
    holders = [other for other in range(world) if other % ep == rank % ep]
    for bank in BANKS:
        for expert in Placement.balanced(NUM_EXPERTS, ep, seed=ep).experts[rank % ep]:
            for name, shape in EXPERT.items():
                for component in ("master", "m", "v", "step"):
                    of = () if component == "step" else shape
                    state.append(fragment(f"{bank}.{name}", component, bank, expert, of, Box.whole(of), holders, version))
    return state


class LocalNode:
    """A node's agent in this process, over an Io that a test may make fail. `dead`: what a killed agent looks like to its ranks.

    `stopped`: it does not answer. `room`: bytes that its arena may hold.
    """

    def __init__(self, free: Callable[[Path], int] = free_bytes, room: int | None = None) -> None:
        self._folder = TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        self.folder, self.spare = Path(self._folder.name) / "arena", list[Path]()
        self._free = free if room is None else lambda base: room - self.held()
        self.dead = self.stopped = False
        self.start()

    def held(self) -> int:
        """Bytes in slots."""
        return sum(path.stat().st_size for path in (self.folder / "slots").glob("*"))

    @property
    def io(self) -> Io:
        return self.agent.io

    @io.setter
    def io(self, io: Io) -> None:
        self.agent.io = io

    def start(self) -> None:
        """A new agent, which takes over what is there."""
        own_folder(self.folder)
        self.agent = Agent(self.folder, Arena([self.folder / "slots"], self._free), Io(), SystemClock())

    def __call__(self, start: bool) -> "LocalLink":
        return LocalLink(self)

    def is_gone(self) -> bool:
        return self.dead


class LocalLink:
    """A connection to it: the same messages without a socket."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node
        self._session = node.agent.open(lambda: True)

    def call(self, request: dict, limit_seconds: float, silence_seconds: float = inf) -> dict:
        if self._node.dead:
            raise WireError("exit code -9")
        if self._node.stopped:
            raise TimeoutError
        request = json.loads(json.dumps(request))
        operation = self._node.agent.for_ranks[request["op"]]
        answer = json.loads(json.dumps(answer_of(operation, self._session, request, memoryview(b""))[0]))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def close(self) -> None:
        self._node.agent.close(self._session)


class Spread:
    """`agree` for ranks that are called one after the other: rank 0 first."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.heard = [0] * 16

    def of(self, rank: int):
        def agree(value: object) -> object:
            if rank == 0:
                self.said.append(value)
                return value
            self.heard[rank] += 1
            return self.said[self.heard[rank] - 1]

        return agree


class Circle:
    """`gather` for ranks that are threads."""

    def __init__(self, world: int) -> None:
        self.values: list[object] = [None] * world
        self.barrier = Barrier(world)

    def of(self, rank: int):
        def gather(value: object) -> list[object]:
            self.values[rank] = value
            self.barrier.wait(60)
            found = list(self.values)
            self.barrier.wait(60)  # nobody says the next thing before all have heard this one
            return found

        return gather


class Job:
    """All ranks of one training job on one checkpoint folder."""

    def __init__(
        self, folder: Path, world: int, ep: int, sharded: bool = False, turns: Turns | None = None,
        nodes: list[LocalNode] | None = None, **config: object,
    ) -> None:  # fmt: skip
        self.world, self.ep, self.sharded = world, ep, sharded
        self.nodes = nodes or [LocalNode() for _ in range(world)]  # a rank on each
        spread = Spread()
        self.settings = CheckpointConfig(**config)  # type: ignore[arg-type]
        self.circle = Circle(world)
        board = DictBoard()
        self.ranks = [
            Checkpointer(
                folder, self.settings, rank, world, spread.of(rank), SystemClock(), self.nodes[rank], self.circle.of(rank), turns,
                board,
            )
            for rank in range(world)
        ]  # fmt: skip

    def states(self, version: int) -> list[ModelState]:
        return [state_of(rank, self.world, self.ep, version, self.sharded) for rank in range(self.world)]

    def start(self, version: int, full: bool = False) -> list[Pending]:
        """Every rank begins to save the state of this version."""
        progress = {"step": version, "samples": 8 * version}
        states = self.states(version)
        return [rank.save(state, progress, full=full) for rank, state in zip(self.ranks, states, strict=True)]

    def save(self, version: int, full: bool = False) -> list[Pending]:
        pending = self.start(version, full)
        for one in pending:
            assert one.done.wait(100)
        return pending

    def copy(self, version: int) -> list[Pending]:
        """Into memory only, on every rank."""
        states = self.states(version)
        pending = [rank.save(state, {"step": version}, persists=False) for rank, state in zip(self.ranks, states, strict=True)]
        assert all(one.done.wait(60) for one in pending)
        return pending

    def load(self, at: str = "auto", is_restart: bool = False) -> tuple[LoadReport | None, dict[str, torch.Tensor]]:
        """What rank 0 reports, and the whole tensors all ranks have afterwards."""
        states = self.states(-1)
        with ThreadPoolExecutor(self.world) as pool:
            reports = list(pool.map(lambda rank, state: rank.load(state, at, is_restart), self.ranks, states))
        return reports[0], assemble([piece for state in states for piece in state])


def expected(version: int, experts: dict[tuple[str, int], int] | None = None) -> dict[str, torch.Tensor]:
    """Whole tensors of a state of one version, some experts of other versions."""
    whole = {}
    for piece in state_of(0, 1, 1, version):
        of = (experts or {}).get((piece.bank or "", piece.expert if piece.expert is not None else -1), version)
        whole[piece.key] = logical(piece.key, piece.component, piece.logical_shape, of)
    return whole


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [key for key in wanted if not torch.equal(found[key], wanted[key])]
    assert not different


def manifests(folder: Path) -> list[Manifest]:
    """The recovery points of a checkpoint folder that can be read, newest first."""
    return [point for point in CheckpointFolder(folder, Io()).history() if isinstance(point, Manifest)]


def experts_by_step(manifest: Manifest) -> dict[tuple[str, int], int]:
    return {group: manifest.step - age for group, age in manifest.ages().items()}


def objects_of(folder: Path, manifest: Manifest, label: str) -> list[Path]:
    return [folder / "objects" / name for name in manifest.objects if Path(name).name.startswith(label)]


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 0x10
    file.write_bytes(bytes(data))


def nodes_of(world: int) -> list[LocalNode]:
    return [LocalNode() for _ in range(world)]


def restart(job: Job, snapshot_experts: int = 0) -> Job:
    """The same command after kill -9 of all ranks: their agents are still there."""
    return Job(job.ranks[0]._folder.path, job.world, job.ep, job.sharded, nodes=job.nodes, snapshot_experts=snapshot_experts)


def assert_goes_on_from(job: Job, step: int) -> LoadReport:
    """A restart brings back the whole state of that step."""
    report, whole = restart(job).load()
    assert report is not None
    assert report.step == step
    assert_equal(whole, expected(step))
    return report
