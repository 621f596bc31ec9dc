"""Where the line of recovery points stands, and what the next save writes. Rank 0 decides by it, for all ranks. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from threading import Lock

from moetrain.base.errors import CheckpointError
from moetrain.base.log import logger
from moetrain.checkpoint.config import CheckpointConfig
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection
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
    is_hurried: bool = False  # nothing comes after it: whatever it loses, without it more would be lost

    def on(self, line: Line) -> "Attempt":
        """The same, built on another commit."""
        return replace(self, line=replace(line, index=self.line.index))


@dataclass(frozen=True)
class Start:
    """What a save that goes to the store now builds on, and the ledger for its manifest; or why it is to be given up."""

    parent: SaveId | None = None
    ledger: dict = field(default_factory=dict)
    refusal: str = ""


class Course:
    """The line as the folder has it, and the attempts of this job whose outcome is not known yet."""

    def __init__(self, folder: CheckpointFolder, config: CheckpointConfig, turns: Turns) -> None:
        self._folder, self._config, self._turns = folder, config, turns
        self._line = Line()
        self.ancestors: tuple[SaveId, ...] = ()  # for every manifest of this start
        self._attempts: dict[SaveId, Attempt] = {}  # on their way
        self._late: dict[SaveId, Attempt] = {}  # of which rank 0's agent has not said what became of them
        self.known_banks: dict[str, int] = {}
        self._lock = Lock()

    def continues(self, line: Line, ancestors: tuple[SaveId, ...] = ()) -> None:
        """After a recovery."""
        self._line, self.ancestors = line, ancestors

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
            is_hurried = False
            if full and hurried is not None and line.banks is not None:
                selection, is_hurried = hurried(ledger), True
            elif self._is_full(line, full):
                selection = None
            else:
                selection = self._turns.selection(line.index, ledger, expected_faults, homes)
            self._attempts[save] = attempt = Attempt(line, selection, counted, is_hurried)
            return attempt

    def seen(self, counted: Ledger) -> Ledger:
        """The live ledger, as the newest commit leaves it."""
        return self._seen_from(self._line, counted)

    def begin(self, save: SaveId) -> Start:
        """When nothing before it is on its way any more: what it builds on is the newest commit there is now, and it may turn out that it
        was chosen for another one."""
        self._look()
        with self._lock:
            if refusal := self._refusal(self._attempts[save], self._line):
                return Start(refusal=refusal)
            self._attempts[save] = attempt = self._attempts[save].on(self._line)
        ledger = self._held(attempt)
        return Start(attempt.line.parent, ledger.to_json() if ledger.total else {})

    @property
    def index(self) -> int:
        """How many commits the line has."""
        return self._line.index

    @property
    def parent(self) -> SaveId | None:
        """The newest commit."""
        return self._line.parent

    def ended(self, save: SaveId) -> None:
        """Learns from the folder what became of a save; not later, so that the next one need not ask a disk before it copies."""
        with self._lock:
            if save in self._attempts:
                self._late[save] = self._attempts.pop(save)
        self._look()

    def _look(self) -> None:
        """Asks without the lock: a disk may hang. What cannot be read now is asked again."""
        for save in sorted(self._late.copy()):
            try:
                outcome = self._folder.outcome(save)
            except OSError as error:
                logger("checkpoint").warning(f"The checkpoint folder {self._folder.path} cannot be read: {error.strerror}.")
                return
            with self._lock:
                if outcome is not None and save in self._late:
                    self._learn(save, self._late.pop(save), outcome)

    def _learn(self, save: SaveId, attempt: Attempt, committed: bool) -> None:
        if committed:
            self._line = self._after(save, attempt, attempt.line.banks or self._banks(save))
            self._late = {late: one for late, one in self._late.items() if late > save}  # an agent commits none after a younger one
        elif self._folder.needs_full(save):
            self._line = Line(None, self._line.index)

    def _hoped(self) -> Line:
        """If all that is on its way will be committed."""
        line = self._line
        for save, attempt in sorted(self._attempts.items(), key=itemgetter(0)):
            if not self._refusal(attempt, line):
                line = self._after(save, attempt.on(line), line.banks or self.known_banks or None)
        return line

    def _refusal(self, attempt: Attempt, line: Line) -> str:
        """Why a save that was chosen for another line must not be committed on this one."""
        if attempt.selection is None or attempt.line.parent == line.parent:
            return ""
        if line.banks is None:
            return "it builds on a checkpoint that was not committed or is damaged."
        if attempt.is_hurried or self._turns.keeps_budget(self._held(attempt.on(line))):
            return ""
        return "without the checkpoint before it, which was not committed, this one would exceed checkpoint.plt_budget."

    def _after(self, save: SaveId, attempt: Attempt, banks: dict[str, int] | None) -> Line:
        ledger = self._held(attempt)
        return Line(save, attempt.line.index + 1, banks, ledger if ledger.total else None)

    def _held(self, attempt: Attempt) -> Ledger:
        """As its manifest holds it."""
        return self._seen_from(attempt.line, attempt.counted).after(attempt.selection, self._config.mode)

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


def banks_of(groups: Iterable[Group]) -> dict[str, int]:
    """Number of experts of every bank, in the order of the model."""
    return {bank: expert + 1 for bank, expert in sorted(groups, key=lambda group: (natural(group[0]), group[1]))}
