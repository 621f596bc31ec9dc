"""Which components of which experts one checkpoint writes. Pure, no torch."""

from moetrain.store.manifest import Tensor

Selection = dict[str, list[int]]
"""Bank -> experts written in this checkpoint."""

# Components of an expert that are written although it was not selected.
ALWAYS_WRITTEN = {
    "experts": frozenset[str](),
    "full": frozenset({"master", "m", "v", "step"}),
}
MODES = tuple(ALWAYS_WRITTEN)


def is_written(tensor: Tensor, mode: str, selection: Selection | None) -> bool:
    """Everything that is no expert's, the selected experts, and what the mode adds. `selection` None: a full checkpoint."""
    if tensor.group is None or selection is None or tensor.component in ALWAYS_WRITTEN[mode]:
        return True
    bank, expert = tensor.group
    return expert in selection[bank]
