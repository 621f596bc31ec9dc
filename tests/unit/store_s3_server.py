"""An S3-compatible HTTP server on a free local port, and faults between it and its client."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server
from werkzeug.wrappers import Request

BUCKET = "checkpoints"
Application = Callable[[dict, Callable], Iterable[bytes]]


class Faults:
    """Between the wire and the server. `instead`: (does it apply, status), once each, of requests that the server never sees.
    `lost`: of requests that the server acts on and whose answer is a 500, not before `hold` is set."""

    def __init__(self, server: Application) -> None:
        self._server = server
        self._conditional = threading.Lock()
        self.requests: list[tuple[str, str, str | None]] = []
        self.instead: list[tuple[Callable[[Request], bool], int]] = []
        self.lost: list[Callable[[Request], bool]] = []
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, environment: dict, start: Callable) -> Iterable[bytes]:
        request = Request(environment)
        self.requests.append((request.method, request.path, request.headers.get("If-None-Match")))
        for rule in [rule for rule in self.instead if rule[0](request)]:
            self.instead.remove(rule)
            return self._say(rule[1], start)
        lost = [applies for applies in self.lost if applies(request)]
        if not lost:
            with self._conditional if request.headers.get("If-None-Match") else nullcontext():  # it looks first and writes then
                return self._server(environment, start)
        self.lost.remove(lost[0])
        list(self._server(environment, lambda *ignored: None))
        self.hold.wait(60)
        return self._say(500, start)

    def _say(self, status: int, start: Callable) -> Iterable[bytes]:
        body = b"<Error><Code>Injected</Code></Error>"
        start(f"{status} Injected", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]


@contextmanager
def s3_server() -> Iterator[tuple[str, Faults]]:
    """Yields the address and the faults of a server with one empty bucket."""
    s3_backends[DEFAULT_ACCOUNT_ID]["global"].reset()
    faults = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, faults, threaded=True)
    s3_backends[DEFAULT_ACCOUNT_ID]["global"].create_bucket(BUCKET, "us-east-1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
