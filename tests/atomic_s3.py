"""moto's server of S3, whose conditional creation is atomic as that of S3 is, and which keeps
connections open as S3 does.

moto looks for the object and then writes it: of two requests at once, both may find none. The tests
make some ten thousand requests, so it looks for moto's modules once.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import moto.server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler
from moto.s3.models import FakeKey
from werkzeug.test import run_wsgi_app


class Atomic(DomainDispatcherApplication):
    """The application, with one conditional request at a time."""

    _creating = threading.Lock()

    @functools.cache  # noqa: B019 - there is one application
    def get_backend_for_host(self, host: str | None) -> Any:
        return super().get_backend_for_host(host)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        # A client that is stopped while it sends must not hold the lock, and what is not read would
        # be taken for the next request.
        is_chunked = environ.get("wsgi.input_terminated", False)
        length = -1 if is_chunked else int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        if "HTTP_IF_NONE_MATCH" not in environ:
            return super().__call__(environ, start_response)
        with self._creating:
            return super().__call__(environ, start_response)


class KeptOpen(MotoRequestHandler):
    """A connection for many requests; werkzeug's are for one."""

    disable_nagle_algorithm = True
    wbufsize = -1  # an answer's head and body are sent together

    def handle_expect_100(self) -> bool:
        """Ask for the body of a request, whose client waits for that."""
        is_wanted = super().handle_expect_100()
        self.wfile.flush()
        return is_wanted

    def run_wsgi(self) -> None:
        """Answer one request, after a line in the log, whose lines a test counts."""
        sys.stderr.write(f'"{self.requestline}"\n')  # in one write, which no other divides
        parts, status, headers = run_wsgi_app(self.server.app, self.make_environ(), buffered=True)
        body = b"".join(parts)
        if "Content-Length" not in headers:
            headers["Content-Length"] = str(len(body))
        code, _, reason = status.partition(" ")
        self.send_response_only(int(code), reason)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


def content(key: FakeKey) -> bytes:
    """The bytes of an object, which moto would read and copy for each range of them."""
    # moto has no public way to the buffer of an object.
    found: bytes = key._value_buffer._file.getvalue()  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    os.environ["MOTO_S3_DEFAULT_KEY_BUFFER_SIZE"] = str(1 << 30)  # in memory, and not on a disk
    FakeKey.value = property(content, vars(FakeKey)["value"].fset)  # type: ignore[assignment]
    vars(moto.server).update(DomainDispatcherApplication=Atomic, MotoRequestHandler=KeptOpen)
    moto.server.main()
