"""What is said about two recovery points with very many experts."""

from dataclasses import replace

from moetrain.checkpoint.diff import Difference
from moetrain.store.manifest import Manifest, ObjectRecord, Piece, SaveId, Tensor, by_key


def point(num_experts: int) -> Manifest:
    names = [f"000001-00000001/00000-0/b.{expert}.float32" for expert in range(num_experts)]
    tensors = [Tensor("w", "master", "b", e, "float32", (2,), (Piece((0,), (2,), name),)) for e, name in enumerate(names)]
    objects = {name: ObjectRecord(name, 1, 8, 0) for name in names}
    return Manifest(SaveId(1, 1), None, 0, 1, 0.0, "experts", True, 8, 1, 1, {"step": 1}, objects, by_key(tensors))


def test_ages_are_worked_out_once_and_not_for_every_expert(monkeypatch):
    asked = list[Manifest]()
    real = Manifest.ages
    monkeypatch.setattr(Manifest, "ages", lambda self: asked.append(self) or real(self))
    a = point(64)
    lines = Difference.between(a, replace(a, save=SaveId(1, 2), step=4)).lines()
    assert any(line.split() == ["b", *["0>3"] * 64] for line in lines)
    assert len(asked) == 2
