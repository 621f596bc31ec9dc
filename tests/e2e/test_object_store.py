"""A run whose checkpoints lie in an object store: trained, stopped, resumed, looked at, evaluated and exported by its run folder's name."""

import json
import logging
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.store.bundle import Bundle
from tests.e2e.jobs import events, small_run, train_here
from tests.unit.store_s3_server import BUCKET, s3_server


@pytest.mark.timeout(200)
def test_a_run_keeps_its_checkpoints_in_an_object_store(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    run = tmp_path / "runs" / "first"
    overrides = small_run(corpus, run, 6, f"checkpoint.folder=s3://{BUCKET}/runs", "checkpoint.every_steps=2")
    with s3_server() as (address, faults):
        for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": address}.items():
            monkeypatch.setenv(name, value)
        assert train_here([*overrides, "run.stop_after=3"], monkeypatch) == 0
        assert train_here(overrides, monkeypatch) == 0
        assert events(run) == [("start", 0), ("stop", 3), ("resume", 3), ("done", 6)]
        commits = [path for method, path, condition in faults.requests if method == "PUT" and "/manifests/" in path and condition == "*"]
        assert len(commits) == 4  # steps 2, 3, 4 and 6
        capsys.readouterr()
        assert cli.main(["checkpoint", "verify", str(run)]) == 0
        assert "DAMAGED" not in capsys.readouterr().out
        assert cli.main(["evaluate", str(run), "--json", str(tmp_path / "result.json")]) == 0
        assert json.loads((tmp_path / "result.json").read_text())["bits_per_byte"] > 0
        assert cli.main(["export", str(run), "--out", str(tmp_path / "bundle")]) == 0
        assert "embedding.weight" in Bundle.open(tmp_path / "bundle").tensors
    assert (run / "checkpoint").read_text() == f"s3:/{BUCKET}/runs/first\n"
