"""Progress bars of the preparation, on a terminal only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int], object]  # adds bytes to a bar
StartBar = Callable[[str, int], Advance]  # label and total bytes -> its Advance


@contextmanager
def bars(show: bool) -> Iterator[StartBar]:
    """Yields what starts a new bar; nothing is drawn unless `show` and standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:16}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as progress:

        def start(label: str, total: int) -> Advance:
            task = progress.add_task(label, total=total)
            return lambda num_bytes: progress.advance(task, num_bytes)

        yield start
