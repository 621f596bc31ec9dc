"""What changed between two recovery points. Pure, no torch."""

from dataclasses import dataclass

from moetrain.checkpoint.ledger import Ledger
from moetrain.checkpoint.table import columns, expert_table, size
from moetrain.store.manifest import Group, Manifest


@dataclass(frozen=True)
class Difference:
    """From recovery point `a` to `b`. `anew`: per component the experts whose values in `b` are not those of `a`."""

    a: Manifest
    b: Manifest
    only_a: list[str]  # keys of tensors
    only_b: list[str]
    reshaped: list[str]
    anew: dict[str, set[Group]]
    dense_anew: int  # tensors that belong to no expert

    @classmethod
    def between(cls, a: Manifest, b: Manifest) -> "Difference":
        both = [key for key in b.tensors if key in a.tensors]
        reshaped = [key for key in both if (a.tensors[key].shape, a.tensors[key].dtype) != (b.tensors[key].shape, b.tensors[key].dtype)]
        changed = [b.tensors[key] for key in b.tensors if key not in a.tensors or a.tensors[key].pieces != b.tensors[key].pieces]
        anew: dict[str, set[Group]] = {}
        for tensor in changed:
            if tensor.group is not None:
                anew.setdefault(tensor.component, set()).add(tensor.group)
        return cls(
            a,
            b,
            [key for key in a.tensors if key not in b.tensors],
            [key for key in b.tensors if key not in a.tensors],
            reshaped,
            anew,
            sum(tensor.group is None for tensor in changed),
        )

    def lines(self) -> list[str]:
        """For people: sentences and tables."""
        return [*self._summary(), *self._objects(), *self._experts(), *self._ledger()]

    def _summary(self) -> list[str]:
        lines = [
            f"from seq {_name(self.a)} to seq {_name(self.b)}: {self.b.step - self.a.step:+,} steps, {self.b.time - self.a.time:+,.0f} s",
            *(f"progress {name}: {self.a.progress.get(name, '-')} -> {value}" for name, value in self.b.progress.items()
              if self.a.progress.get(name) != value),
        ]  # fmt: skip
        layout = [(point.world, point.ep) for point in (self.a, self.b)]
        if layout[0] != layout[1]:
            lines.append(f"layout: {layout[0][0]} ranks, ep {layout[0][1]} -> {layout[1][0]} ranks, ep {layout[1][1]}")
        for keys, what in ((self.only_a, "gone"), (self.only_b, "new"), (self.reshaped, "of another shape or type")):
            if keys:
                lines.append(f"{len(keys)} tensors are {what}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}")
        return lines

    def _objects(self) -> list[str]:
        old, new = self.a.objects, self.b.objects
        rows = [["objects", "number", "bytes"]]
        for what, names, records in (
            ("in both", old.keys() & new.keys(), new),
            (f"only in seq {self.a.seq}", old.keys() - new.keys(), old),
            (f"only in seq {self.b.seq}", new.keys() - old.keys(), new),
        ):
            rows.append([what, str(len(names)), size(sum(records[name].num_bytes for name in names))])
        return ["", *columns(rows)]

    def _experts(self) -> list[str]:
        lines = ["", f"{self.dense_anew} tensors that belong to no expert were written anew."]
        if not self.b.groups():
            return lines
        marks = {group: self._mark(group) for group in self.b.groups()}
        lines += ["", "experts written anew (w weights, m moments and Adam step, . neither)", *expert_table(marks)]
        before = self.a.ages()
        ages = {group: f"{before.get(group, '-')}>{age}" for group, age in self.b.ages().items()}
        return [*lines, "", f"age of every expert in steps, seq {self.a.seq} > seq {self.b.seq}", *expert_table(ages)]

    def _mark(self, group: Group) -> str:
        weights = any(group in self.anew.get(component, ()) for component in ("master", "weight16"))
        moments = any(group in self.anew.get(component, ()) for component in ("m", "v", "step"))
        return ("w" * weights + "m" * moments) or "."

    def _ledger(self) -> list[str]:
        if not self.b.ledger:
            return []
        books = [Ledger.of_json(point.ledger, point.banks()) for point in (self.a, self.b)]
        rows = [["token assignments", f"seq {self.a.seq}", f"seq {self.b.seq}"]]
        for what, counts in (
            ("routed", [book.total for book in books]),
            ("not in the moments here", [book.unsaved() for book in books]),
            ("not in the weights here", [book.unsaved_weights() for book in books]),
            ("lost from moments by recoveries", [book.lost for book in books]),
            ("lost from weights by recoveries", [book.lost_weights for book in books]),
        ):
            rows.append([what, *(f"{sum(map(sum, banks.values())):,}" for banks in counts)])
        return ["", *columns(rows)]


def _name(point: Manifest) -> str:
    return f"{point.seq} (step {point.step}, {'full' if point.full else 'partial'})"
