"""Does it learn? Trains one experiment over several seeds and compares bits per held-out byte with gzip -9 and a unigram model.

    python -m tools.learn --experiment gpt_moe_8e --seeds 1 2 3 --json benchmarks/learn.json [-- OVERRIDES]

Every seed is the main job itself, two ranks under torchrun; the figure is the one it records at its end, over every held-out byte.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from moetrain.telemetry.record import read_records
from tools.compare_compression import bits_per_byte

REQUIRED = 0.98  # of gzip's bits per byte


def train(experiment: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, float]:
    """One run from nothing; its figures."""
    name = f"{experiment}-seed{seed}"
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--standalone", "--nproc-per-node", "2", "launch/train.py", f"+experiment={experiment}"]
    command += [f"run.folder={folder}", f"run.name={name}", f"run.seed={seed}", f"data.seed={seed}", "checkpoint.resume=never", *overrides]
    started = time.monotonic()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    records = read_records(folder / name)
    last = [record for record in records if "evaluation/bits_per_byte" in record][-1]
    steps = [record for record in records if "train/loss" in record]
    return {
        "seed": seed,
        "bits_per_byte": float(last["evaluation/bits_per_byte"]),
        "nats_per_token": float(last["evaluation/loss"]),
        "tokens": float(steps[-1]["train/tokens"]),
        "seconds": time.monotonic() - started,
        "load_max_over_mean": float(steps[-1]["moe/load_max_over_mean"]),
    }


def corpus_of(run: Path) -> Path:
    """The prepared corpus a run was trained on."""
    return Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["corpora"][0]["path"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="gpt_moe_8e")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=Path("runs/learn"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    runs = [train(options.experiment, seed, options.folder, options.overrides) for seed in options.seeds]
    others = bits_per_byte(corpus_of(options.folder / f"{options.experiment}-seed{options.seeds[0]}"), "validation")
    gzip = min(others["gzip_per_file"], others["gzip_concatenated"])
    median = statistics.median(run["bits_per_byte"] for run in runs)
    print(f"\n{'bits per byte on':24} {others['bytes']:,} held-out bytes of {others['documents']} files")
    print(f"{'unigram of the tokens':24} {others['unigram']:.4f}")
    print(f"{'gzip -9':24} {gzip:.4f}   (per file {others['gzip_per_file']:.4f}, concatenated {others['gzip_concatenated']:.4f})")
    for run in runs:
        print(f"{options.experiment + ' seed ' + str(run['seed']):24} {run['bits_per_byte']:.4f}   in {run['seconds']:.0f} s")
    ok = median <= REQUIRED * gzip
    print(f"{'median / gzip':24} {median / gzip:.4f}   {'ok' if ok else 'FAILED'}: at most {REQUIRED} is asked for")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "command": ["python", "-m", "tools.learn", *sys.argv[1:]],
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
        }
        result = {**facts, "runs": runs, "median_bits_per_byte": median, "median_over_gzip": median / gzip, "others": others, "ok": ok}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
