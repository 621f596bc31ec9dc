"""launch/submit.py and launch/slurm/train.sbatch under stub sbatch, srun, scontrol and torchrun.

What the stubs are called with, and the way from USR1 over STOP and requeue to the next life of the job.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "launch" / "slurm" / "train.sbatch"

# Every stub keeps its arguments, one a line, in a file named after it. srun runs the command that follows its options, as on one node.
STUBS = {
    "sbatch": 'printf "%s\\n" "$@" >>"$STUBS/sbatch.args"\nif [[ -e $STUBS/sbatch.fails ]]; then echo "invalid partition" >&2; exit 1; fi\n'
    'echo "Submitted batch job 42"',
    "scontrol": 'printf "%s\\n" "$@" >>"$STUBS/scontrol.args"\nif [[ $1 == show ]]; then cat "$STUBS/nodes"; fi',
    "srun": 'printf "%s\\n" "$@" >"$STUBS/srun.args"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "torchrun": 'printf "%s\\n" "$@" >"$STUBS/torchrun.args"\nsource "$STUBS/training"',
}
# Training that runs until its STOP file is written: STOP is a pipe here, so that reading it waits for the writer without polling.
UNTIL_STOPPED = '[[ ! -e $RUN/STOP ]] || exit 9\nmkfifo "$RUN/STOP"\necho started >"$STUBS/ready"\ncat "$RUN/STOP"'
UNTIL_DONE = '[[ ! -e $RUN/STOP ]] || exit 9\ntouch "$RUN/DONE"'


class Cluster:
    """Stubs on PATH in front of the real tools, and a folder to submit from."""

    def __init__(self, folder: Path) -> None:
        self.stubs, self.home = folder / "stubs", folder / "my clone"
        self.home.mkdir()
        self.stubs.mkdir()
        for name, body in STUBS.items():
            (self.stubs / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
            (self.stubs / name).chmod(0o755)
        (self.stubs / "nodes").write_text("node07\nnode08\n", encoding="utf-8")
        self.environment = os.environ | {"PATH": f"{self.stubs}:{os.environ['PATH']}", "STUBS": str(self.stubs)}

    def start(self, script: Path, *overrides: str, run: str, training: str, restarts: int = 0) -> subprocess.Popen[str]:
        """The batch script as Slurm starts it on the head node of job 42."""
        (self.stubs / "training").write_text(training, encoding="utf-8")
        job = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "small", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_SUBMIT_DIR": str(self.home),
        }
        return subprocess.Popen(
            ["bash", str(script), *overrides],
            env=self.environment | job | {"RUN": str(self.home / run)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def arguments(self, stub: str) -> list[str]:
        """What a stub was called with; empty when it was not called."""
        path = self.stubs / f"{stub}.args"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A copy of submit.py and its template in the stub clone, so that run folders appear there."""
        for relative in ("launch/submit.py", "launch/slurm/train.sbatch"):
            copy = self.home / relative
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text((ROOT / relative).read_text(encoding="utf-8"), encoding="utf-8")
        command = [sys.executable, "-S", str(self.home / "launch" / "submit.py"), *arguments]  # -S: no site-packages
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_every_node_gets_one_torchrun_that_meets_at_the_first_node(cluster: Cluster):
    job = cluster.start(TEMPLATE, "+experiment=olmoe_1b_7b", "data.prompt=a b", run="runs/small", training=UNTIL_DONE)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 0, output + errors
    assert cluster.arguments("srun")[:5] == ["--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=16", "--kill-on-bad-exit=1", "torchrun"]
    assert cluster.arguments("torchrun") == [
        "--nnodes=2",
        "--nproc-per-node=4",
        "--rdzv-id=42.0",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node07:20042",
        "launch/train.py",
        "+experiment=olmoe_1b_7b",
        "data.prompt=a b",
        "run.folder=runs",
        "run.name=small",
    ]


