"""A checkpoint folder in an object store: the same promises as on a disk, over a real HTTP server that is sometimes unkind."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from crc32c import crc32c

from moetrain.base.errors import CheckpointError, MissingExtraError
from moetrain.store.backend import FolderBackend, NoAnswer, open_backend
from moetrain.store.encode import encode
from moetrain.store.io import Io
from moetrain.store.manifest import SaveId
from moetrain.store.objects import CheckpointFolder, Superseded, resolve
from moetrain.store.s3 import S3Backend
from tests.unit.checkpoint_kit import Job, assert_equal, expected
from tests.unit.store_s3_server import BUCKET, Faults, s3_server
from tests.unit.test_store_objects import manifest

ROOT = Path(f"s3://{BUCKET}/runs/one")


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as found:
        yield found


@pytest.fixture
def faults(server, monkeypatch) -> Faults:
    address, faults = server
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": address}.items():
        monkeypatch.setenv(name, value)
    open_backend(ROOT).remove_tree(ROOT)
    return faults


@pytest.fixture
def folder(faults) -> CheckpointFolder:
    return CheckpointFolder(ROOT, Io())


def impatient() -> S3Backend:
    """Gives up on a request after half a second, and does not rest between attempts."""
    backend = S3Backend.of_environment(ROOT, timeout_seconds=0.5)
    backend._sleep = lambda seconds: None
    return backend


def put(folder: CheckpointFolder, save: SaveId) -> str:
    share = folder.new_share(save, 0)
    values = {"dense.float32": np.full(4, save.seq, np.float32), "none.int64": np.empty(0, np.int64)}
    folder.put_share(share, [(label, encode(array, {})) for label, array in values.items()])
    return f"{share}/dense.float32"


def committed(folder: CheckpointFolder, save: SaveId, *extra: str) -> str:
    name = put(folder, save)
    folder.commit(manifest(save, [name, *extra]))
    return name


def to(method: str, name: str):
    return lambda request: request.method == method and name in request.path


def test_paths_of_object_stores_and_folders_are_told_apart(faults, tmp_path):
    assert isinstance(open_backend(ROOT), S3Backend)
    assert isinstance(open_backend(tmp_path), FolderBackend)
    with pytest.raises(CheckpointError, match="names no bucket"):
        open_backend(Path("s3://"))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "moetrain.store.s3")
    with pytest.raises(MissingExtraError, match=r"moetrain\[s3\]"):
        open_backend(ROOT)


def test_a_run_of_saves_sweeps_and_pins_is_the_same_as_on_a_disk(folder):
    save = folder.claim(0.0)
    assert save == SaveId(1, 1)
    names = [committed(folder, SaveId(1, 1))]
    names.append(committed(folder, SaveId(1, 2), names[0]))
    folder.pin("good", SaveId(1, 2))
    names += [committed(folder, SaveId(1, seq), names[0]) for seq in (3, 4)]
    in_flight = put(folder, SaveId(1, 5))
    folder.put_receipt(SaveId(1, 4), 0, {"rank": 0})
    folder.put_receipt(SaveId(1, 3), 0, {"rank": 0})
    assert (folder.receipt(SaveId(1, 4), 0), folder.receipt(SaveId(1, 4), 1)) == ({"rank": 0}, None)
    assert folder.begun(SaveId(1, 4)) == {0}
    folder.sweep(1, SaveId(1, 4))
    assert folder.saves() == [SaveId(1, 4), SaveId(1, 2)]
    assert folder.receipt(SaveId(1, 3), 0) is None
    for name in (names[0], names[1], names[3], in_flight):
        step = int(name[7:15])
        crc = crc32c(np.full(3, step, np.float32).tobytes())
        assert folder.open(name).read_checked(1, 3, crc).tolist() == [step] * 3
    with pytest.raises(CheckpointError, match="missing"):
        folder.open(names[2])
    folder.unpin("good")
    folder.prune(1)
    assert folder.saves() == [SaveId(1, 4)]
    assert folder.io.list(ROOT / "objects") == [str(SaveId(1, 1)), str(SaveId(1, 4))]
    assert resolve(ROOT) == ROOT
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resolve(ROOT / "elsewhere")


def test_the_commit_is_a_conditional_put(folder, faults):
    save = folder.claim(0.0)
    committed(folder, save)
    manifests = [request for request in faults.requests if request[0] == "PUT" and "/manifests/" in request[1]]
    assert manifests[-1][2] == "*"
    with pytest.raises(CheckpointError, match="decided before"):
        committed(folder, save)
    folder.abandon(save, "too late")
    assert folder.outcome(save) is True


def test_of_many_jobs_that_start_at_once_each_gets_its_own_epoch(folder):
    barrier = Barrier(4)

    def claim() -> int:
        barrier.wait(20)
        return CheckpointFolder(ROOT, Io()).claim(0.0).epoch

    with ThreadPoolExecutor(4) as pool:
        epochs = [future.result() for future in [pool.submit(claim) for _ in range(4)]]
    assert sorted(epochs) == [1, 2, 3, 4]
    with pytest.raises(Superseded):
        committed(folder, SaveId(3, 9))


def test_a_commit_whose_answer_was_lost_is_a_commit(folder, faults):
    save = folder.claim(0.0)
    faults.lost.append(to("PUT", "/manifests/"))
    committed(folder, save)
    assert not faults.lost
    assert folder.outcome(save) is True


def test_a_time_out_after_success_is_success(faults):
    folder = CheckpointFolder(ROOT, impatient())
    save = folder.claim(0.0)
    faults.lost.append(to("PUT", "/manifests/"))
    faults.hold.clear()
    try:
        committed(folder, save)
    finally:
        faults.hold.set()
    assert folder.outcome(save) is True


def test_a_conflict_is_tried_again_and_a_name_taken_by_another_is_not(folder, faults):
    path = ROOT / "manifests" / "x"
    faults.instead.append((to("PUT", "/manifests/x"), 409))
    folder.io.create(path, b"ours")
    assert folder.io.read(path) == b"ours"
    faults.instead.append((to("PUT", "/manifests/x"), 409))
    with pytest.raises(FileExistsError):
        folder.io.create(path, b"theirs")
    assert folder.io.read(path) == b"ours"


def test_a_store_that_fails_is_an_os_error_and_the_last_checkpoint_stays(faults):
    folder = CheckpointFolder(ROOT, impatient())
    first = folder.claim(0.0)
    name = committed(folder, first)
    faults.instead += [(to("PUT", "/objects/"), 503)] * 50
    with pytest.raises(OSError) as caught:
        put(folder, SaveId(1, 2))
    assert caught.value.strerror
    faults.instead.clear()
    faults.instead += [(to("PUT", "/manifests/"), 503)] * 50
    with pytest.raises(NoAnswer):
        folder.commit(manifest(SaveId(1, 3), [name]))
    faults.instead.clear()
    assert folder.saves() == [first]
    assert folder.outcome(SaveId(1, 3)) is None


def test_a_store_that_refuses_a_manifest_has_answered(folder, faults):
    save = folder.claim(0.0)
    faults.instead += [(to("PUT", "/manifests/"), 403)] * 9
    with pytest.raises(PermissionError) as caught:
        folder.commit(manifest(save, []))
    assert not isinstance(caught.value, NoAnswer)
    faults.instead.clear()


def test_access_that_is_denied_is_said_with_a_hint(folder, faults):
    faults.instead += [(to("PUT", "/claims/"), 403)] * 9
    with pytest.raises(CheckpointError, match="denies access") as caught:
        folder.claim(0.0)
    faults.instead.clear()
    assert "AWS" in caught.value.hint


def test_objects_above_the_size_of_one_request_are_sent_in_parts(folder, monkeypatch):
    monkeypatch.setattr("moetrain.store.s3.WHOLE_BYTES", 1 << 20)
    values = np.random.default_rng(0).random(6 << 18)
    share = folder.new_share(folder.claim(0.0), 0)
    folder.put_share(share, [("dense.float64", encode(values, {}))])
    assert np.array_equal(folder.open(f"{share}/dense.float64").read(0, values.size), values)


class Late(S3Backend):
    """A store whose lists miss what is in `unseen`."""

    unseen: set[str]

    def list(self, path: Path) -> list[str]:
        return [name for name in super().list(path) if name not in self.unseen]


def test_late_lists_cost_no_fence_and_no_object(faults):
    late = Late.of_environment(ROOT)
    late.unseen = {"000002"}
    folder = CheckpointFolder(ROOT, late)
    folder.claim(0.0)
    second = CheckpointFolder(ROOT, Io()).claim(0.0)
    with pytest.raises(Superseded):  # although its claim is not listed
        committed(folder, SaveId(1, 1))
    third = folder.claim(0.0)
    assert (second.epoch, third.epoch) == (2, 3)
    names = [committed(folder, SaveId(3, 1))]
    names.append(committed(folder, SaveId(3, 2)))
    names.append(committed(folder, SaveId(3, 3), names[1]))
    for unseen in ({f"{SaveId(3, 3)}.json"}, {f"{SaveId(3, 2)}.json", f"{SaveId(3, 3)}.json"}):
        late.unseen = unseen
        folder.sweep(1, SaveId(3, 3))
        late.unseen = set()
        assert len(folder.saves()) == 3
    folder.sweep(1, SaveId(3, 3))
    assert folder.saves() == [SaveId(3, 3)]
    folder.open(names[1])


def test_a_job_saves_to_an_object_store_and_resumes_from_it_in_another_layout(faults):
    before = len(faults.requests)
    job = Job(ROOT, 2, 2, experts_per_save=1)
    for version in (1, 2, 3):
        assert all(pending.committed for pending in job.save(version))
    commits = [request for request in faults.requests[before:] if request[0] == "PUT" and "/manifests/" in request[1]]
    assert len(commits) == 3  # and not a folder of that name beside the tests
    report, whole = Job(ROOT, 3, 1).load("must")
    assert report is not None
    assert report.step == 3
    assert_equal(whole, expected(3, {group: 3 - age for group, age in report.ages.items()}))
