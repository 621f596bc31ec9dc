"""Where the ranks of one start find each other: keys that no earlier start has written.

torchrun keeps one store over all restarts of its workers (torch 2.11 to 2.13), so the addresses of killed ranks are still in it when the
next ones look for each other. TORCHELASTIC_RESTART_COUNT cannot tell them apart: every node counts its own failures only.
"""

from datetime import timedelta
from secrets import token_hex

from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from moetrain.base.errors import TrainingError
from moetrain.dist.watch import Watch, overdue_sentence

OPERATION = "joining the process group"
_POLL_SECONDS = 0.01


def meet_by_environment(rank: int, size: int, timeout: timedelta, watch: Watch) -> Store:
    """`meet` in the store that torchrun's environment names."""
    store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    store.set_timeout(timeout)
    return meet(store, rank, size, watch)


def meet(store: Store, rank: int, size: int, watch: Watch) -> Store:
    """The part of `store` that belongs to this start of all ranks. Rank 0 names it to whoever says hello with a word of its own.

    Raises TrainingError on rank 0, naming those who are missing after `watch.timeout_seconds`.
    """
    keys = PrefixStore("moetrain", store)
    if rank == 0:
        name = token_hex(8)
        _welcome(keys, name, size, watch)
    else:
        word = token_hex(8)
        keys.set(f"hello/{rank}", word)
        name = keys.get(f"welcome/{rank}/{word}").decode()
        keys.set(f"here/{name}/{rank}", "")
    return PrefixStore(f"moetrain/{name}", store)


def _welcome(keys: Store, name: str, size: int, watch: Watch) -> None:
    """Answers every hello, also those that dead ranks left, until all living ranks have read the answer to theirs."""
    started = watch.clock.monotonic()
    missing = list(range(1, size))
    while True:
        missing = [rank for rank in missing if not keys.check([f"here/{name}/{rank}"])]
        if not missing:
            return
        seconds = watch.clock.monotonic() - started
        if seconds > watch.timeout_seconds:
            sentence = overdue_sentence(0, f"{OPERATION} (missing: {', '.join(map(str, missing))})", seconds)
            limit = f"the limit is parallel.timeout_seconds={watch.timeout_seconds:g}"
            raise TrainingError(sentence, f"See whether they were started; {limit}.")
        for rank in missing:
            if keys.check([f"hello/{rank}"]):
                keys.set(f"welcome/{rank}/{keys.get(f'hello/{rank}').decode()}", name)
        watch.clock.sleep(_POLL_SECONDS)