def test_usr1_stops_politely_then_requeues_and_the_next_life_resumes_in_the_same_folder(cluster: Cluster):
    os.mkfifo(cluster.stubs / "ready")
    done = cluster.home / "runs" / "long" / "DONE"
    done.parent.mkdir(parents=True)
    done.touch()  # of a shorter run before this one
    job = cluster.start(TEMPLATE, "run.name=long", run="runs/long", training=UNTIL_STOPPED)
    assert (cluster.stubs / "ready").read_text(encoding="utf-8") == "started\n"
    job.send_signal(signal.SIGUSR1)
    output, errors = job.communicate(timeout=60)
    assert job.returncode == 0, output + errors
    assert cluster.arguments("scontrol") == ["show", "hostnames", "node[07-08]", "requeue", "42"]
    first_life = cluster.arguments("torchrun")

    job = cluster.start(TEMPLATE, "run.name=long", run="runs/long", training=UNTIL_DONE, restarts=1)
    assert job.wait(timeout=60) == 0  # UNTIL_DONE fails if the old STOP is still there
    second_life = cluster.arguments("torchrun")
    assert [argument.replace("42.1", "42.0") for argument in second_life] == first_life
    assert second_life != first_life, "a restarted job must not join the rendezvous of its first life"
    assert cluster.arguments("scontrol").count("requeue") == 1


def test_usr1_during_the_last_step_does_not_requeue_a_finished_run(cluster: Cluster):
    os.mkfifo(cluster.stubs / "ready")
    job = cluster.start(TEMPLATE, run="runs/small", training=UNTIL_STOPPED + '\ntouch "$RUN/DONE"')
    (cluster.stubs / "ready").read_text(encoding="utf-8")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 0
    assert "requeue" not in cluster.arguments("scontrol")


def test_failed_training_is_reported_with_its_status_and_not_requeued(cluster: Cluster):
    job = cluster.start(TEMPLATE, run="runs/small", training="exit 7")
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 7
    assert "ended with status 7" in errors
    assert "requeue" not in cluster.arguments("scontrol")


def test_failure_after_usr1_keeps_its_status_and_is_not_requeued(cluster: Cluster):
    os.mkfifo(cluster.stubs / "ready")
    job = cluster.start(TEMPLATE, run="runs/small", training=UNTIL_STOPPED + "\nexit 3")
    (cluster.stubs / "ready").read_text(encoding="utf-8")
    job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=60)
    assert job.returncode == 3
    assert "requeue" not in cluster.arguments("scontrol")


def test_empty_node_list_is_refused_before_anything_starts(cluster: Cluster):
    (cluster.stubs / "nodes").write_text("", encoding="utf-8")
    job = cluster.start(TEMPLATE, run="runs/small", training=UNTIL_DONE)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "names no node" in errors
    assert cluster.arguments("srun") == []


def test_submitted_script_is_kept_in_the_run_folder_carries_every_resource_and_runs(cluster: Cluster):
    resources = [
        "--nodes=2",
        "--gpus-per-node=4",
        "--cpus-per-task=16",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=moe",
        "--qos=high",
    ]
    result = cluster.submit(*resources, "+experiment=gpt_125m_8e", "train.sample_prompts=['def f(', 'x']", "run.folder=my runs")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "gpt_125m_8e: Submitted batch job 42\n"
    script = cluster.home / "my runs" / "gpt_125m_8e" / "job.sbatch"
    assert cluster.arguments("sbatch") == [str(script)]
    assert (script.parent / "log").is_dir(), "Slurm does not make the folder of its output file"

    lines = script.read_text(encoding="utf-8").splitlines()
    head = [line.removeprefix("#SBATCH --") for line in lines[1 : lines.index("")]]
    assert set(head) == {
        "job-name=gpt_125m_8e",
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "cpus-per-task=16",
        "time=1-12:00:00",
        "partition=gpu",
        "account=moe",
        "qos=high",
        "requeue",
        "open-mode=append",
        "signal=B:USR1@300",
        'output="my runs/gpt_125m_8e/log/slurm-%j.log"',
    }
    job = cluster.start(script, run="my runs/gpt_125m_8e", training=UNTIL_DONE)
    assert job.wait(timeout=60) == 0
    overrides = ["+experiment=gpt_125m_8e", "train.sample_prompts=['def f(', 'x']", "run.folder=my runs", "run.name=gpt_125m_8e"]
    assert cluster.arguments("torchrun")[-5:] == ["launch/train.py", *overrides]


