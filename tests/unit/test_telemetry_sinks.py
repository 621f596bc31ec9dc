"""The fan-out, TensorBoard and wandb: a sink may fail, training may not."""

import builtins
import errno
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import BinaryIO

import numpy as np
import pytest
from matplotlib.figure import Figure

from moetrain.base.clock import SystemClock
from moetrain.base.log import logger
from moetrain.telemetry import wandb as wandb_sink
from moetrain.telemetry.config import TelemetryConfig
from moetrain.telemetry.experts import Snapshot
from moetrain.telemetry.open import open_sinks
from moetrain.telemetry.plots import heat_map
from moetrain.telemetry.record import Record, read_records
from moetrain.telemetry.sinks import JsonlSink, Sinks
from moetrain.telemetry.tensorboard import TensorboardSink
from moetrain.telemetry.wandb import open_wandb, stable_id

LOAD = np.array([[1, 2], [3, 0]])


def draw() -> Figure:
    return heat_map(Snapshot(7, LOAD, ("blocks.0.moe.experts", "blocks.1.moe.experts")))


@pytest.fixture(autouse=True)
def warnings_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logger(), "propagate", True)


class ListSink:
    """Keeps what it is told; fails at the call named `fails_at`."""

    def __init__(self, fails_at: str = "") -> None:
        self.fails_at, self.calls = fails_at, list[str]()

    def log(self, record: Record) -> None:
        self._say("log")

    def show_load(self, step: int, load_LE: np.ndarray) -> None:
        self._say("show_load")

    def image(self, name: str, draw: Callable[[], Figure], step: int) -> None:
        self._say("image")

    def close(self) -> None:
        self._say("close")

    def _say(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails_at:
            raise OSError("disk full")


def use(sinks: Sinks) -> None:
    for step in (1, 2):
        sinks.log({"train/step": step})
        sinks.show_load(step, LOAD)
        sinks.image("experts/load", draw, step)
    sinks.close()


@pytest.mark.parametrize("call", ["log", "show_load", "image", "close"])
def test_a_failing_sink_is_dropped_with_one_warning_and_the_others_go_on(call: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = ListSink(fails_at=call), ListSink()
    use(Sinks([bad, good]))
    assert bad.calls[-1] == call
    assert bad.calls.count(call) == 1
    assert good.calls == ["log", "show_load", "image"] * 2 + ["close"]
    assert len(caplog.records) == 1
    assert "ListSink" in caplog.text and "disk full" in caplog.text


class FullDisk:
    """A file that takes `room` bytes and no more."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.room = file, 5

    def write(self, content: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(content[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


def test_records_wait_for_a_full_disk_and_none_is_lost_or_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlSink(tmp_path)
    disk = FullDisk((tmp_path / "metrics.jsonl").open("ab", buffering=0))
    monkeypatch.setattr(sink, "_file", disk)
    sinks = Sinks([sink])
    for step in (1, 2, 3):
        disk.room = 10_000 if step == 3 else disk.room
        sinks.log({"train/step": step})
    sinks.close()
    assert [record["train/step"] for record in read_records(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("No space left on device") == 1


def test_only_rank_0_writes(tmp_path: Path) -> None:
    config = TelemetryConfig(console="off")
    for is_main in (False, True):
        sinks = open_sinks(config, tmp_path / str(is_main), "gpt", 1, SystemClock(), {}, is_main)
        sinks.log({"train/step": 1})
        sinks.close()
    assert not (tmp_path / "False").exists()
    assert read_records(tmp_path / "True") == [{"train/step": 1}]


def test_tensorboard_holds_scalars_texts_and_images(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorboardSink(tmp_path)
    sink.log({"train/step": 7, "train/loss": 2.5, "sample/text": "def f():"})
    sink.show_load(7, LOAD)
    sink.image("experts/load", draw, 7)
    sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/loss")] == [(7, 2.5)]
    assert events.Tags()["images"] == ["experts/load"]
    assert events.Tags()["tensors"] == ["sample/text/text_summary"]


def test_tensorboard_hides_points_that_a_resume_trains_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, loss in (((1, 2, 3, 4), 9.0), ((3, 4), 1.0)):
        sink = TensorboardSink(tmp_path)
        for step in steps:
            sink.log({"train/step": step, "train/loss": loss})
        sink.close()
    points = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 9.0), (2, 9.0), (3, 1.0), (4, 1.0)]


def test_an_unused_tensorboard_writes_nothing(tmp_path: Path) -> None:
    TensorboardSink(tmp_path).close()
    assert not list(tmp_path.iterdir())


class FakeRun:
    def __init__(self, calls: list[tuple[object, ...]]) -> None:
        self.calls = calls

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define", name, step_metric))

    def log(self, data: Record) -> None:
        self.calls.append(("log", data))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A wandb that writes down what it is told. `files_at_init` are the names in the run folder when init was called."""
    fake = SimpleNamespace(calls=[], init_keys={}, files_at_init=set())

    def init(**keys: object) -> FakeRun:
        fake.init_keys = keys
        fake.files_at_init = {file.name for file in Path(str(keys["dir"])).iterdir()}
        return FakeRun(fake.calls)

    fake.init, fake.Image, fake.Settings = init, lambda pixels: ("image", pixels.shape[2]), SimpleNamespace
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_counts_by_train_step_and_never_by_its_own(fake_wandb: SimpleNamespace, tmp_path: Path) -> None:
    (sink,) = open_wandb("offline", "project", "gpt", tmp_path, {"seed": 1})
    sink.log({"train/step": 7, "train/loss": 2.5})
    sink.image("experts/load", draw, 7)
    sink.close()
    assert fake_wandb.calls == [
        ("define", "train/step", None),
        ("define", "*", "train/step"),
        ("log", {"train/step": 7, "train/loss": 2.5}),
        ("log", {"train/step": 7, "experts/load": ("image", 3)}),
        ("finish",),
    ]
    assert fake_wandb.init_keys["config"] == {"seed": 1}


def test_the_wandb_id_is_on_disk_before_init_and_stable_over_resumes(fake_wandb: SimpleNamespace, tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        (sink,) = open_wandb("online", "project", "gpt", tmp_path, {})
        sink.close()
        ids.append(fake_wandb.init_keys["id"])
        assert fake_wandb.init_keys["resume"] == "allow"
        assert "wandb_id" in fake_wandb.files_at_init
    assert ids == [stable_id(tmp_path)] * 2
    assert stable_id(tmp_path / "another") != ids[0]


def test_a_missing_wandb_is_one_warning_that_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real_import = builtins.__import__

    def without_wandb(name: str, *rest: object) -> object:
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    assert open_wandb("offline", "project", "gpt", tmp_path, {}) == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "moetrain[wandb]" in caplog.text


def test_a_wandb_that_cannot_start_is_one_warning(fake_wandb: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_network(**keys: object) -> FakeRun:
        raise ConnectionError("no such host")

    fake_wandb.init = no_network
    assert open_wandb("online", "project", "gpt", tmp_path, {}) == []
    assert len(caplog.records) == 1
    assert "no such host" in caplog.text


def test_a_wandb_that_does_not_finish_is_left_behind(
    fake_wandb: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    release = Event()
    monkeypatch.setattr(FakeRun, "finish", lambda self: release.wait(30))
    monkeypatch.setattr(wandb_sink, "_FINISH_SECONDS", 0)
    (sink,) = open_wandb("online", "project", "gpt", tmp_path, {})
    sink.close()
    release.set()
    assert "wandb sync" in caplog.text


def test_wandb_off_imports_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_wandb("off", "project", "gpt", tmp_path, {}) == []
    assert not list(tmp_path.iterdir())


def test_a_real_offline_run_is_written_under_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    run = tmp_path / "run"
    (sink,) = open_wandb("offline", "project", "gpt", run, {"model": {"layers": 2}})
    sink.log({"train/step": 4, "train/loss": 2.5, "event": "start"})
    sink.image("experts/load", draw, 4)
    sink.close()
    wandb.teardown()  # its process writes the last of the file after `finish`; at the end of a run Python's exit waits for it
    (written,) = run.glob(f"wandb/offline-run-*-{stable_id(run)}/run-*.wandb")
    assert b"train/loss" in written.read_bytes()
    assert len(list(run.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 1
