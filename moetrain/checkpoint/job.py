"""What a rank tells its writer process, and what every writer tells the one of rank 0. JSON: nothing of ours is ever unpickled."""

import json
from dataclasses import asdict, dataclass, field

from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.plan import ObjectPlan
from moetrain.store.manifest import ObjectRecord, SaveId, Tensor


@dataclass(frozen=True)
class SaveJob:
    """One rank's part of one save. `tensors`: what this rank holds and does not write, without pieces."""

    folder: str
    save: SaveId
    parent: SaveId | None
    rank: int
    world: int
    index: int
    step: int
    mode: str
    selection: Selection | None  # None: full
    objects: list[ObjectPlan]
    tensors: list[Tensor]
    progress: dict
    keep: int
    timeout_seconds: float
    ledger: dict = field(default_factory=dict)  # for the manifest

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "SaveJob":
        found = json.loads(data)
        objects = [ObjectPlan(**plan | {"tensors": [Tensor.of_json(tensor) for tensor in plan["tensors"]]}) for plan in found["objects"]]
        return cls(
            **found
            | {
                "save": SaveId(*found["save"]),
                "parent": None if found["parent"] is None else SaveId(*found["parent"]),
                "objects": objects,
                "tensors": [Tensor.of_json(tensor) for tensor in found["tensors"]],
            }
        )


@dataclass(frozen=True)
class Receipt:
    """What one rank wrote for one save, or `error`: why it could not. Tensors that it holds and did not write have no pieces."""

    rank: int
    index: int
    selection: Selection | None
    objects: list[ObjectRecord]
    tensors: list[Tensor]
    error: str = ""

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict) -> "Receipt":
        objects = [ObjectRecord(**record) for record in found["objects"]]
        return cls(**found | {"objects": objects, "tensors": [Tensor.of_json(tensor) for tensor in found["tensors"]]})


@dataclass(frozen=True)
class Reply:
    """A writer's answer to a job. `written`: this rank's part is durable; what becomes of the save is rank 0's to say."""

    outcome: str  # written | committed | abandoned | superseded
    reason: str = ""
    num_bytes: int = 0  # new bytes: of the whole save when committed, else of this rank
    seconds: float = 0.0
    oldest_expert_steps: int = 0

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reply":
        return cls(**json.loads(data))
