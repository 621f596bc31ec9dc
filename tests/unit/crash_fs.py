"""A file system in memory that forgets: every state in which the power may leave a disk after a recorded run of operations.

The model is what POSIX promises and no more. A name that was made, renamed or removed is sure only when its folder was synced since;
until then each such change may have happened or not, whatever came later. The content of a file is sure only when the file was synced
since; until then it may be empty, short, or lack any of its 4 KiB pages (they read as zeros).
"""

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import RLock
from unittest.mock import patch

from moetrain.store.io import Buffer, Hook, Io, no_hook

PAGE = 4096


@dataclass(eq=False)
class File:
    content: bytes = b""
    start: bytes = b""  # the content when recording began
    links: int = 1


@dataclass(eq=False)
class Folder:
    entries: "dict[str, Node]" = field(default_factory=dict)


Node = File | Folder
Tree = dict[str, "Tree | bytes"]
"""A file system as plain values: folders are dictionaries, files are bytes."""


@dataclass(frozen=True)
class Event:
    """One change: of a name in `folder` (set `name` to `node`, drop `old`), or, with `folder` None, of the content of `node`.

    `sync`: no change, but a promise about earlier ones. `mark`: no change either, something the one who records wants to find again.
    """

    folder: Folder | None
    name: str | None = None
    node: Node | None = None
    old: str | None = None
    content: bytes | None = None
    sync: bool = False
    mark: str = ""


class MemoryFs(Io):
    """The operations of `Io` on a tree in memory. `events`: what changed since it was made, for `CrashStates`."""

    def __init__(self, tree: Tree | None = None, hook: Hook = no_hook) -> None:
        super().__init__(hook)
        self.root = _nodes(tree or {})
        self.start = _all_folders(self.root)
        self.events: list[Event] = []
        self._lock = RLock()

    def hook(self, hook: Hook) -> None:
        """Runs before every operation from now on."""
        self._hook = hook

    def mark(self, text: str) -> None:
        self.events.append(Event(None, mark=text))

    def tree(self) -> Tree:
        """All of it as it is now, as if everything were synced."""

        def plain(folder: Folder) -> Tree:
            return {name: plain(node) if isinstance(node, Folder) else node.content for name, node in folder.entries.items()}

        return plain(self.root)

    def _find(self, path: Path) -> Node | None:
        node: Node | None = self.root
        for name in path.parts[1:]:
            node = node.entries.get(name) if isinstance(node, Folder) else None
        return node

    def _folder(self, path: Path) -> Folder:
        node = self._find(path)
        if not isinstance(node, Folder):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return node

    def _file(self, path: Path) -> File:
        node = self._find(path)
        if not isinstance(node, File):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return node

    def _set(self, path: Path, node: Node, old: str | None = None) -> None:
        folder = self._folder(path.parent)
        if old is not None:
            del folder.entries[old]
        folder.entries[path.name] = node
        self.events.append(Event(folder, path.name, node, old))

    def _drop(self, path: Path) -> None:
        folder = self._folder(path.parent)
        del folder.entries[path.name]
        self.events.append(Event(folder, old=path.name))

    def mkdir(self, path: Path) -> None:
        self._hook("mkdir", path)
        with self._lock:
            if self._find(path) is None:
                for folder in [*reversed(path.parents), path]:
                    if self._find(folder) is None:
                        self._set(folder, Folder())

    def write_new(self, path: Path, buffers: Sequence[Buffer]) -> int:
        self._hook("open", path)
        with self._lock:
            if self._find(path) is not None:
                raise FileExistsError(errno.EEXIST, "File exists", str(path))
            file = File()
            self._set(path, file)
        self._hook("write", path)
        file.content = b"".join(buffers)
        self.events.append(Event(None, node=file, content=file.content))
        self._hook("fsync", path)
        self.events.append(Event(None, node=file, sync=True))
        return len(file.content)

    def rename(self, source: Path, target: Path) -> None:
        self._hook("rename", target)
        assert source.parent == target.parent
        with self._lock:
            self._set(target, self._folder(source), old=source.name)

    def link(self, source: Path, target: Path) -> None:
        self._hook("link", target)
        with self._lock:
            file = self._file(source)
            if self._find(target) is not None:
                raise FileExistsError(errno.EEXIST, "File exists", str(target))
            file.links += 1
            self._set(target, file)

    def unlink(self, path: Path) -> None:
        self._hook("unlink", path)
        with self._lock:
            node = self._find(path)
            if isinstance(node, File):
                node.links -= 1
                self._drop(path)

    def rmdir(self, path: Path) -> None:
        self._hook("rmdir", path)
        with self._lock:
            if self._folder(path).entries:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            self._drop(path)

    def fsync_folder(self, path: Path) -> None:
        self._hook("fsync_folder", path)
        self.events.append(Event(self._folder(path), sync=True))

    def list(self, path: Path) -> list[str]:
        self._hook("list", path)
        node = self._find(path)
        return sorted(node.entries) if isinstance(node, Folder) else []

    def read(self, path: Path) -> bytes:
        self._hook("read", path)
        return self._file(path).content

    def read_into(self, path: Path, offset: int, views: Sequence[memoryview]) -> int:
        content = self.read(path)
        total = 0
        for view in views:
            part = content[offset + total : offset + total + view.nbytes]
            view.cast("B")[: len(part)] = part
            total += len(part)
        return total

    def exists(self, path: Path) -> bool:
        return self._find(path) is not None

    def is_folder(self, path: Path) -> bool:
        return isinstance(self._find(path), Folder)

    def size(self, path: Path) -> int:
        return len(self._file(path).content)

    def num_links(self, path: Path) -> int:
        return self._file(path).links


