"""The process of a node that owns its arena: copies of live state outlive the ranks that made them. Imports no torch.

Ranks fill slots; the agent checks, keeps, sends to a partner and persists them. It lives in its own session and ends some time after its
last rank, or when all of them have taken their leave.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import Arena, NoRoom, Slot, State
from moetrain.checkpoint.gate import Gate
from moetrain.checkpoint.generation import Generation, Key, sealed
from moetrain.checkpoint.job import SaveJob
from moetrain.checkpoint.partner import Partner
from moetrain.checkpoint.rescue import rescue, whole_saves
from moetrain.checkpoint.shelf import Shelf
from moetrain.checkpoint.wire import Address, Buffer
from moetrain.checkpoint.writer import handle
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder, Superseded
from moetrain.store.owner import are_two

Alive = Callable[[], bool]
Answer = tuple[dict, Buffer]

RETRY_SECONDS = 1.0  # between attempts at a checkpoint folder that is away


@dataclass(eq=False)
class Session:
    """What one connection holds. A rank may have several."""

    alive: Alive
    is_local: bool = True
    rank: int | None = None
    run: str = ""  # of its job
    filling: dict[str, Slot] = field(default_factory=dict)
    reading: list[Slot] = field(default_factory=list)


class Agent:
    """Answers ranks (`for_ranks`) and other agents (`for_agents`); thread-safe. What cannot be done is said in the answer."""

    def __init__(self, folder: Path, arena: Arena, io: Io, clock: Clock) -> None:
        """Takes over what an agent before it left in `folder`."""
        self.folder, self.arena, self.shelf = folder, arena, Shelf(folder, arena)
        self.address: Address | None = None
        self.left: dict[int, bool] = {}  # of every rank of the newest job: whether it has taken its leave
        self.sessions: list[Session] = []
        self.is_stopped = False
        self.num_persisting = 0
        self.io, self._clock = io, clock
        self._jobs: dict[Key, tuple[SaveJob, list[Slot]]] = {}  # not yet asked to be persisted
        self._run, self._epoch = self.shelf.job
        self._lock = RLock()
        self._gate = Gate()
        self._partner: Partner | None = None
        self.for_agents = {"list": self._list, "read": self._read, "put": self._put, "copied": self._copied, "keep": self._keep}
        self.for_ranks = {
            "join": self._join, "list": self._list, "restored": self._restored, "partner": self._set_partner,
            "reserve": self._reserve, "filled": self._filled, "replicated": self._replicated, "persist": self._persist,
            "leave": self._leave, "status": self._status, "stop": self._stop,
        }  # fmt: skip

    # connections

    def open(self, alive: Alive, is_local: bool = True) -> Session:
        """Takes no lock: whoever listens must not wait while slots are allocated."""
        session = Session(alive, is_local)
        self.sessions.append(session)
        return session

    def close(self, session: Session) -> None:
        """Frees what a rank was filling when it died."""
        with self._lock:
            for slot in session.filling.values():
                slot.is_abandoned = True
            self.arena.release(session.filling.values(), State.FILLING)
            self.arena.release(session.reading, State.RECOVERY)
            session.filling, session.reading = {}, []
            self.sessions.remove(session)

    @property
    def generations(self) -> dict[Key, Generation]:
        return self.shelf.generations

    @property
    def has_taken_leave(self) -> bool:
        return bool(self.left) and all(self.left.values())

    def room_for_copy(self, session: Session, header: dict, num_bytes: int) -> memoryview:
        """Where the values of an object from another node go: a slot of its own."""
        with self._lock:
            (slot,) = self.arena.reserve([num_bytes])
            session.filling[slot.path] = slot
        return memoryview(slot.memory)[:num_bytes]

    # ranks

    def _join(self, session: Session, request: dict, raw: memoryview) -> Answer:
        run, epoch = request["run"], request["epoch"]
        session.run = run
        has_the_folder = are_two(run, self._run) and self._is_of(request["checkpoint"], run)
        with self._lock:
            if has_the_folder and are_two(run, self._run):  # the run that was here is gone
                self.shelf.remove(self.generations)
                self._begin(run, epoch)
            self._check_job(run, epoch)
            session.rank = request["rank"]
            self.left[request["rank"]] = False
        return self._identity(), b""

    def _is_of(self, checkpoint: str, run: str) -> bool:
        """Whether the checkpoint folder is this run's now."""
        with suppress(OSError, CheckpointError):
            return CheckpointFolder(Path(checkpoint), self.io).run() == run
        return False

    def _leave(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """A rank needs nothing of this any more; when the last one says so nothing is offered to a later start. What an older job needs is
        not asked."""
        with self._lock:
            if not are_two(session.run, self._run) and request["epoch"] == self._epoch:
                self.left[request["rank"]] = True
                if self.has_taken_leave:
                    self.shelf.remove(self.generations)
        return {}, b""

    def _reserve(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """Slots for one rank's part of a save; the rest of the request is `process.Needs`."""
        save, keep = SaveId(*request["save"]), request["keep"] and SaveId(*request["keep"])
        with self._lock:
            self._check_job(session.run, save.epoch)
            self._forget_jobs(request["rank"], {SaveId(*one) for one in request["writing"]})
            self.arena.release(session.filling.values(), State.FILLING)  # of a copy that came to nothing
            session.filling = {}
            self.shelf.drop(request["rank"], keep, save)
            try:
                if request["alone"]:
                    self.shelf.give_way(request["sizes"], sorted(key for key in self.generations if key[0] < save))
                slots = self.shelf.reserve(request["sizes"])
                if self._partner is not None:
                    self._partner.keep(request["rank"], keep, save, request["alone"])
            except NoRoom as error:
                return self._full(error), b""
            session.filling |= {slot.path: slot for slot in slots}
        return {"slots": [slot.path for slot in slots]}, b""

    def _full(self, error: NoRoom) -> dict:
        return {"full": error.message, "hint": error.hint, "is_passing": error.is_passing, "is_empty": not self.generations}

    def _forget_jobs(self, rank: int, writing: set[SaveId]) -> None:
        """Lets go of what would have been written for saves that their rank has given up."""
        for key in [key for key in self._jobs if key[1] == rank and key[0] not in writing]:
            _, slots = self._jobs.pop(key)
            self.arena.release(slots, State.PERSISTING)

    def _filled(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """Takes the checksums of a copy that is complete, before anything else happens to it, and makes it READY."""
        job = SaveJob.of_json(request["job"])
        slots = [session.filling[path] for path in request["slots"]]
        share = CheckpointFolder(Path(job.folder), self.io).new_share(job.save, job.rank)
        job, generation = sealed(job, share, slots, self._clock.now())
        with self._lock:
            self._check_job(job.run, job.save.epoch)
            try:
                self.shelf.put(generation)
            except NoRoom as error:
                return self._full(error), b""
            self._filled_up(session, slots)
            if job.objects:  # held until `persist` is over, whatever becomes of the generation
                self._jobs[generation.key] = job, slots[: len(job.objects)]
                self.arena.hold(slots[: len(job.objects)], State.PERSISTING)
            if self._partner is not None:
                self._partner.push(generation, slots)
        return {"num_bytes": generation.num_bytes}, b""

    def _filled_up(self, session: Session, slots: Iterable[Slot]) -> None:
        for slot in slots:
            del session.filling[slot.path]
            self.arena.release([slot], State.FILLING)

    def _replicated(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """Whether the partner has a generation, or there is nobody to have it; `trouble`: why he cannot."""
        if self._partner is None:
            return {"done": True, "trouble": ""}, b""
        done, trouble = self._partner.state((SaveId(*request["save"]), request["rank"]))
        return {"done": done, "trouble": trouble}, b""

    def _persist(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """Writes the objects of a save that are flagged to the store; rank 0's part ends with the commit. Takes its time."""
        parent = request["parent"]
        with self._lock:
            job, slots = self._jobs.pop((SaveId(*request["save"]), request["rank"]), (None, []))
            self.num_persisting += job is not None
        if job is None:
            return {"error": "it was started anew and does not know this save."}, b""
        try:
            job = replace(job, parent=parent and SaveId(*parent), ledger=request["ledger"])
            reply = handle(job, [memoryview(slot.memory) for slot in slots], self.io, self._clock, session.alive, self._gate)
        finally:
            with self._lock:
                self.arena.release(slots, State.PERSISTING)
                self.num_persisting -= 1
        return reply.to_json(), b""

    def _set_partner(self, session: Session, request: dict, raw: memoryview) -> Answer:
        address = Address(**request["address"])
        with self._lock:
            if self._partner is None or self._partner.address != address:
                if self._partner is not None:
                    self._partner.stop()
                self._partner = Partner(address)
        return {}, b""

    # recovery

    def _list(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """Everything that is READY here; none of it is given away before `restored` or the end of the connection."""
        with self._lock:
            found = [one.to_json() for one in self.generations.values()]
            slots = [self.arena.slots[held.slot] for one in self.generations.values() for held in one.held.values()]
            self.arena.hold(slots, State.RECOVERY)
            session.reading += slots
        return self._identity() | {"generations": found}, b""

    def _restored(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """All ranks have read what they go on from, and `keep` (None: nothing in memory) is it. Other saves of earlier starts belong to
        a course that the run has left."""
        keep = request["keep"] and SaveId(*request["keep"])
        with self._lock:
            self._check_job(session.run, request["epoch"])
            self.arena.release(session.reading, State.RECOVERY)
            session.reading = []
            if keep is not None:
                self.shelf.keep(keep)
            epoch = request["epoch"]
            self.shelf.remove(key for key in self.generations if key[0].epoch < epoch and (keep is None or key[0] > keep))
        return {}, b""

    # other agents

    def _read(self, session: Session, request: dict, raw: memoryview) -> Answer:
        with self._lock:
            found = (held for one in self.generations.values() for name, held in one.held.items() if name == request["name"])
            held = next(found, None)
            if held is None:
                return {"error": f"{request['name']} is not in the memory of this node."}, b""
            slot = self.arena.slots[held.slot]
            self.arena.hold([slot], State.RECOVERY)
            session.reading.append(slot)
        return {}, memoryview(slot.memory)[: held.num_bytes]

    def _put(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """One object for a rank of another node: it lies in the slot that was received last."""
        return {"slot": next(reversed(session.filling))}, b""

    def _copied(self, session: Session, request: dict, raw: memoryview) -> Answer:
        """All objects of a generation of another node have come."""
        generation = replace(Generation.of_json(request["generation"]), is_copy=True)
        slots = [session.filling[held.slot] for held in generation.held.values()]
        generation.check({slot.path: memoryview(slot.memory) for slot in slots})
        with self._lock:
            self._check_job(generation.job.run, generation.save.epoch)
            self.shelf.put(generation)
            self._filled_up(session, slots)
        return {}, b""

    def _keep(self, session: Session, request: dict, raw: memoryview) -> Answer:
        with self._lock:
            save = SaveId(*request["save"])
            self._check_job(session.run, save.epoch)
            self.shelf.drop(request["rank"], request["keep"] and SaveId(*request["keep"]), save)
            if request["alone"]:
                self.shelf.remove(key for key in self.generations if key[1] == request["rank"] and key[0] < save)
        return {}, b""

    # anybody of this user

    def _status(self, session: Session, request: dict, raw: memoryview) -> Answer:
        with self._lock:
            states: dict[str, int] = defaultdict(int)
            for slot in self.arena.slots.values():
                states[slot.state.name] += slot.num_bytes
            rows = [
                {"save": str(one.save), "step": one.job.step, "rank": one.job.rank, "num_bytes": one.num_bytes, "is_copy": one.is_copy}
                for one in sorted(self.generations.values(), key=lambda one: one.key)
            ]
            ranks = sorted({session.rank for session in self.sessions if session.rank is not None})
        return {"ranks": ranks, "slots": states, "generations": rows}, b""

    def _stop(self, session: Session, request: dict, raw: memoryview) -> Answer:
        self.is_stopped = True
        return {}, b""

    # nobody

    def rescue(self) -> None:
        """No rank has come back: what would be lost with this agent goes to the store. Ranks may come back meanwhile."""
        with self._lock:
            saves, job = whole_saves(self.generations.values()), self._job
            self.num_persisting += 1
        try:
            for parts in saves:
                if self._is_rescued(parts, job):
                    return
        finally:
            with self._lock:
                self.num_persisting -= 1

    def _is_rescued(self, parts: list[Generation], job: tuple[str, int]) -> bool:
        """Tries again for a while when the folder cannot be used; True when nothing older is to be tried."""
        with self._lock:
            if self._job != job:  # ranks are back, and memory is theirs
                return True
            slots = [self.arena.slots[held.slot] for one in parts for held in one.held.values()]
            self.arena.hold(slots, State.PERSISTING)
        deadline = self._clock.monotonic() + parts[0].job.timeout_seconds
        try:
            while self._job == job and not self.is_stopped and self._clock.monotonic() < deadline:
                with suppress(OSError, CheckpointError):
                    return rescue(parts, job[1], self._memory_of, self.io, self._clock, self._gate)
                self._clock.sleep(RETRY_SECONDS)
            return self._job != job or self.is_stopped
        finally:
            with self._lock:
                self.arena.release(slots, State.PERSISTING)

    def _memory_of(self, slot: str) -> memoryview:
        return memoryview(self.arena.slots[slot].memory)

    # what is kept

    def _identity(self) -> dict:
        return {"address": None if self.address is None else vars(self.address), "folder": str(self.folder)}

    @property
    def _job(self) -> tuple[str, int]:
        return self._run, self._epoch

    def _check_job(self, run: str, epoch: int) -> None:
        """Of two jobs on one node and one run folder the younger wins; where the folder is a new one, the one that has joined since."""
        if epoch < self._epoch or are_two(run, self._run):
            raise Superseded(f"Another job has taken over the memory of this node (epoch {self._epoch}, this job has {epoch}).")
        if epoch > self._epoch:
            self._begin(run, epoch)

    def _begin(self, run: str, epoch: int) -> None:
        """Whatever the job before this one wanted is over."""
        for _, slots in self._jobs.values():
            self.arena.release(slots, State.PERSISTING)
        self._run, self._epoch, self.left, self._jobs = run or self._run, epoch, {}, {}
