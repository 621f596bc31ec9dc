"""Saving a run while it trains, and resuming it. Every rank calls the same methods; saving needs no collective.

A save passes through two lanes. The memory lane copies live state into slots of the node's agent, from where it outlives this process;
the training thread waits for the copy only, and only before it changes the state. The persist lane writes the experts whose turn it is
from those slots to the store, while the next copies are made.

Every method here runs on the training thread. Each lane has a thread of its own; all three meet in `Pending` and in `Standing`.
"""

import secrets
from collections.abc import Sequence
from pathlib import Path

from moetrain.base.clock import Clock
from moetrain.base.errors import CheckpointError
from moetrain.base.garbage import collector_paused
from moetrain.checkpoint.accord import Accord
from moetrain.checkpoint.choose import Choice
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.copying import Ready
from moetrain.checkpoint.course import Course, Line
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.memory_lane import MemoryLane
from moetrain.checkpoint.node_memory import NodeMemory
from moetrain.checkpoint.pending import Order, Pending
from moetrain.checkpoint.persist_lane import PersistLane
from moetrain.checkpoint.process import Connect, Launcher
from moetrain.checkpoint.recover import Agree, Gather, LoadReport, from_rank_zero, restore_together, together
from moetrain.checkpoint.roster import Roster
from moetrain.checkpoint.status import Standing, Status
from moetrain.checkpoint.turns import Horizon, Turns
from moetrain.dist.board import Board, DictBoard
from moetrain.model.state import ModelState
from moetrain.store.backend import absolute
from moetrain.store.history import History
from moetrain.store.io import Io
from moetrain.store.manifest import Manifest, SaveId
from moetrain.store.objects import CheckpointFolder


