"""Messages between ranks and agents: a JSON header and raw bytes, both under CRC32C, over any connected socket. No torch."""

import hmac
import json
import mmap
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from moetrain.base.checksum import crc32c

Buffer = bytes | bytearray | memoryview
Room = Callable[[dict, int], memoryview]
"""Where the raw bytes of a message go, given its header and their number."""

_FRAME = struct.Struct("<III Q")  # magic, length and CRC of the header, length of the raw bytes; their CRC follows them
_CRC = struct.Struct("<I")
_MAGIC = 0x4D6F4531
_LONGEST_HEADER = 1 << 30


class WireError(OSError):
    """The other end is gone, silent, or says something that cannot be right."""

    def __init__(self, sentence: str) -> None:
        super().__init__(None, sentence)

    def __str__(self) -> str:
        return str(self.strerror)


class Refused(WireError):
    """The other end understood and says why it does not do it."""


def fresh_room(header: dict, num_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, num_bytes)) if num_bytes else memoryview(b"")


def send(connection: socket.socket, header: dict, raw: Buffer = b"") -> None:
    """Raises OSError."""
    text = json.dumps(header, separators=(",", ":")).encode()
    view = memoryview(raw).cast("B")
    connection.sendall(_FRAME.pack(_MAGIC, len(text), crc32c(text), len(view)) + text)
    if len(view):
        connection.sendall(view)
        connection.sendall(_CRC.pack(crc32c(view)))


def receive(connection: socket.socket, room: Room = fresh_room) -> tuple[dict, memoryview] | None:
    """The next message; None when the other end closed between two messages. Raises OSError, WireError for a damaged one."""
    start = bytearray(_FRAME.size)
    if not _fill(connection, memoryview(start), may_end=True):
        return None
    magic, length, crc, num_bytes = _FRAME.unpack(start)
    if magic != _MAGIC or length > _LONGEST_HEADER:
        raise WireError("a message of another protocol came in.")
    text = memoryview(bytearray(length))
    _fill(connection, text)
    if crc32c(text) != crc:
        raise WireError("a message was damaged on its way.")
    header = json.loads(bytes(text))
    raw = room(header, num_bytes)
    if num_bytes:
        _fill(connection, raw)
        last = bytearray(_CRC.size)
        _fill(connection, memoryview(last))
        if _CRC.unpack(last) != (crc32c(raw),):
            raise WireError("the values in a message were damaged on their way.")
    return header, raw


def _fill(connection: socket.socket, view: memoryview, may_end: bool = False) -> bool:
    done = 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if not count:
            if may_end and not done:
                return False
            raise WireError("the other end closed the connection.")
        done += count
    return True


@dataclass(frozen=True)
class Address:
    """Where an agent answers other nodes, and the word that shows who may ask. Lives in memory and in a folder of its user only."""

    host: str
    port: int
    token: str

    def admits(self, header: dict) -> bool:
        return hmac.compare_digest(str(header.get("token", "")), self.token)


def ask(address: Address, header: dict, raw: Buffer = b"", room: Room = fresh_room, limit_seconds: float = 30.0) -> tuple[dict, memoryview]:
    """One question to the agent of another node. Raises OSError; Refused with its sentence."""
    with socket.create_connection((address.host, address.port), limit_seconds) as connection:
        connection.settimeout(limit_seconds)
        return exchange(connection, header | {"token": address.token}, raw, room)


def exchange(connection: socket.socket, header: dict, raw: Buffer = b"", room: Room = fresh_room) -> tuple[dict, memoryview]:
    """Question and answer. Raises OSError, Refused."""
    send(connection, header, raw)
    return answer(connection, room)


def answer(connection: socket.socket, room: Room = fresh_room) -> tuple[dict, memoryview]:
    """To what was sent before. Raises OSError, Refused."""
    found = receive(connection, room)
    if found is None:
        raise WireError("the other end closed the connection.")
    if "error" in found[0]:
        raise Refused(str(found[0]["error"]))
    return found
