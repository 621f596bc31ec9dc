"""tools/gpu_check.py at toy sizes on a CPU, so that the one call on a GPU does not fail for want of use."""

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moetrain.config import compose, to_config
from tools import bench_experts, gpu_check
from tools.bench_experts import QUICK, Shape, compare
from tools.bench_step import CASES, model_config
from tools.gpu_check import PARTS, PartFailed, Session, main
from tools.gpu_check import tests as gpu_tests
from tools.gpu_overlap import POINTS
from tools.overlap_cases import opponents

OVERLAP = ["null_transport", "link_60"]  # the other points are the same code
SPEED = [part for part in PARTS if part != "null_transport" and not part.startswith("link_")]


def quick(folder: Path, *parts: str) -> int:
    return main(["--device", "cpu", "--quick", "--out", str(folder), "--parts", *parts])


def read(folder: Path, part: str) -> dict:
    return json.loads((folder / f"gpu_{part}.json").read_text())


def test_tests_and_speeds_run_on_a_cpu_and_write_their_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quick(tmp_path, *SPEED) == 0
    text = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {f"gpu_{part}.json" for part in SPEED}
    for part in SPEED:
        facts = read(tmp_path, part)
        assert facts["verdict"] == ("skipped: tests marked gpu need a CUDA device" if part == "tests" else "done")
        assert facts["torch"] == torch.__version__ and facts["quick"]
        assert f"{part:14} {facts['verdict']}" in text
    assert "host" not in read(tmp_path, "environment")["moetrain"]
    timings = read(tmp_path, "experts")["timings"]
    assert {timing["method"] for timing in timings} == {"loop", "bmm", "grouped_mm", "loop again"}
    assert all(timing["seconds"] > 0 for timing in timings if not timing["refused"])
    assert all(timing["of_roofline"] > 0 for timing in timings if not timing["refused"])
    for model in ("gpt_moe_8e", "gpt_125m_8e"):
        variants = read(tmp_path, "training")[model]["variants"]
        assert all(found["last_loss"] < found["first_loss"] and found["mfu"] > 0 for found in variants.values())
        assert all(found["tokens_per_second"] > 0 for found in read(tmp_path, "generation")[model])


def test_overlap_on_a_cpu_checks_its_results_and_says_that_the_link_is_emulated(tmp_path: Path) -> None:
    assert quick(tmp_path, *OVERLAP) == 0
    null, found = (read(tmp_path, part) for part in OVERLAP)
    assert max(null["errors"].values()) < 1e-4 and null["one rank against plain"] < 1e-5
    assert null["added_share"]["median"] > 0 and set(null["wall_ratios"]) == {"plain again", "axis of one rank", "null transport"}
    assert found["link"].startswith("EMULATED") and found["payload_bytes_per_second"] > 0
    assert set(found["laps"]) == {run.name for run in opponents()}
    assert set(found["figures"]["ratios"]) >= {"A/A", "top-2 serial", "top-1 serial", "shared expert, overlapped, the best"}
    assert all(set(parts) == {"forward", "backward"} for parts in found["figures"]["hiding"].values())
    assert max(found["errors"].values()) < 1e-4
    assert all(one["gradients equal to the bit"] for one in found["checked"].values())


def test_every_point_of_the_link_is_a_part() -> None:
    assert {part.removeprefix("link_") for part in PARTS if part.startswith("link_")} == set(POINTS)


def test_the_roofline_is_the_lower_of_peak_and_bandwidth() -> None:
    shape = Shape(rows=10, experts=2, hidden=3, ffn=4)
    assert shape.flops == 18 * 10 * 3 * 4 and shape.bytes(2) == 2 * (9 * 2 * 3 * 4 + 4 * 10 * 3)
    assert shape.roofline(1e3, 1e9, 2) == 1e3
    assert shape.roofline(1e12, 336.0, 2) == pytest.approx(336.0 * 2160 / 672)


def test_a_part_that_fails_or_lacks_a_package_lets_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(session: Session) -> gpu_check.Result:
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    def failing(session: Session) -> gpu_check.Result:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu_check.PARTS, "training", lacking)
    assert quick(tmp_path, "training") == 0
    monkeypatch.setitem(gpu_check.PARTS, "generation", failing)
    assert quick(tmp_path, "generation", "training", "environment") == 1
    assert read(tmp_path, "training")["verdict"] == "skipped: it needs the package absent"
    assert read(tmp_path, "generation")["verdict"] == "FAILED: RuntimeError: out of luck"
    assert read(tmp_path, "environment")["verdict"] == "done"


def test_no_part_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert main(["--device", "cpu", "--quick", "--out", str(tmp_path), "--budget", "0"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", CASES)
def test_the_measured_model_is_the_experiments(experiment: str) -> None:
    assert model_config(experiment) == to_config(compose([f"+experiment={experiment}"])).model


def test_a_wrong_method_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_experts.grouped_swiglu

    def wrong(rows_RD: Tensor, count_e: Tensor, gate_up: Tensor, down: Tensor, method: str) -> Tensor:
        out = right(rows_RD, count_e, gate_up, down, method)
        return out * 1.001 if method == "bmm" else out

    monkeypatch.setattr(bench_experts, "grouped_swiglu", wrong)
    by_method = {timing.method: timing for timing in compare("quick", QUICK["quick"], "float32", torch.device("cpu"), 1, 1.0)}
    assert "wrong: off by 1.0e-03" in by_method["bmm"].refused
    assert by_method["bmm"].seconds == 0.0 < by_method["grouped_mm"].seconds


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests pass")
def test_gpu_tests_that_were_all_skipped_are_no_success(tmp_path: Path) -> None:
    with pytest.raises(PartFailed, match="0 tests passed") as failure:
        gpu_tests(Session(torch.device("cuda"), False, tmp_path, 100.0, time.monotonic()))
    outcomes = failure.value.result["tests"]
    assert isinstance(outcomes, dict) and len(outcomes) > 20
    assert set(outcomes.values()) == {"skipped: needs a CUDA device"}


def test_without_a_gpu_the_default_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err
