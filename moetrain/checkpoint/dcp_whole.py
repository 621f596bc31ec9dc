"""Whether a DCP checkpoint holds a whole recovery point, told from its names and its `Facts`, before anything is read or claimed."""

from collections.abc import Collection
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.dcp import FORM, KEYS, Facts
from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.modes import MODES


def parse(key: str, path: Path) -> tuple[str, str]:
    """Name and component of a DCP tensor."""
    for component, form in KEYS.items():
        before, after = form.split("{}")
        if key.startswith(before) and key.endswith(after):
            return key.removeprefix(before).removesuffix(after), component
    raise CheckpointError(f"{path} holds {key}, which is no tensor of a recovery point.", FORM)


def check_facts(facts: Facts) -> None:
    """Raises ValueError for values that contradict each other, TypeError, KeyError and others for values of other types."""
    if facts.mode not in MODES:
        raise ValueError(f"its mode is {facts.mode}, which is none of {', '.join(MODES)}")
    if not all(isinstance(number, int) for number in (facts.step, facts.index, facts.progress["step"])):
        raise ValueError("its steps are no numbers")
    if not all(isinstance(text, str) for text in (*facts.keys, *(name for about in facts.banks.values() for name in about["names"]))):
        raise ValueError("its names are no texts")
    banks = {bank: about["experts"] for bank, about in facts.banks.items()}
    for bank, num_experts in banks.items():
        for component, row in facts.steps[bank].items():
            if len(row) != num_experts or not all(isinstance(step, int) for step in row):
                raise ValueError(f"{bank} has {num_experts} experts, and the steps of their {component} are {row}")
    for name, counts in Ledger.of_json(facts.ledger, banks).to_json().items():
        if {bank: len(row) for bank, row in counts.items()} != banks:
            raise ValueError(f"its ledger counts other experts than there are ({name})")


def check_keys(facts: Facts, keys: Collection[str], path: Path) -> None:
    """Raises CheckpointError when a tensor is missing, or the facts do not say of which step an expert's are."""
    if missing := sorted(_required(facts, keys, path).difference(keys)):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        hint = "Save the whole model and its optimizer, and convert that."
        raise CheckpointError(f"{path} is not a whole recovery point: it lacks {missing[0]}{more}.", hint)
    bank_of = {name: bank for bank, about in facts.banks.items() for name in about["names"]}
    for key in keys:
        name, component = parse(key, path)
        if name in bank_of and component not in facts.steps[bank_of[name]]:
            raise CheckpointError(f"{path} does not say of which step the experts in {key} are.", FORM)


def _required(facts: Facts, keys: Collection[str], path: Path) -> set[str]:
    """What the facts list. Older ones list experts only: of what belongs to none, all that is trained needs weights, moments and count,
    and where no optimizer has left a trace everything passes for trained."""
    if facts.keys:
        return set(facts.keys)
    experts = {
        KEYS[component].format(name) for bank, about in facts.banks.items() for name in about["names"] for component in facts.steps[bank]
    }
    found = [parse(key, path) for key in keys]
    trained = {name for name, component in found if component != "master"} or {name for name, _ in found}
    return experts | {form.format(name) for name in trained for form in KEYS.values()}
