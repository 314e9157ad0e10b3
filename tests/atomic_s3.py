"""moto's server of S3, whose conditional creation is atomic as that of S3 is.

moto looks for the object and then writes it: of two requests at once, both may find none. The tests
make some ten thousand requests, so it does not look for moto's modules and write a line for each.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable
from typing import Any

import moto.server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication
from werkzeug.serving import WSGIRequestHandler


class Atomic(DomainDispatcherApplication):
    """The application, with one conditional request at a time."""

    _creating = threading.Lock()

    @functools.cache  # noqa: B019 - there is one application
    def get_backend_for_host(self, host: str | None) -> Any:
        return super().get_backend_for_host(host)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return super().__call__(environ, start_response)
        # A client that is stopped while it sends must not hold the lock.
        length = int(environ.get("CONTENT_LENGTH") or 0)
        environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(length))
        with self._creating:
            return super().__call__(environ, start_response)


if __name__ == "__main__":
    setattr(WSGIRequestHandler, "log_request", lambda *args, **options: None)  # noqa: B010
    vars(moto.server)["DomainDispatcherApplication"] = Atomic
    moto.server.main()
