"""What a rank tells the agent of its node, and what every agent tells the one of rank 0. JSON: nothing of ours is ever unpickled."""

from dataclasses import asdict, dataclass, field

from moetrain.checkpoint.modes import Selection
from moetrain.checkpoint.plan import ObjectPlan
from moetrain.store.manifest import ObjectRecord, SaveId, Tensor


@dataclass(frozen=True)
class SaveJob:
    """One rank's part of one save. `objects` go to the store too, `extras` stay in memory; `tensors`: what this rank holds and does not
    copy, without pieces. The two selections say which experts are written to the store and copied into memory; None: all of them.
    `ancestors`: as of a Manifest."""

    folder: str
    save: SaveId
    parent: SaveId | None
    rank: int
    world: int
    index: int
    step: int
    mode: str
    selection: Selection | None
    objects: list[ObjectPlan]
    tensors: list[Tensor]
    progress: dict
    keep: int
    timeout_seconds: float
    extras: list[ObjectPlan] = field(default_factory=list)
    in_memory: Selection | None = None
    share: str = ""  # the first part of the names of `objects`, given by the agent
    ledger: dict = field(default_factory=dict)  # for the manifest
    ancestors: tuple[SaveId, ...] = ()
    run: str = ""  # as `folder` said when its epoch was claimed

    @property
    def plans(self) -> list[ObjectPlan]:
        """Everything that is copied."""
        return [*self.objects, *self.extras]

    def to_json(self) -> dict:
        return vars(self) | {
            "objects": [_plan_to_json(plan) for plan in self.objects],
            "extras": [_plan_to_json(plan) for plan in self.extras],
            "tensors": [_tensor_to_json(tensor) for tensor in self.tensors],
        }

    @classmethod
    def of_json(cls, found: dict) -> "SaveJob":
        return cls(
            **found
            | {
                "save": SaveId(*found["save"]),
                "parent": None if found["parent"] is None else SaveId(*found["parent"]),
                "ancestors": tuple(SaveId(*one) for one in found.get("ancestors", ())),
                "objects": [_plan_of_json(plan) for plan in found["objects"]],
                "extras": [_plan_of_json(plan) for plan in found["extras"]],
                "tensors": [Tensor.of_json(tensor) for tensor in found["tensors"]],
            }
        )


def _tensor_to_json(tensor: Tensor) -> dict:
    """As `asdict`, which copies every value, but some ten times faster: a rank does this beside its training."""
    return vars(tensor) | {"pieces": [vars(piece) for piece in tensor.pieces]}


def _plan_to_json(plan: ObjectPlan) -> dict:
    return vars(plan) | {"tensors": [_tensor_to_json(tensor) for tensor in plan.tensors]}


def _plan_of_json(found: dict) -> ObjectPlan:
    tensors = [Tensor.of_json(tensor) for tensor in found["tensors"]]
    return ObjectPlan(found["label"], found["dtype"], found["size"], tensors, found["parts"])


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
        tensors = [_tensor_to_json(tensor) for tensor in self.tensors]
        return vars(self) | {"objects": [vars(record) for record in self.objects], "tensors": tensors}

    @classmethod
    def of_json(cls, found: dict) -> "Receipt":
        objects = [ObjectRecord(**record) for record in found["objects"]]
        return cls(**found | {"objects": objects, "tensors": [Tensor.of_json(tensor) for tensor in found["tensors"]]})


@dataclass(frozen=True)
class Reply:
    """An agent's answer to a job. `written`: this rank's part is durable; what becomes of the save is rank 0's to say. `unknown`: there was
    no answer."""

    outcome: str  # written | committed | abandoned | superseded | unknown
    reason: str = ""
    num_bytes: int = 0  # new bytes: of the whole save when committed, else of this rank
    seconds: float = 0.0
    oldest_expert_steps: int = 0
    swept: str = ""  # why a sweep left behind what is not needed

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict) -> "Reply":
        return cls(**found)