def test_sweep_is_a_grid_of_jobs_named_by_what_differs(cluster: Cluster):
    result = cluster.submit("-m", "+experiment=tiny", "optim.lr=1e-3,3e-4", "data.weights=[1,2],[3,4]", "run.seed=7")
    assert result.returncode == 0, result.stderr
    scripts = {path.parent.name: path.read_text(encoding="utf-8") for path in (cluster.home / "runs").glob("*/job.sbatch")}
    assert sorted(scripts) == [
        "tiny-optim.lr-1e-3-data.weights-1_2",
        "tiny-optim.lr-1e-3-data.weights-3_4",
        "tiny-optim.lr-3e-4-data.weights-1_2",
        "tiny-optim.lr-3e-4-data.weights-3_4",
    ]
    name = "tiny-optim.lr-3e-4-data.weights-1_2"
    expected = f"set -- +experiment=tiny optim.lr=3e-4 'data.weights=[1,2]' run.seed=7 run.folder=runs run.name={name}"
    assert expected in scripts[name].splitlines()


def test_dry_run_prints_the_script_and_leaves_nothing_behind(cluster: Cluster):
    result = cluster.submit("--dry-run", "--gpus-per-node", "0", "+experiment=tiny", "run.name=trial")
    assert result.returncode == 0
    assert "#SBATCH --job-name=trial\n" in result.stdout
    assert "#SBATCH --gpus-per-node" not in result.stdout
    assert cluster.arguments("sbatch") == []
    assert not (cluster.home / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optim.lr"], "'optim.lr' is not an override"),
        (["optim.lr=1,2"], "optim.lr has several values; add -m"),
        (["-m", "optim.lr=1"], "-m needs at least one key with several values"),
        (["optim.lr=1", "optim.lr=2"], "optim.lr is given twice"),
        (["-m", "optim.lr=a b,a_b"], "Two jobs of this sweep would be named scratch-optim.lr-a_b"),
        (["--nodes", "0", "a=1"], "argument --nodes: '0' must be a whole number of at least 1"),
        (["--time", "soon", "a=1"], "argument --time: 'soon' does not look like one"),
        (["--partition", "gpu\n#SBATCH --exclusive", "a=1"], "argument --partition"),
        ([], "required: OVERRIDE"),
    ],
)
def test_request_that_cannot_be_is_refused_with_a_sentence(cluster: Cluster, arguments: list[str], sentence: str):
    result = cluster.submit(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert cluster.arguments("sbatch") == []


def test_refusal_by_sbatch_is_passed_on(cluster: Cluster):
    (cluster.stubs / "sbatch.fails").touch()
    result = cluster.submit("+experiment=tiny")
    assert result.returncode == 2
    assert "invalid partition" in result.stderr


def test_missing_sbatch_is_named(cluster: Cluster):
    (cluster.stubs / "sbatch").unlink()
    cluster.environment["PATH"] = str(cluster.stubs)
    result = cluster.submit("+experiment=tiny")
    assert result.returncode == 2
    assert "sbatch is not on PATH" in result.stderr


def test_directives_stand_before_every_command():
    lines = TEMPLATE.read_text(encoding="utf-8").splitlines()
    last_directive = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert lines[0] == "#!/usr/bin/env bash"
    assert all(line.startswith("#SBATCH --") for line in lines[1 : last_directive + 1])
