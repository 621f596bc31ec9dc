"""Log lines: sentences with numbers and units, from rank 0 unless something is wrong elsewhere."""

import logging
import os
import sys
from pathlib import Path

_NAME = "moetrain"


def logger(name: str = "") -> logging.Logger:
    """The logger of one room: `logger("checkpoint")`."""
    return logging.getLogger(f"{_NAME}.{name}" if name else _NAME)


def configure(rank: int = 0, file: Path | None = None) -> None:
    """Sends INFO of rank 0 and WARNING of all ranks to standard error, and everything to `file` if one is given."""
    root = logging.getLogger(_NAME)
    root.handlers.clear()
    root.propagate = False
    root.setLevel(logging.DEBUG if os.environ.get("MOETRAIN_DEBUG") else logging.INFO)
    line = logging.Formatter(f"%(asctime)s rank {rank} %(levelname).1s %(message)s", "%H:%M:%S")
    console = logging.StreamHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.setFormatter(line)
    root.addHandler(console)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(file)
        handler.setFormatter(line)
        root.addHandler(handler)
