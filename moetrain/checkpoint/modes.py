"""Which components of which experts one checkpoint writes. Pure, no torch.

Names of the research: full is M0, moments M1, weights16 M1b, experts M2 (arXiv 2408.04307 reports sizes that fit `moments`).
"""

from moetrain.store.manifest import WEIGHT16, Tensor

Selection = dict[str, list[int]]
"""Bank -> experts written in this checkpoint."""

# Components of an expert that are written although it was not selected.
ALWAYS_WRITTEN = {
    "experts": frozenset[str](),
    "weights16": frozenset({WEIGHT16}),
    "moments": frozenset({"master"}),
    "full": frozenset({"master", "m", "v", "step"}),
}
MODES = tuple(ALWAYS_WRITTEN)


def keeps_weights_fresh(mode: str) -> bool:
    """Whether every checkpoint holds every expert's weights (with `weights16`: rounded to bfloat16)."""
    return bool(ALWAYS_WRITTEN[mode] & {"master", WEIGHT16})


def is_written(tensor: Tensor, mode: str, selection: Selection | None) -> bool:
    """Everything that is no expert's, the selected experts, and what the mode adds. `selection` None: a full checkpoint."""
    is_selected = tensor.group is None or selection is None or tensor.group[1] in selection[tensor.group[0]]
    if tensor.component == WEIGHT16:
        return mode == "weights16" and not is_selected  # never beside the master it is made from
    return is_selected or tensor.component in ALWAYS_WRITTEN[mode]


def is_derived(tensor: Tensor) -> bool:
    """Made from another component while it is copied; left out, not taken over, where a save does not write it."""
    return tensor.component == WEIGHT16
