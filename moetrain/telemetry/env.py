"""What this machine is and can do: versions, devices, backends, CPU features, memory, disk. `moetrain env` and env.json of a run."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import moetrain
from moetrain.base.clock import Clock
from moetrain.base.cores import usable_cores
from moetrain.base.files import write_whole
from moetrain.telemetry.format import duration, quantity, size

Section = dict[str, str | int | float | bool]
PACKAGES = (
    "torch", "numpy", "hydra-core", "omegaconf", "megatron-core", "zarr", "awscrt", "tokenizers", "safetensors", "pyarrow", "zstandard",
    "transformers", "huggingface_hub", "rich", "matplotlib", "tensorboard", "wandb", "deepspeed",
)  # fmt: skip
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm")
_PROBE_BYTES = 64 * 2**20


def collect(folder: Path, clock: Clock, probe: bool) -> dict[str, Section]:
    """Facts by section. `probe` adds measurements that take about a second: disk speed in `folder`, matrix products, a free port."""
    facts = {
        "moetrain": moetrain_facts(),
        "packages": packages(),
        "cpu": cpu(),
        "memory": memory(),
        "devices": devices(),
        "distributed": distributed(),
    }
    if probe:
        facts |= {"disk": disk(folder, clock), "speed": speed(clock), "network": network()}
    return facts


def write_env(run: Path, clock: Clock) -> None:
    """`env.json` of a run folder: the machine this run was last started on, without measurements."""
    write_whole(run / "env.json", json.dumps(collect(run, clock, probe=False), indent=2) + "\n")


def moetrain_facts() -> Section:
    return {
        "version": moetrain.__version__,
        "installed at": str(Path(moetrain.__file__).parent),
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": platform.platform(),
        "host": socket.gethostname(),
    }


def packages() -> Section:
    """Installed versions without importing anything."""
    return {name: version(name) for name in PACKAGES}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu() -> Section:
    """Cores this process may use, and the features that decide which kernels run."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "model": fields.get("model name", platform.processor() or platform.machine()),
        "cores usable": usable_cores(),
        "torch threads": torch.get_num_threads(),
        "torch kernels": torch.backends.cpu.get_cpu_capability(),
        "features": " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown",
    }


def memory() -> Section:
    """Bytes of the machine, and the limit of this container if there is one."""
    page = os.sysconf("SC_PAGE_SIZE")
    facts: Section = {"total": size(page * os.sysconf("SC_PHYS_PAGES"))}
    if sys.platform == "linux":
        facts["free"] = size(page * os.sysconf("SC_AVPHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        facts["container limit"] = size(int(text))
    shared = Path("/dev/shm")
    if shared.is_dir():
        facts["/dev/shm free"] = size(shutil.disk_usage(shared).free)
    return facts


def devices() -> Section:
    """GPUs as torch sees them."""
    import torch

    if not torch.cuda.is_available():
        return {"gpu": "none" if torch.version.cuda is None else f"none (torch is built for CUDA {torch.version.cuda})"}
    facts: Section = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        facts[f"gpu {number}"] = f"{properties.name}, {size(properties.total_memory)}, compute {properties.major}.{properties.minor}"
    return facts


def distributed() -> Section:
    """Which process-group backends this torch can start."""
    import torch.distributed as dist

    if not dist.is_available():
        return {"torch.distributed": False}
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}


def disk(folder: Path, clock: Clock) -> Section:
    """Write speed with fsync, and whether what checkpoints stand on works here: rename over a file, fsync of a folder."""
    usage = shutil.disk_usage(folder)
    facts: Section = {"folder": str(folder.resolve()), "free": size(usage.free)}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".moetrain-env-") as scratch:
        data = os.urandom(2**20)
        start = clock.monotonic()
        with (Path(scratch) / "speed").open("wb") as stream:
            for _ in range(_PROBE_BYTES // len(data)):
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        facts["write with fsync"] = f"{size(_PROBE_BYTES / max(clock.monotonic() - start, 1e-9))}/s"
        start = clock.monotonic()
        facts["rename and fsync"] = "work" if commits(Path(scratch)) else "DO NOT WORK: checkpoints are not safe here"
        facts["one small commit"] = duration(clock.monotonic() - start)
    return facts


def commits(folder: Path) -> bool:
    """Whether a file can be replaced whole: written aside, synced, renamed over the old one, the folder synced."""
    target, draft = folder / "commit", folder / "commit.tmp"
    target.write_text("old")
    try:
        with draft.open("w") as stream:
            stream.write("new")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, target)
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        return False
    return target.read_text() == "new" and not draft.exists()


def speed(clock: Clock) -> Section:
    """Measured matrix products of the first device; on a GPU in bfloat16 too."""
    import torch

    from moetrain.telemetry.probe import matmul_flops

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dtypes = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return {f"matmul {str(dtype).removeprefix('torch.')}": f"{quantity(matmul_flops(device, dtype, clock))}FLOP/s" for dtype in dtypes}


def network() -> Section:
    """Whether processes of this machine can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"a free port": free.getsockname()[1], "proxy set": any(name.lower().endswith("_proxy") for name in os.environ)}


def as_text(facts: dict[str, Section]) -> str:
    """Sections and aligned lines for people."""
    width = max(len(key) for section in facts.values() for key in section)
    blocks = []
    for title, section in facts.items():
        rows = (f"  {key:<{width}}  {_word(value)}" for key, value in section.items())
        blocks.append("\n".join([title, *rows]))
    return "\n".join(blocks)


def _word(value: str | int | float | bool) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
