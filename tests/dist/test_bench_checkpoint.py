"""tools/bench_checkpoint.py at a tiny size: two real ranks, every contender, the table and the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTENDERS = (
    "no checkpoints",
    "ours, full",
    "ours, experts",
    "torch.save",
    "safetensors",
    "DCP sync",
    "DCP async, thread",
    "DCP async, process",
)

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def test_every_contender_is_measured_on_two_ranks(tmp_path: Path):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tools.bench_checkpoint",
        "--small",
        "--folder",
        tmp_path,
        "--json",
        tmp_path / "out.json",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    found, rates = report["training"], report["rates"]
    for name in CONTENDERS:
        assert name in done.stdout
        assert len(found["ranks"][0]["iterations"][name]["whole"][0]) == found["size"]["iterations"]
    rows = found["contenders"]
    assert rows["no checkpoints"]["stall_max"] < min(rows[name]["stall_p50"] for name in CONTENDERS[1:])
    assert 0 < rows["ours, experts"]["bytes_per_rank"] < rows["ours, full"]["bytes_per_rank"]
    assert all(ratio["low"] <= ratio["median"] <= ratio["high"] for ratio in rates["ratios"].values())
    assert all("saves committed." in found["ranks"][0]["outcomes"][name] for name in ("ours, full", "ours, experts"))
    assert {"torch", "zarr", "safetensors"} <= found["versions"].keys()
