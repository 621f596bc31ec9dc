"""Small files that are replaced whole: a kill or a full disk leaves the old one or the new one, never a torn one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Written aside, synced, renamed over `path`; nothing is touched when the content is the same already."""
    content = text.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    draft = path.with_name(f".{path.name}.tmp")
    with draft.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)
