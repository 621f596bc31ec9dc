"""Tables for people: layers by experts, and recovery points. No torch."""

from collections.abc import Mapping

from moetrain.store.manifest import Group


def expert_table(values: Mapping[Group, object]) -> list[str]:
    """One line for each bank with the value of every expert; the first line numbers the experts."""
    banks: dict[str, dict[int, object]] = {}
    for (bank, expert), value in values.items():
        banks.setdefault(bank, {})[expert] = value
    experts = range(1 + max((expert for row in banks.values() for expert in row), default=-1))
    rows = [["expert", *map(str, experts)]]
    rows += [[bank, *(str(row[expert]) if expert in row else "-" for expert in experts)] for bank, row in banks.items()]
    return columns(rows)


def columns(rows: list[list[str]]) -> list[str]:
    """Lines with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
