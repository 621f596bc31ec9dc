"""Whether all ranks were given the same settings: compared over the store, before anything that would wait for a rank that was not."""

import hashlib
import json
from collections.abc import Mapping

from moetrain.base.errors import TrainingError
from moetrain.dist.world import World

COMPARING = "comparing settings"


def require_same(world: World, settings: Mapping[str, object]) -> None:
    """`settings`: of this rank, by key; what they print is compared. Every rank calls it, with the same keys; no collective.

    Raises TrainingError on every rank, naming the first rank that differs from rank 0, and how.
    """
    if world.size == 1:
        return
    store, mine = world.notes(), {key: repr(value) for key, value in settings.items()}
    text = json.dumps(mine)
    store.set(f"{world.rank}/digest", hashlib.sha256(text.encode()).hexdigest())
    store.set(f"{world.rank}/settings", text)
    with world.watch.operation(COMPARING):
        first, *others = store.multi_get([f"{rank}/digest" for rank in range(world.size)])
        odd = next((rank for rank, digest in enumerate(others, start=1) if digest != first), None)
        if odd is None:
            return
        one, other = (json.loads(found) for found in store.multi_get(["0/settings", f"{odd}/settings"]))
    key = next(key for key in one if one[key] != other.get(key))
    raise TrainingError(
        f"Ranks 0 and {odd} were given different settings: {key} is {one[key]} on rank 0 and {other.get(key)} on rank {odd}.",
        "Start every rank with the same command, packages and kind of device (a machine whose driver fails shows no GPU).",
    )


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted key."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
