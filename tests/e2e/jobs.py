"""Real torchrun jobs for the end-to-end tests: watched through the files they write, never for longer than a limit, and always ended."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from moetrain import cli, launch
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from moetrain.telemetry.record import METRICS_FILE, Record, read_records
from tests.kit import run_processes
from tools.kill_drill import children

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 90.0
POLL_SECONDS = 0.05

# Everything is small but the mechanism: 8 experts in two ScMoE pairs, 512 tokens a step.
SMALL = (
    "data=custom", "data.seq_len=64", "train.global_batch_tokens=512", "train.sample_every=0", "telemetry.console=lines", "optim=cosine",
    "optim.lr=0.001", "model.vocab_size=300", "model.max_position=64", "model.hidden_size=32", "model.ffn_size=64",
    "model.expert_ffn_size=32", "model.shared_ffn_size=32", "model.attention.num_heads=2", "model.attention.num_kv_heads=2",
    "model.attention.head_dim=16",
)  # fmt: skip
TOKENS_PER_STEP = 512


def small_run(corpus: Path, folder: Path, steps: int, *more: str, experiment: str = "gpt_moe_8e") -> list[str]:
    """Overrides of a run of `steps` steps in `folder`."""
    return [
        f"+experiment={experiment}", *SMALL, f"data.corpora.0.path={corpus}", f"run.folder={folder.parent}", f"run.name={folder.name}",
        f"train.tokens={steps * TOKENS_PER_STEP}", *more,
    ]  # fmt: skip


def prepare_text(out: Path, modules: Sequence[str], tokenizer: str = "train") -> Path:
    """A corpus of a few modules of the standard library; their names decide who is held out. Returns its folder."""
    text = out.with_name(f"{out.name}-text")
    text.mkdir(parents=True)
    for module in modules:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{module}.py", text)
    assert cli.main(["data", "prepare", str(text), "--out", str(out), "--tokenizer", tokenizer, "--vocab-size", "300"]) == 0
    return out


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process makes and every other one waits for: pytest-xdist's workers share it."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if is_worker else base) / f"e2e-{name}"
    shared.mkdir(exist_ok=True)
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "made").exists():
            make(shared)
            (shared / "made").touch()
    return shared


class Job:
    """One torchrun. Leaving the context kills what is left of it, worker by worker, by process id."""

    def __init__(self, ranks: int, overrides: Sequence[str], log: Path, max_restarts: int = 0) -> None:
        self.log = log
        torchrun = Path(sys.executable).with_name("torchrun")
        command = [torchrun, "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={max_restarts}", "launch/train.py", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            for pid in children(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def worker(self, rank: int) -> int:
        """Process id of a rank."""
        found = [pid for pid in children(self.process.pid) if f"\0RANK={rank}\0".encode() in _environment(pid)]
        assert len(found) == 1, f"rank {rank} is {found}\n{self.output()}"
        return found[0]

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds; fails when the job ends or the limit passes before."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self.process.poll() is None, f"The job ended with {self.process.returncode} before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"{what} did not come in {LIMIT_SECONDS} s:\n{self.output()}"
            time.sleep(POLL_SECONDS)

    def end(self) -> int:
        """Waits for torchrun's end; its exit code."""
        try:
            return self.process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"The job did not end in {LIMIT_SECONDS} s:\n{self.output()}") from None

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def _environment(pid: int) -> bytes:
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def train_forked(ranks: int, overrides: Sequence[str], log: Path) -> str:
    """launch/train.py on `ranks` ranks under torchrun's environment, without torchrun and without the imports. Returns what they said."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    codes = run_processes(_train, ranks, log.parent, environment, overrides, log, timeout=LIMIT_SECONDS)
    said = log.read_text(errors="replace")
    assert codes == [0] * ranks, said
    return said


def _train(folder: Path, rank: int, environment: dict[str, str], overrides: Sequence[str], log: Path) -> int:
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    os.chdir(ROOT)
    with log.open("ab") as out:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(out.fileno(), stream.fileno())
    sys.argv = ["launch/train.py", *overrides]
    return launch.main()


def train_here(overrides: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """launch/train.py on one rank in this process, which spares the imports; its exit code."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch/train.py", *overrides, "telemetry.console=off"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # so that it is put back
    return launch.main()


def records(folder: Path) -> list[Record]:
    """What a run has written so far."""
    return read_records(folder) if (folder / METRICS_FILE).is_file() else []


def events(folder: Path) -> list[tuple[str, int]]:
    """(event, step) of every start, resume, stop and end."""
    return [(str(record["event"]), int(record["train/step"])) for record in records(folder) if "event" in record]


def losses(folder: Path) -> dict[int, float]:
    """Step to loss, bit for bit as it was written; of a step trained twice the last."""
    return {int(record["train/step"]): float(record["train/loss"]) for record in records(folder) if "train/loss" in record}


def last_step(folder: Path) -> int:
    return max((int(record["train/step"]) for record in records(folder)), default=0)


def committed_steps(folder: Path) -> list[int]:
    """Steps of the recovery points, the newest first, read as the checkpoint reader does."""
    checkpoint = CheckpointFolder(folder / "checkpoint", Io())
    return [checkpoint.manifest(save).step for save in checkpoint.saves()]


def restored_ages(folder: Path) -> list[list[int]]:
    """Layers x experts of the last resume."""
    resumed = [record for record in records(folder) if record.get("event") == "resume"]
    return json.loads(str(resumed[-1]["checkpoint/expert_ages"]))
