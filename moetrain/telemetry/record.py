"""What a run writes about itself: flat records, one JSON object per line. Names are listed in docs/telemetry.md. No torch."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from moetrain.base.errors import MoetrainError

Record = dict[str, float | int | str]
"""Metric name to value; every record has `train/step`. A value that is not finite travels as null and comes back as nan."""

METRICS_FILE = "metrics.jsonl"


def encode(record: Record) -> str:
    """One line of strict JSON, without the line end."""
    clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(clean, ensure_ascii=False)


def decode(line: str) -> Record | None:
    """The record of one line, or None for a line that a kill has torn."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    if not isinstance(values, dict):
        return None
    return {key: math.nan if value is None else value for key, value in values.items()}


def read_records(run: Path) -> list[Record]:
    """All records of a run folder in the order they were written; torn lines are left out, so a live run can be read.

    Raises MoetrainError when the folder holds no metrics.
    """
    file = run / METRICS_FILE
    if not file.is_file():
        raise MoetrainError(f"{run} holds no {METRICS_FILE}.", "Give the folder of a run: runs/<name>.")
    with file.open(encoding="utf-8", errors="replace") as lines:
        return [record for record in map(decode, lines) if record is not None]


def series(records: Iterable[Record], key: str) -> tuple[list[int], list[float]]:
    """Steps (rising) and values of one metric. Of a step trained twice, because of a resume, the last record counts."""
    last: dict[int, float] = {}
    for record in records:
        value, step = record.get(key), record.get("train/step")
        if isinstance(value, int | float) and isinstance(step, int):
            last[step] = float(value)
    steps = sorted(last)
    return steps, [last[step] for step in steps]
