"""`moetrain checkpoint agent status|stop RUN`: the process on this node that keeps a run's copies in memory. Runs without torch."""

import argparse
import json
import time
from pathlib import Path

from moetrain.base.errors import CheckpointError
from moetrain.checkpoint.arena import arena_folder
from moetrain.checkpoint.complaint import in_a_sentence
from moetrain.checkpoint.process import CALL_SECONDS, SocketLink
from moetrain.checkpoint.serve import clear
from moetrain.checkpoint.table import columns, size
from moetrain.store.backend import absolute
from moetrain.store.objects import resolve

STOP_SECONDS = 120.0


def add_agent(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Registers `agent` with its own verbs."""
    parser = verbs.add_parser(
        "agent", help="the process on this node that keeps copies of a run's state in memory",
        description="Every node of a job has an agent that outlives killed ranks, so that they resume from memory. It ends by itself; stop "
        "ends it at once, after what it is writing, and gives its memory back: the run then resumes from its checkpoint folder.",
    )  # fmt: skip
    own = parser.add_subparsers(required=True, metavar="VERB")
    for verb, run, help in (("status", status, "what it holds"), ("stop", stop, "end it and give its memory back")):
        sub = own.add_parser(verb, help=help, description=f"moetrain checkpoint agent {verb}: {help}.")
        sub.add_argument("folder", metavar="RUN", type=Path, help="run folder, or the checkpoint folder in it")
        sub.add_argument("--memory", metavar="DIR", default="", help="the run's checkpoint.agent.folder, if it has one")
        sub.set_defaults(run=in_a_sentence(run))


def status(arguments: argparse.Namespace) -> int:
    folder = arena_folder(absolute(resolve(arguments.folder)), arguments.memory)
    try:
        link = SocketLink(folder)
    except TimeoutError:
        raise
    except OSError:
        print("This node has no agent for the run.")
        return 1
    found = link.call({"op": "status"}, CALL_SECONDS)
    about = json.loads((folder / "agent.json").read_text())
    ranks = f"ranks {', '.join(map(str, found['ranks']))} are connected" if found["ranks"] else "no rank is connected"
    print(f"agent {about['pid']} in {folder}; {ranks}")
    print("slots: " + (", ".join(f"{size(num_bytes)} {state}" for state, num_bytes in sorted(found["slots"].items())) or "none"))
    rows = [["save", "step", "rank", "size", "of"]]
    rows += [
        [one["save"], str(one["step"]), str(one["rank"]), size(one["num_bytes"]), "another node" if one["is_copy"] else "this node"]
        for one in found["generations"]
    ]
    print("\n".join(columns(rows)))
    return 0


def stop(arguments: argparse.Namespace) -> int:
    folder = arena_folder(absolute(resolve(arguments.folder)), arguments.memory)
    try:
        SocketLink(folder).call({"op": "stop"}, CALL_SECONDS)
    except TimeoutError:
        raise
    except OSError:
        print("Removed what a killed agent left." if clear(folder) else "This node has no agent for the run.")
        return 0
    deadline = time.monotonic() + STOP_SECONDS
    while folder.exists():
        if time.monotonic() > deadline:
            raise CheckpointError(f"The agent did not end within {STOP_SECONDS:g} s ({folder}).", "It may be writing to a disk that hangs.")
        time.sleep(0.02)
    print("The agent has ended.")
    return 0
