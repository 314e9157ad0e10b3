"""Start a copy of a suspended RayJob, wait for its end, and leave with its verdict: what a CronJob runs each night.

    python launch.py TEMPLATE

runs in a pod of a Job, whose name (JOB_NAME) the copy takes and which owns it (JOB_UID): a launcher in place of one
that was lost finds the RayJob under way and waits on, and who deletes the Job stops it. With QUEUE the copy stays
suspended until Kueue admits it. Exit code 0: the job succeeded; 1: it failed; 2: it cannot be started; 75: no word
from the API server, start another launcher. It needs nothing but Python.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SCHEME = "https"
POLL_S, PATIENCE_S, TIMEOUT_S = 15.0, 600.0, 30.0
TEMPLATE_LABEL = "afn-ray/template"
ENDED = {"Complete", "Failed", "ValidationFailed"}


class Refused(Exception):
    """The API server says no, and would again."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status


class NoAnswer(Exception):
    """The API server has not answered for ``PATIENCE_S``."""


def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the API server answers; asked again for ``PATIENCE_S``. Raises ``Refused`` or ``NoAnswer``."""
    server = f"{SCHEME}://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    namespace = (ACCOUNT / "namespace").read_text().strip()
    context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    until = time.monotonic() + PATIENCE_S
    while True:
        token = (ACCOUNT / "token").read_text().strip()  # each time: it is renewed under us
        request = urllib.request.Request(  # noqa: S310 - https, but for tests
            f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}", method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:  # noqa: S310
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")[:500]
            if error.code < 500 and error.code not in (408, 429):
                raise Refused(error.code, said) from error
            failed: Exception = error
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            failed = error
        if time.monotonic() > until:
            raise NoAnswer(str(failed)) from failed
        print(f"launch: the API server does not answer ({failed}); asking again", flush=True)
        time.sleep(POLL_S)


def copy_of(template: dict[str, Any], name: str, owner_uid: str, queue: str) -> dict[str, Any]:
    """The RayJob ``name``: ``template`` let go, or left to ``queue`` to let go."""
    labels = {k: v for k, v in template["metadata"]["labels"].items() if k != TEMPLATE_LABEL}
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": owner_uid, "controller": False}
    return {
        "apiVersion": "ray.io/v1", "kind": "RayJob",
        "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
        "spec": {**template["spec"], "suspend": bool(queue)},
    }  # fmt: skip


def launch(template: str, name: str, owner_uid: str, queue: str) -> int:
    """Exit code of the RayJob ``name``, a copy of ``template`` that this or an earlier launcher has started."""
    try:
        call("POST", "", copy_of(call("GET", f"/{template}"), name, owner_uid, queue))
        print(f"launch: RayJob {name} is created from {template}", flush=True)
    except Refused as error:
        if error.status != 409:
            raise
        print(f"launch: RayJob {name} is there already; waiting for it", flush=True)
    said = ""
    while True:
        status = call("GET", f"/{name}").get("status", {})
        phase = f"{status.get('jobDeploymentStatus') or 'new'} {status.get('jobStatus') or ''}".strip()
        if phase != said:
            print(f"launch: RayJob {name} is {said and 'now '}{phase}", flush=True)
            said = phase
        if status.get("jobDeploymentStatus") in ENDED:
            if status.get("jobStatus") == "SUCCEEDED":
                return 0
            reason = status.get("reason") or "no reason given"
            print(f"launch: RayJob {name} failed: {reason}: {status.get('message') or 'no message'}", file=sys.stderr)
            return 1
        time.sleep(POLL_S)


if __name__ == "__main__":
    (argument,) = sys.argv[1:]
    job = os.environ["JOB_NAME"]
    try:
        sys.exit(launch(argument, job, os.environ["JOB_UID"], os.environ.get("QUEUE", "")))
    except Refused as error:
        print(f"launch: RayJob {job} cannot be started or read: {error}", file=sys.stderr)
        sys.exit(2)
    except NoAnswer as error:
        print(f"launch: the API server has not answered for {PATIENCE_S:.0f} s: {error}", file=sys.stderr)
        sys.exit(75)
