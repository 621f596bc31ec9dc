"""What the last save of a run writes when it is given a few seconds only. Pure, no torch."""

from collections import defaultdict
from collections.abc import Iterable

from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import Selection, is_written
from moetrain.checkpoint.plan import Holding, tensor_of
from moetrain.store.manifest import Group


def most_valuable(holdings: Iterable[Holding], mode: str, ledger: Ledger, num_bytes: float) -> Selection | None:
    """The experts that fit into `num_bytes` beside what every checkpoint holds, those first of which most is lost otherwise: unsaved
    tokens x age, then age, then the order of the model. None: all of them fit."""
    nobody: Selection = {bank: [] for bank in ledger.banks}
    sizes: dict[Group, int] = defaultdict(int)
    left = num_bytes
    for holding in holdings:
        if is_written(tensor_of(holding), mode, nobody):
            left -= holding.num_bytes
        elif holding.group is not None and is_written(tensor_of(holding), mode, None):
            sizes[holding.group] += holding.num_bytes
    unsaved = ledger.unsaved()

    def value(group: Group) -> tuple[int, int]:
        bank, expert = group
        age = ledger.age[bank][expert] + 1
        return unsaved[bank][expert] * age, age

    chosen: list[Group] = []
    for group in sorted(sizes, key=lambda group: (*(-part for part in value(group)), group)):
        if sizes[group] > left:
            break
        left -= sizes[group]
        chosen.append(group)
    if len(chosen) == len(sizes):
        return None
    return {bank: sorted(expert for name, expert in chosen if name == bank) for bank in ledger.banks}
