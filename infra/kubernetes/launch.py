"""Start a copy of a suspended RayJob, wait for its end, and exit with its verdict.

    python launch.py TEMPLATE

A CronJob runs this each night, in a pod of a Job (JOB_NAME, JOB_UID). The Job owns the copy:
Kubernetes deletes the copy together with the Job. A launcher that replaces a lost one finds it in
progress, and waits for it. With QUEUE the copy stays suspended until Kueue admits it.

Exit code 0: the copy succeeded; 1: it failed; 2: it cannot be started; 75: nothing is known, start
another launcher. The script needs nothing but Python.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SCHEME = "https"
POLL_S, PATIENCE_S, TIMEOUT_S = 15.0, 600.0, 30.0
TEMPLATE_LABEL = "afn-ray/template"
ENDED = {"Complete", "Failed", "ValidationFailed"}
PASSING = {401, 403, 408, 429}
"""HTTP statuses of refusals that may end by themselves: a token is renewed, a permission granted, a
quota freed. A RayJob may be in progress meanwhile, so they are no verdict.
"""


class Refused(Exception):
    """The API server says no, and would again."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status = status


class Unknown(Exception):
    """No request succeeded for ``PATIENCE_S``; the state of the RayJob is unknown."""


def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the API server's answer, with retries for ``PATIENCE_S``.

    Raises ``Refused`` for an answer that a retry would not change, ``Unknown`` without an answer.
    """
    host, port = (os.environ[f"KUBERNETES_SERVICE_{part}"] for part in ("HOST", "PORT"))
    server = f"{SCHEME}://{host}:{port}"
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            namespace, token = (
                (ACCOUNT / name).read_text().strip() for name in ("namespace", "token")
            )
            request = urllib.request.Request(  # noqa: S310 - https, but for tests
                f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs{path}",
                method=method,
                data=None if body is None else json.dumps(body).encode(),
                headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
            )
            # Like the token, the certificate is renewed while the launcher waits.
            context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
            with urllib.request.urlopen(  # noqa: S310
                request, timeout=TIMEOUT_S, context=context
            ) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")[:500]
            if error.code < 500 and error.code not in PASSING:
                raise Refused(error.code, said) from error
            failed = f"{error}: {said}"
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            failed = str(error)
        if time.monotonic() > until:
            raise Unknown(f"no answer from the API server for {PATIENCE_S:.0f} s: {failed}")
        print(f"launch: no answer from the API server ({failed}); asking again", flush=True)
        time.sleep(POLL_S)


def copy_of(
    template: dict[str, Any], name: str, job: str, job_uid: str, queue: str
) -> dict[str, Any]:
    """The RayJob ``name`` of the Job ``job``: ``template``, not suspended; with a ``queue``, in it
    and suspended until it is admitted.
    """
    labels = {k: v for k, v in template["metadata"]["labels"].items() if k != TEMPLATE_LABEL}
    if queue:
        labels["kueue.x-k8s.io/queue-name"] = queue
    owner = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "name": job,
        "uid": job_uid,
        "controller": False,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
        "spec": {**template["spec"], "suspend": bool(queue)},
    }


def start(template: str, name: str, job: str, job_uid: str, queue: str) -> None:
    """Create the RayJob ``name`` of this Job, unless it exists.

    If an earlier Job left a RayJob of that name, wait first until it is deleted.
    """
    made = copy_of(call("GET", f"/{template}"), name, job, job_uid, queue)
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            call("POST", "", made)
            print(f"launch: RayJob {name} is created from {template}", flush=True)
            return
        except Refused as error:
            if error.status != 409:
                raise
        try:
            owners = call("GET", f"/{name}")["metadata"].get("ownerReferences", [])
        except Refused as error:
            if error.status != 404:
                raise
            owners = []  # it has gone meanwhile
        if job_uid in {owner["uid"] for owner in owners}:
            print(f"launch: RayJob {name} is there already; waiting for it", flush=True)
            return
        if time.monotonic() > until:
            raise Unknown(
                f"RayJob {name} is not of this Job and has not gone for {PATIENCE_S:.0f} "
                "s; delete it"
            )
        print(f"launch: RayJob {name} is of another Job; waiting for it to go", flush=True)
        time.sleep(POLL_S)


def launch(template: str, job: str, job_uid: str, queue: str) -> int:
    """Start the copy of ``template``, or find the one of an earlier launcher of the Job ``job``;
    return the exit code when it has ended.
    """
    # KubeRay submits with a Job of the RayJob's own name. So the RayJob has another name than this
    # Job, which KubeRay would take for its own.
    name = f"{job}-run"
    start(template, name, job, job_uid, queue)
    said = ""
    while True:
        status = call("GET", f"/{name}").get("status") or {}
        phase = (
            f"{status.get('jobDeploymentStatus') or 'new'} {status.get('jobStatus') or ''}".strip()
        )
        if phase != said:
            print(f"launch: RayJob {name} is {said and 'now '}{phase}", flush=True)
            said = phase
        if status.get("jobDeploymentStatus") in ENDED:
            if status.get("jobStatus") == "SUCCEEDED":
                return 0
            reason = status.get("reason") or "no reason given"
            print(
                f"launch: RayJob {name} failed: {reason}: {status.get('message') or 'no message'}",
                file=sys.stderr,
            )
            return 1
        time.sleep(POLL_S)


def main(template: str) -> int:
    """Exit code of the launcher; 75 for an unexpected error.

    Python's own 1 for such an error would mean that the RayJob failed.
    """
    try:
        return launch(
            template, os.environ["JOB_NAME"], os.environ["JOB_UID"], os.environ.get("QUEUE", "")
        )
    except Refused as error:
        print(f"launch: the RayJob cannot be started or read: {error}", file=sys.stderr)
        return 2
    except Unknown as error:
        print(f"launch: {error}", file=sys.stderr)
        return 75
    except Exception:  # noqa: BLE001 - see above
        traceback.print_exc()
        return 75


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
