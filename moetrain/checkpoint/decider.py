"""Rank 0's mind: what each save is, for all ranks. One thread uses it, the memory lane's."""

from dataclasses import dataclass
from functools import partial

from moetrain.checkpoint.accord import Accord, Decision
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.course import Attempt, Course, Hurried
from moetrain.checkpoint.hurry import most_valuable
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.pending import Pending
from moetrain.checkpoint.persist_lane import PersistLane
from moetrain.checkpoint.roster import Roster
from moetrain.checkpoint.select import first_expert
from moetrain.checkpoint.status import Standing
from moetrain.store.manifest import SaveId

READY_SECONDS = 0.5  # what a save that goes to the store grants the copy before it to be known everywhere
GRACE_SHARE = 0.7  # of the grace is spent on writing; the rest is for the step under way, and for a disk that is slower now


@dataclass(frozen=True)
class Copied:
    """A copy in memory: the ledger as a recovery to it would find it."""

    save: SaveId
    ledger: Ledger
    in_memory: Selection | None
    alone: bool


class Decider:
    """Remembers which copies lie in memory everywhere; what goes to the store is the course's to say."""

    def __init__(
        self, config: CheckpointConfig, accord: Accord, course: Course, roster: Roster, standing: Standing, persisting: PersistLane
    ) -> None:
        self._config, self._accord, self._course = config, accord, course
        self._roster, self._standing, self._persisting = roster, standing, persisting
        self._keep: Copied | None = None  # the newest save that all ranks have in memory,
        self._open: Copied | None = None  # and a newer one of which that is not known yet
        self._turn: dict[str, list[int]] = {}  # of every bank, the experts that were not copied for longest first

    def decide(self, pending: Pending) -> Decision:
        """What this save is. Takes a place in the persist lane for it."""
        save, order, alone = pending.save, pending.order, False
        if self._open is not None:
            complete = self._accord.is_complete(self._open.save, READY_SECONDS if order.persists else 0.0)
            if complete is None and not order.persists:
                return Decision(save, "the copy before it is not in the memory of every rank yet.")
            alone = not complete and (self._open.alone or self._lacked_room(self._open))
            self._keep, self._open = self._open if complete else self._keep, None  # what is not known to be complete is given up by all
        pending.is_queued = order.persists and self._persisting.take_place()
        persists = pending.is_queued or (order.persists and order.full)
        hurried = self._hurried() if order.hurried else None
        attempt = None
        if persists:
            attempt = self._course.next(save, pending.ledger, order.full, order.expected_faults, self._roster.homes, hurried)
        in_memory = self._copies(attempt)
        if alone := alone or not self._roster.finds_room(in_memory):
            in_memory = None  # there is nothing to take other experts from
        ledger = pending.ledger.since(self._keep.ledger) if self._keep else self._course.seen(pending.ledger)
        ledger = ledger.after(in_memory, self._config.mode)
        self._open = Copied(save, ledger, in_memory, alone)
        return Decision(
            save,
            keep=self._keep and self._keep.save,
            alone=alone,
            persists=persists,
            index=attempt.line.index if attempt else self._course.index,
            selection=attempt.selection if attempt else None,
            in_memory=in_memory,
            ledger=ledger.to_json() if ledger.total else {},
        )

    def _lacked_room(self, copied: Copied) -> bool:
        """Whether a node had no room for it, and will have none for the next one as large."""
        if not self._accord.lacked_room(copied.save):
            return False
        self._roster.found_no_room(copied.in_memory)
        return True

    def _hurried(self) -> Hurried | None:
        """Chooses what can be written within the grace; None when there is time enough, or nothing was measured yet."""
        status, grace, holdings = self._standing.now, self._config.grace_seconds, self._roster.holdings
        if not grace or not status.committed_seconds or holdings is None:
            return None
        num_bytes = GRACE_SHARE * grace * status.committed_bytes / status.committed_seconds
        return partial(most_valuable, holdings, self._config.mode, num_bytes=num_bytes)

    def _copies(self, attempt: Attempt | None) -> Selection | None:
        """The experts that are copied; None: all of them. Those that go to the store, and as many others as there is room for, in turn."""
        count, banks = self._roster.copied_experts, self._course.known_banks
        if count is None or self._config.mode == "full" or (attempt is not None and attempt.selection is None):
            return None
        if self._keep is None and self._course.parent is None:  # there is nothing to take the other experts from
            return None
        chosen = {}
        for layer, (bank, num_experts) in enumerate(banks.items()):
            first = first_expert(0, layer, len(banks), num_experts, count)
            turn = self._turn.setdefault(bank, [(first + number) % num_experts for number in range(num_experts)])
            stored = (attempt.selection or {}).get(bank, []) if attempt else []
            others = [expert for expert in turn if expert not in stored]
            chosen[bank] = sorted([*stored, *others[: max(0, count - len(stored))]])
            self._turn[bank] = [expert for expert in turn if expert not in chosen[bank]] + chosen[bank]
        return chosen