class CrashStates:
    """What may be left when the power fails after any of the operations that a `MemoryFs` recorded."""

    def __init__(self, recorded: MemoryFs) -> None:
        self.events = recorded.events
        self._root, self._base = recorded.root, recorded.start
        self._sure_after = [self._synced_by(number) for number in range(len(self.events))]

    def _synced_by(self, number: int) -> int:
        """The number of the event that makes this one sure."""
        event = self.events[number]
        for later in range(number + 1, len(self.events)):
            other = self.events[later]
            same = other.folder is event.folder if event.folder else other.folder is None and other.node is event.node
            if other.sync and same:
                return later
        return len(self.events)

    def state(self, moment: int, random: Random) -> Tree:
        """One state after the first `moment` events. Which of the unsure changes happened is drawn: none, all, few, half or most."""
        chance = random.choice((0.0, 1.0, 0.1, 0.5, 0.9))
        entries = dict(self._base)
        contents: dict[Node, bytes] = {}
        for number, event in enumerate(self.events[:moment]):
            if event.sync or event.mark:
                continue
            sure = self._sure_after[number] < moment
            if event.folder is None:
                assert event.node is not None and event.content is not None
                contents[event.node] = event.content if sure else torn(event.content, random)
            elif sure or random.random() < chance:
                names = dict(entries.get(event.folder, {}))
                names.pop(event.old or "", None)
                if event.name is not None and event.node is not None:
                    names[event.name] = event.node
                entries[event.folder] = names

        def plain(folder: Folder) -> Tree:
            names = entries.get(folder, {})
            return {name: plain(node) if isinstance(node, Folder) else contents.get(node, node.start) for name, node in names.items()}

        return plain(self._root)


def torn(content: bytes, random: Random) -> bytes:
    """What an unsynced file may hold: nothing, all, a beginning, or all with some pages missing."""
    kind = random.randrange(4)
    if kind < 2:
        return content if kind else b""
    if kind == 2:
        return content[: random.randrange(len(content) + 1)]
    pages = range(0, len(content), PAGE)
    return b"".join(content[at : at + PAGE] if random.random() < 0.5 else bytes(len(content[at : at + PAGE])) for at in pages)


def _nodes(tree: Tree) -> Folder:
    return Folder({name: File(entry, entry) if isinstance(entry, bytes) else _nodes(entry) for name, entry in tree.items()})


def _all_folders(folder: Folder) -> dict[Node, dict[str, Node]]:
    found: dict[Node, dict[str, Node]] = {folder: dict(folder.entries)}
    for node in folder.entries.values():
        if isinstance(node, Folder):
            found |= _all_folders(node)
    return found


def paths(tree: Tree, where: str = "") -> dict[str, bytes]:
    """Every file by its path."""
    found: dict[str, bytes] = {}
    for name, entry in tree.items():
        found |= {f"{where}/{name}": entry} if isinstance(entry, bytes) else paths(entry, f"{where}/{name}")
    return found


def tree_of(files: dict[str, bytes]) -> Tree:
    """The inverse of `paths`, but for empty folders."""
    tree: Tree = {}
    for path, content in files.items():
        *folders, name = path.strip("/").split("/")
        place = tree
        for folder in folders:
            inner = place.setdefault(folder, {})
            assert isinstance(inner, dict)
            place = inner
        place[name] = content
    return tree


class Inline(Executor):
    """Does what it is given at once, in the calling thread: the same operations in one order."""

    def __init__(self, *ignored: object) -> None:
        pass

    def submit(self, work: Callable, /, *arguments: object, **named: object) -> Future:
        future: Future = Future()
        future.set_result(work(*arguments, **named))
        return future


def without_threads() -> AbstractContextManager[object]:
    """Threads take longer to start than a save in memory takes."""
    return patch("moetrain.store.backend.ThreadPoolExecutor", Inline)