class Checkpointer:
    """The one writer of a checkpoint folder. Constructing it claims the folder: an older job that still runs cannot commit there
    any more. To only read a checkpoint, use `recover.agreed_choice` and `recover.restore`.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, rank: int, world: int, agree: Agree, clock: Clock, connect: Connect | None = None,
        gather: Gather | None = None, turns: Turns | None = None, board: Board | None = None,
    ) -> None:  # fmt: skip
        """Every rank constructs it; `agree` is called once. `connect`: None for the agent of this node; `gather`, `board`: None in one
        process.

        `turns` knows the banks whose tokens are counted; None: nobody counts.

        Raises CheckpointError when the folder cannot be written.
        """
        assert board is not None or world == 1, "ranks agree over a board"
        self._rank, self._world, self._config = rank, world, config
        self._gather = gather or (lambda value: [agree(value)])
        self._folder = CheckpointFolder(absolute(folder), Io())
        first = from_rank_zero(rank, agree, lambda: f"{self._folder.claim(clock.now())} {secrets.token_hex(4)} {self._folder.run()}") or ""
        save, run = SaveId.parse(first), first.rpartition(" ")[2]
        assert save is not None
        self._next = save
        agent = connect or Launcher(self._folder.path, config.agent)
        self._memory = NodeMemory(agent, rank, save.epoch, clock, self._folder.path, run)
        accord = Accord(board or DictBoard(), f"checkpoint/{first}", rank, world, clock)
        self._turns = turns or Turns(config, Horizon())
        self._course = Course(self._folder, config, self._turns)
        self._roster = Roster(config, rank, world, self._gather, self._memory, self._course)
        self._standing = Standing()
        persisting = PersistLane(self._folder, rank, clock, self._memory, self._course, self._turns, self._standing)
        self._copying = MemoryLane(
            self._folder.path, config, clock, self._memory, accord, self._course, self._roster, self._standing, persisting
        )
        self._pending: Pending | None = None
        self._newest: Pending | None = None  # that goes to the store
        self._is_from_memory = False  # what was restored
        self._ledger = Ledger.of_banks(self._turns.banks)

    def count(self, load: Sequence[Sequence[int]]) -> None:
        """One more step was trained. `load`: token-assignments of all ranks, layers x experts; the same on every rank."""
        if self._turns.banks:
            self._ledger = self._ledger.count(load)

    def save(
        self, state: ModelState, progress: dict, *, full: bool = False, persists: bool = True, hurried: bool = False,
        expected_faults: float = 1.0,
    ) -> Pending:  # fmt: skip
        """Starts a save and returns at once. `state` may change only after `wait_copied`; `progress` is JSON-able and has `step`.

        `persists`: False for a copy in memory only. `hurried`: a `full` save that has `grace_seconds` only, by what saves took so far; what
        does not fit is left out, the least valuable experts first. `expected_faults`: until the end of the run, the same on every rank;
        what is left of the PLT budget is divided by it.

        A save that cannot be committed (a full disk, a dead agent, a late rank) is given up with a warning; the next one
        takes the same experts. One that finds two others on their way to the store stays in memory, except a `full` one.
        Raises CheckpointError when another job has taken over the folder.
        """
        previous, order = self._pending, Order(full, persists, hurried, expected_faults)
        if previous is not None and previous.error is not None:
            raise previous.error
        pending = Pending(self._next, int(progress["step"]), self._ledger, order)
        self._next = SaveId(self._next.epoch, self._next.seq + 1)
        self._pending = pending
        if persists:
            self._newest = pending
            self._standing.started(pending.seq)
        self._copying.do(pending, state, dict(progress), Ready(state))
        return pending

    def wait_copied(self) -> None:
        """Returns when the live state may change; at once when no save is under way. Raises as `Pending.wait_copied` does."""
        if self._pending is not None:
            self._pending.wait_copied()

    def status(self) -> Status:
        """Never waits."""
        return self._standing.now

    def finish(self, limit_seconds: float | None = None) -> None:
        """Waits until the last save is committed and takes leave of the agent, which ends with the last rank. A later save starts it again.

        Raises CheckpointError when that save was given up or takes longer than the limit (it may still come to a good end:
        the agent outlives the trainer).
        """
        for pending in (self._newest, self._pending):
            if pending is not None and not pending.done.wait(limit_seconds):
                late = f"The checkpoint of step {pending.step} is not committed after {limit_seconds:g} s."
                raise CheckpointError(late, "It may still be; start the same command again to go on.")
        pending = self._newest
        if pending is None:  # what came from memory, or was copied since, is nowhere else
            self._memory.leave(done=self._pending is None and not self._is_from_memory)
            return
        self._memory.leave(done=pending.committed and not pending.is_cut_short)
        if pending.error is not None:
            raise pending.error
        if not pending.committed and not pending.is_in_memory_only:
            step = self._standing.now.committed_step
            kept = f"The last good one is of step {step}; start" if step is not None else "Start"
            raise CheckpointError(
                f"The checkpoint of step {pending.step} was not committed: {pending.reason}", f"{kept} the same command again to go on."
            )

    @collector_paused()
    def load(self, state: ModelState, at: str, is_restart: bool = False) -> LoadReport | None:
        """Restores the newest good recovery point into `state`, in place, on every rank the same one; None when there is none to restore.

        `at`: auto (this folder, if it has one) | must | never | path of a run or checkpoint folder. `is_restart`: of the same job, so
        that what the memory of the nodes holds of this run goes before a path; the same on every rank. `gather` is called now and then.
        Raises CheckpointError on every rank when a checkpoint was asked for and there is none, or none is good.
        """
        memory = self._roster.look_around("auto" if is_restart else at)
        self._next = max(self._next, SaveId(self._next.epoch, memory.newest_seq + 1))  # what lies there may yet be written under its number
        restored = restore_together(
            self._folder.path, at, state, self._rank, self._world, self._gather, memory=memory, keep=self._config.keep
        )
        if restored is None:
            self._check_that_nothing_is_there(at)
        self._is_from_memory = restored is not None and restored[0].is_in_memory
        self._memory.went_on(restored[0].manifest.save if restored and self._is_from_memory else None)
        self._roster.draw_up(state)
        if restored is None:
            return None
        choice, report = restored
        self._go_on_from(choice, report)
        return report

    def _check_that_nothing_is_there(self, at: str) -> None:
        """A folder that is away looks like one that never had a checkpoint. Raises CheckpointError on every rank."""
        if at != "never":
            together(lambda: self._folder.check_claim(self._next.epoch) if self._rank == 0 else None, self._gather)

    def _go_on_from(self, choice: Choice, report: LoadReport) -> None:
        """What was restored is what the next save builds on, where it can be."""
        manifest = choice.manifest
        own = choice.folder.resolve() == self._folder.path.resolve()
        committed = None if not own else self._commit_under(manifest) if choice.is_in_memory else manifest
        ledger = Ledger.of_json(manifest.ledger, manifest.banks()).restored()
        # A repaired recovery point, or one elsewhere, is nothing a manifest of this folder can refer to: the next save is full.
        if not own or choice.damage or report.is_converted:
            line = Line(None, manifest.index + 1)
        elif committed is None:
            line = Line(None, manifest.index)
        else:  # after a recovery from memory the store is as it was before
            held = Ledger.of_json(committed.ledger, committed.banks()) if choice.is_in_memory else ledger
            line = Line(committed.save, committed.index + 1, committed.banks(), held)
        self._course.continues(line, manifest.way if own else ())
        if ledger.banks == self._turns.banks:
            self._ledger = ledger
        self._standing.restored(committed, self._turns.figures(ledger, 0))

    def _commit_under(self, copy: Manifest) -> Manifest | None:
        """The newest commit that a copy in memory can be built on: what its start committed before it, or went on from."""
        on_disk = History(self._folder)
        return on_disk.newest(lambda save: save <= copy.save and (save == copy.parent or save.epoch == copy.save.epoch))
