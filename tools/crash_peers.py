"""The campaign's kills and damage on other ways to save a state, as a careful user would use each, and ours beside them."""

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from tests.unit.checkpoint_crash import kill_at_random_times
from tests.unit.crash_damage import KINDS, simulate

State = dict[str, torch.Tensor]
Say = Callable[[str], None]
FAILURES = (Exception, CheckpointException)  # DCP's is no Exception
NUM_TENSORS, SIZE = 8, 64 * 1024  # 2 MiB in all
FILE_KINDS = tuple(kind for kind in KINDS if kind != "swap")  # a save is one file of values: there is nothing to change places with


def state_of(version: int) -> State:
    generator = torch.Generator().manual_seed(version)
    return {f"w{number}": torch.randn(SIZE, generator=generator) for number in range(NUM_TENSORS)}


@dataclass(frozen=True)
class Peer:
    """`save(folder, version)`; `load(folder)` gives the newest state that loads without an error, or raises what the last one raised."""

    name: str
    save: Callable[[Path, int], None]
    load: Callable[[Path], State]


def save_torch(folder: Path, version: int) -> None:
    torch.save(state_of(version), folder / "new.pt")
    os.replace(folder / "new.pt", folder / f"{version}.pt")


def save_torch_over(folder: Path, version: int) -> None:
    torch.save(state_of(version), folder / "new.pt")
    os.replace(folder / "new.pt", folder / "state.pt")


def save_safetensors_over(folder: Path, version: int) -> None:
    save_file(state_of(version), folder / "state.safetensors")


def save_dcp(folder: Path, version: int) -> None:
    dcp_save(state_of(version), checkpoint_id=folder / f"{version}.dcp", no_dist=True)


def save_dcp_over(folder: Path, version: int) -> None:
    dcp_save(state_of(version), checkpoint_id=folder / "state.dcp", no_dist=True)


def load_dcp(path: Path) -> State:
    state = {name: torch.zeros_like(tensor) for name, tensor in state_of(0).items()}
    dcp_load(state, checkpoint_id=path, no_dist=True)
    return state


def newest(suffix: str, read: Callable[[Path], State]) -> Callable[[Path], State]:
    """Tries every save, newest first."""

    def load(folder: Path) -> State:
        last: BaseException = FileNotFoundError(folder)
        for path in sorted(folder.glob(f"*.{suffix}"), reverse=True):
            if path.stem == "new":
                continue
            try:
                return read(path)
            except FAILURES as error:
                last = error
        raise last

    return load


LOAD_DCP = newest("dcp", load_dcp)
LOAD_TORCH = newest("pt", lambda path: torch.load(path, weights_only=True))
PEERS = (
    Peer("torch.save + rename, a new file each time", save_torch, LOAD_TORCH),
    Peer("torch.save + rename over the last", save_torch_over, LOAD_TORCH),
    Peer("safetensors over the last", save_safetensors_over, newest("safetensors", load_file)),
    Peer("DCP, a new folder each time", save_dcp, LOAD_DCP),
    Peer("DCP over the last", save_dcp_over, LOAD_DCP),
)


def version_of(state: State) -> int | None:
    """1 or 2; None for values that nobody saved."""
    for version in (2, 1):
        wanted = state_of(version)
        if state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted):
            return version
    return None


def outcome(peer: Peer, folder: Path) -> str:
    try:
        version = version_of(peer.load(folder))
    except FAILURES:
        return "lost: nothing loads"
    return "wrong values, no error" if version is None else f"version {version}"


def kill(peer: Peer, folder: Path, longest: float, random: Random) -> str:
    """Version 1 is there; the save of version 2 is killed at a random time."""
    child = os.fork()
    if child == 0:
        peer.save(folder, 2)
        os._exit(0)
    time.sleep(random.uniform(0, longest))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return outcome(peer, folder)


def damage(peer: Peer, folder: Path, kind: str, random: Random) -> str | None:
    """Versions 1 and 2 were saved; one file of the newest save is damaged. None when the damage changed no byte."""
    places = [path for path in folder.rglob("*") if path.is_file() and ("2." in str(path.relative_to(folder)) or "state" in str(path))]
    target = random.choice(sorted(places))
    content = target.read_bytes()
    if kind == "delete":
        target.unlink()
        return outcome(peer, folder)
    position = random.randrange(len(content))
    page = position // 4096 * 4096
    changed = {
        "flip": content[:position] + bytes([content[position] ^ 1 << random.randrange(8)]) + content[position + 1 :],
        "zero page": content[:page] + bytes(len(content[page : page + 4096])) + content[page + 4096 :],
        "truncate": content[:position],
        "empty": b"",
        "stale": _of_version_one(peer, folder, target),
    }[kind]
    if changed == content:
        return None
    target.write_bytes(changed)
    found = outcome(peer, folder)
    return "stale values, no error" if kind == "stale" and found == "version 1" else found


def _of_version_one(peer: Peer, folder: Path, target: Path) -> bytes:
    """What the same file held one save earlier."""
    earlier = folder / "earlier"
    earlier.mkdir()
    peer.save(earlier, 1)
    return (earlier / str(target.relative_to(folder)).replace("2.", "1.", 1)).read_bytes()


def campaign(scratch: Path, amount: int, seed: int, say: Say) -> dict[str, object]:
    """`amount` kills and as many damages of each. An outcome `version 2` after damage means that it touched nothing that is read."""
    torch.set_num_threads(1)
    logging.disable()  # DCP logs every failure that is provoked here
    rows = []
    for peer in PEERS:
        random, kills, damages = Random(seed), Counter[str](), Counter[str]()
        folder = scratch / "peer"
        for run in range(amount):
            _fresh(folder)
            started = time.monotonic()
            peer.save(folder, 1)
            kills[kill(peer, folder, 1.5 * (time.monotonic() - started), random)] += 1
            found = None
            while found is None:
                _fresh(folder)
                for version in (1, 2):
                    peer.save(folder, version)
                found = damage(peer, folder, FILE_KINDS[run % len(FILE_KINDS)], random)
            damages[found] += 1
        rows.append({"format": peer.name, "kills": dict(kills), "damages": dict(damages)})
        say(f"{peer.name}: kills {dict(kills)}, damages {dict(damages)}")
    ours = Counter(f"version {1 + new}" for new in kill_at_random_times(scratch / "ours", amount, Random(seed)))
    found = simulate(amount, seed)
    right = {"noticed, and the right versions come back": found.right.total(), "anything else": len(found.failures)}
    return {"kills_of_each": amount, "rows": [*rows, {"format": "moetrain", "kills": dict(ours), "damages": right}]}


def _fresh(folder: Path) -> None:
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    folder.mkdir(exist_ok=True)
