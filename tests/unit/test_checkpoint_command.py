"""`moetrain checkpoint list|show|verify|diff|pin`, partly in an interpreter that refuses torch."""

import pytest

from moetrain.checkpoint.table import columns, duration, expert_table, size
from moetrain.store.io import Io
from moetrain.store.objects import CheckpointFolder
from tests.unit.checkpoint_kit import BANKS, Job
from tests.unit.command_kit import moetrain, moetrain_checkpoint, points


def test_list_has_one_line_for_each_recovery_point(run_folder):
    status, text = moetrain_checkpoint("list", run_folder)
    assert status == 0
    _, *lines = [line.split() for line in text.splitlines()]
    assert [line[:3] for line in lines] == [["3", "30", "partial"], ["2", "20", "partial"], ["1", "10", "full"]]
    assert [line[7] for line in lines] == ["20", "10", "0"]
    newest = points(run_folder)[0]
    assert size(newest.new_bytes) in text
    assert size(newest.total_bytes) in text


def test_show_has_the_age_and_adam_step_of_every_expert(run_folder):
    status, text = moetrain_checkpoint("show", run_folder / "checkpoint", "--seq", 2)
    assert status == 0
    assert "step 20, partial" in text
    assert "by 2 ranks, ep 2" in text
    assert "samples 160" in text
    point = points(run_folder)[1]
    for table in (expert_table(point.ages()), expert_table(point.adam_steps())):
        assert all(line in text for line in table)
    assert len({age for age in point.ages().values()}) == 2


def test_verify_reads_everything_and_names_what_is_damaged(run_folder):
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 0
    assert text.count("good") == 3
    newest = points(run_folder)[0]
    name = next(name for name, record in newest.objects.items() if record.step == 30 and BANKS[1] in name)
    file = run_folder / "checkpoint" / "objects" / name / "c.0"
    file.write_bytes(file.read_bytes()[:-1])
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 1
    assert "seq 3, step 30: DAMAGED" in text
    assert name in text
    assert text.count("good") == 2
    (run_folder / "checkpoint" / "manifests" / f"{newest.save}.json").write_text("")
    status, text = moetrain_checkpoint("verify", run_folder)
    assert status == 1
    assert "seq 3: DAMAGED" in text
    assert moetrain_checkpoint("list", run_folder)[0] == 1


def test_show_draws_the_ages_as_a_map(run_folder, tmp_path):
    status, text = moetrain_checkpoint("show", run_folder, "--png", tmp_path / "ages.png")
    assert status == 0
    assert text.splitlines()[-1] == str(tmp_path / "ages.png")
    assert (tmp_path / "ages.png").read_bytes().startswith(b"\x89PNG")
    status, text = moetrain_checkpoint("show", run_folder, "--png", tmp_path / "none" / "ages.png")
    assert (status, text.startswith(f"{tmp_path / 'none' / 'ages.png'} cannot be drawn")) == (2, True)


def test_diff_says_what_was_written_anew(run_folder, said):
    first, _, third = points(run_folder)[::-1]
    status, text = said("diff", run_folder, 1, 3)
    assert status == 0
    lines = text.splitlines()
    assert lines[0].startswith("from seq 1 (step 10, full) to seq 3 (step 30, partial): +20 steps")
    assert "progress samples: 80 -> 240" in lines
    kept = first.objects.keys() & third.objects.keys()
    cells = {line.rsplit(maxsplit=3)[0].strip(): line.split()[-3:] for line in lines if line.startswith(("in both", "only in"))}
    assert cells["in both"][0] == str(len(kept))
    assert cells["only in seq 3"][0] == str(len(third.objects) - len(kept))
    table = lines.index(next(line for line in lines if line.startswith("experts written anew")))
    for bank, line in zip(BANKS, lines[table + 2 :], strict=False):
        marks = ["." if third.ages()[bank, expert] == 20 else "wm" for expert in range(4)]
        assert line.split() == [bank, *marks]
    assert "0>20" in text and "0>0" in text
    status, text = said("diff", run_folder, 2, 2)
    assert "+0 steps" in text and "wm" not in text


def test_a_recovery_point_is_named_by_number_or_pin(run_folder, said):
    assert said("pin", run_folder, "best", "--seq", 2) == (
        0,
        f"best keeps seq 2 (step 20), {size(points(run_folder)[1].total_bytes)}.\n",
    )
    assert "seq 2 " in said("show", run_folder, "--seq", "best")[1].splitlines()[0]
    _, text = said("list", run_folder)
    assert [line.split()[0] for line in text.splitlines() if line.endswith("best")] == ["2"]
    assert said("show", run_folder, "--seq", "worst") == (
        2, "worst is neither the number of a recovery point nor a pin. Pins: best; `moetrain checkpoint list` shows the numbers.\n"
    )  # fmt: skip
    assert said("unpin", run_folder, "best")[0] == 0
    assert said("unpin", run_folder, "best")[0] == 2


@pytest.mark.parametrize("command", [["show", "--seq"], ["diff", 1], ["convert", "--to", "dcp", "--out", "tree", "--seq"]])
def test_a_missing_recovery_point_and_a_damaged_one_are_told_apart(run_folder, said, command):
    verb, *more = command
    missing = f"There is no recovery point 9 in {run_folder / 'checkpoint'}. There are seq 1, 2, 3.\n"
    assert said(verb, run_folder, *more, 9) == (2, missing)
    file = run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[1].save}.json"
    file.write_bytes(file.read_bytes()[:-40])
    status, text = said(verb, run_folder, *more, 2)
    assert (status, text.startswith(f"Recovery point 2 cannot be used: {file}"), "There are seq 1, 2, 3." in text) == (2, True, True)


