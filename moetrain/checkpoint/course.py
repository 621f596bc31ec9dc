"""Where the line of recovery points stands, and what the next save writes. Rank 0 decides by it, for all ranks. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock

from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.select import rotation
from moetrain.checkpoint.turns import Homes, Turns
from moetrain.store.manifest import Group, SaveId, natural
from moetrain.store.objects import CheckpointFolder

Hurried = Callable[[Ledger], Selection | None]


@dataclass(frozen=True)
class Line:
    """The recovery point that the next save continues. `banks` None: nothing to build on, save in full.

    `ledger`: as that recovery point holds it; after a recovery with what that lost.
    """

    parent: SaveId | None = None
    index: int = 0
    banks: dict[str, int] | None = None
    ledger: Ledger | None = None


@dataclass(frozen=True)
class Attempt:
    """A save that was decided: the line it was seen from, and what it was to write."""

    line: Line
    selection: Selection | None
    counted: Ledger


class Course:
    """The line as the folder has it, and the attempts of this job whose outcome is not known yet."""

    def __init__(self, folder: CheckpointFolder, config: CheckpointConfig, turns: Turns) -> None:
        self._folder, self._config, self._turns = folder, config, turns
        self._line = Line()
        self._attempts: dict[SaveId, Attempt] = {}  # on their way
        self._late: dict[SaveId, Attempt] = {}  # of which rank 0's agent has not said what became of them
        self.known_banks: dict[str, int] = {}
        self._lock = Lock()

    def continues(self, line: Line) -> None:
        """After a recovery."""
        self._line = line

    def knows(self, banks: dict[str, int]) -> None:
        """The banks of the state that is saved, so that a full save that is still on its way can be built on."""
        self.known_banks = banks

    def next(
        self, save: SaveId, counted: Ledger, full: bool, expected_faults: float, homes: Homes | None, hurried: Hurried | None = None
    ) -> Attempt:
        """What this save writes. A save before it that is still on its way is taken for one that will be committed.

        `hurried`: chooses in place of all experts, where there is something to build on.
        """
        with self._lock:
            line = self._hoped()
            ledger = self._seen_from(line, counted)
            if full and hurried is not None and line.banks is not None:
                selection = hurried(ledger)
            elif self._is_full(line, full):
                selection = None
            else:
                selection = self._turns.selection(line.index, ledger, expected_faults, homes)
            self._attempts[save] = attempt = Attempt(line, selection, counted)
            return attempt

    def seen(self, counted: Ledger) -> Ledger:
        """The live ledger, as the newest commit leaves it."""
        return self._seen_from(self._line, counted)

    def ledger(self, save: SaveId) -> dict:
        """For the manifest: what was counted, seen from the newest commit there is now, after this save."""
        with self._lock:
            attempt = self._attempts[save]
        ledger = self._seen_from(self._line, attempt.counted)
        return ledger.after(attempt.selection, self._config.mode).to_json() if ledger.total else {}

    @property
    def parent(self) -> SaveId | None:
        """The newest commit."""
        return self._line.parent

    def ended(self, save: SaveId) -> None:
        """Learns from the folder what became of a save; not later, so that the next one need not ask a disk before it copies."""
        with self._lock:
            if save in self._attempts:
                self._late[save] = self._attempts.pop(save)
            for late in sorted(self._late):
                if (outcome := self._folder.outcome(late)) is not None:
                    self._learn(late, self._late.pop(late), outcome)

    def _learn(self, save: SaveId, attempt: Attempt, committed: bool) -> None:
        if committed:
            banks = attempt.line.banks or self._banks(save)
            ledger = self._seen_from(self._line, attempt.counted).after(attempt.selection, self._config.mode)
            self._line = Line(save, attempt.line.index + 1, banks, ledger if ledger.total else None)
        elif self._folder.needs_full(save):
            self._line = Line(None, self._line.index)

    def _hoped(self) -> Line:
        if not self._attempts:
            return self._line
        newest = max(self._attempts)
        attempt = self._attempts[newest]
        banks = attempt.line.banks or self.known_banks or None
        ledger = self._seen_from(attempt.line, attempt.counted).after(attempt.selection, self._config.mode)
        return Line(newest, attempt.line.index + 1, banks, ledger if ledger.total else None)

    def _seen_from(self, line: Line, counted: Ledger) -> Ledger:
        """The live ledger: what was counted, and what the newest commit holds of it."""
        ledger = counted if counted.total else Ledger.of_banks(line.banks or {})
        return ledger.since(line.ledger) if line.ledger else ledger

    def _is_full(self, line: Line, full: bool) -> bool:
        every = self._config.full_every
        return full or line.banks is None or self._config.mode == "full" or (every > 0 and line.index % every == 0)

    def _banks(self, save: SaveId) -> dict[str, int] | None:
        try:
            return self._folder.manifest(save).banks()
        except CheckpointError as error:
            logger("checkpoint").warning(f"{error.message} The next checkpoint is a full one.")
            return None


def copied_experts(number: int, banks: dict[str, int], count: int, selection: Selection | None) -> Selection:
    """Which experts the copy of this number in memory holds: `count` of every bank in turn, and those that go to the store."""
    turn = rotation(number, banks, count)
    return {bank: sorted({*experts, *(selection or {}).get(bank, ())}) for bank, experts in turn.items()}


def banks_of(groups: Iterable[Group]) -> dict[str, int]:
    """Number of experts of every bank, in the order of the model."""
    return {bank: expert + 1 for bank, expert in sorted(groups, key=lambda group: (natural(group[0]), group[1]))}