def test_show_says_when_every_manifest_was_removed(run_folder, said):
    for path in (run_folder / "checkpoint" / "manifests").iterdir():
        path.unlink()
    status, text = said("show", run_folder)
    assert (status, "There is no recovery point in" in text, "MISSING" in text) == (2, True, True)


def test_a_pin_of_a_recovery_point_that_is_gone_is_named(run_folder, said):
    said("pin", run_folder, "best", "--seq", 1)
    (run_folder / "checkpoint" / "manifests" / f"{points(run_folder)[2].save}.json").unlink()
    gone = "The pin best keeps seq 1, which is not there any more"
    for verb in ("show", "pin", "diff"):
        arguments = {"show": ["--seq", "best"], "pin": ["best", "--seq", "best"], "diff": ["best", 3]}[verb]
        status, text = said(verb, run_folder, *arguments)
        assert (status, text.startswith(f"{gone}. `moetrain checkpoint unpin RUN best` takes it away")) == (2, True)
    status, text = said("verify", run_folder)
    assert (status, gone in text) == (1, True)
    assert gone in said("list", run_folder)[1]
    said("unpin", run_folder, "best")
    assert "pin" not in said("verify", run_folder)[1]


@pytest.mark.parametrize("verb", ["list", "show", "verify", "diff", "pin", "unpin", "prune", "convert"])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit):
        moetrain(verb, "--help")
    assert f"moetrain checkpoint {verb}" in capsys.readouterr().out


def test_a_folder_without_checkpoint_is_one_sentence(tmp_path):
    status, text = moetrain_checkpoint("list", tmp_path)
    assert status == 2
    assert text.startswith(f"There is no checkpoint in {tmp_path}.")


def test_verify_and_list_say_which_manifest_is_missing(run_folder, said):
    newest, middle, _ = points(run_folder)
    file = run_folder / "checkpoint" / "manifests" / f"{newest.save}.json"
    content = file.read_bytes()
    file.unlink()
    status, text = said("verify", run_folder)
    assert (status, "seq 3: MISSING, every rank wrote" in text, text.count("good")) == (1, True, 2)
    assert "seq 3: MISSING" in said("list", run_folder)[1]
    file.with_name(f"{middle.save}.json").unlink()
    file.write_bytes(content)
    status, text = said("verify", run_folder)
    assert (status, "seq 2: MISSING, although seq 1 is there" in text) == (1, True)


def test_verify_takes_no_interrupted_save_for_a_missing_one(run_folder, said):
    newest = points(run_folder)[0]
    (run_folder / "checkpoint" / "manifests" / f"{newest.save}.json").unlink()
    (run_folder / "checkpoint" / "receipts" / str(newest.save) / "00001.json").unlink()
    assert said("verify", run_folder)[0] == 0


def test_verify_misses_nothing_that_was_swept_beside_a_pin(run_folder, said):
    job = Job(run_folder / "checkpoint", 2, 2)
    job.load()
    said("pin", run_folder, "first", "--seq", 1)
    job.save(40)
    said("prune", run_folder, "--keep", 1, "--take-over")
    said("unpin", run_folder, "first")
    assert [point.seq for point in points(run_folder)] == [4, 1]
    assert said("verify", run_folder)[0] == 0


@pytest.mark.parametrize("place", ["x" * 300, "no text"])
def test_what_cannot_be_read_is_a_sentence(tmp_path, said, place):
    (tmp_path / "no text").mkdir()
    (tmp_path / "no text" / "checkpoint").write_bytes(b"\xff\xfe")
    status, text = said("list", tmp_path / place)
    assert (status, str(tmp_path / place) in text) == (2, True)
    assert said("agent", "status", tmp_path / place)[0] == 2


def test_a_map_gets_the_name_that_was_asked_for(run_folder, tmp_path, said):
    assert said("show", run_folder, "--png", tmp_path / "ages")[0] == 0
    assert (tmp_path / "ages").read_bytes().startswith(b"\x89PNG")


def test_a_pin_that_is_refused_leaves_nothing(run_folder, said):
    (run_folder / "checkpoint" / "gc").mkdir(exist_ok=True)
    (run_folder / "checkpoint" / "gc" / "000001-00000003.manifests.json").write_bytes(b"junk\n")
    assert said("pin", run_folder, "best")[0] == 2
    assert CheckpointFolder(run_folder / "checkpoint", Io()).pins() == {}


def test_tables_align_and_leave_gaps():
    assert expert_table({("a", 0): 5, ("a", 1): 100, ("b", 1): 7}) == ["expert  0    1", "a       5  100", "b       -    7"]
    assert columns([["x", "y"], ["long", "1"]]) == ["x     y", "long  1"]
    assert [size(999), size(5_400), size(3.2e6), size(7e9), duration(5), duration(600), duration(9000)] == [
        "999 B", "5.4 kB", "3.2 MB", "7.0 GB", "5 s", "10 min", "2.5 h"
    ]  # fmt: skip
