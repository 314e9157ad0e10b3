"""infra/: every manifest is of its real schema, safe by default, in step with the code, and set in
one place.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from afn_ray.analysis import audit
from afn_ray.analysis.nights import Night
from afn_ray.analysis.policy import read_policy
from afn_ray.cli import grammar
from afn_ray.config import RunConfig
from afn_ray.runs.cluster import connection
from afn_ray.store import storage
from afn_ray.store.settings import config_from
from conftest import fenced, write_jsonl
from hosts import wait_until

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
KUBERNETES = INFRA / "kubernetes"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
KUBERNETES_VERSION = "1.33"
APPLIED = ("access", "once", "nightly", "raycronjob")
"""Folders that are applied; the others are parts of them."""

Manifest = dict[str, Any]


def lacks(why: str) -> None:
    """Skips, but never in CI."""
    pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)


def render(folder: Path) -> list[Manifest]:
    if shutil.which("kubectl") is None:
        lacks("kubectl renders the manifests, and is not here")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def lint(tool: str, file: Path) -> None:
    """``tool``, which comes with the extra dev, has nothing to say about ``file``."""
    program = shutil.which(tool, path=Path(sys.executable).parent)
    assert program, f"{tool} is not here; it comes with the extra dev"
    done = subprocess.run([program, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def instructions() -> list[tuple[str, list[str]]]:
    """Instructions of the Containerfile, each with its words, as a builder reads them."""
    lines = (INFRA / "Containerfile").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = (
        line.split(None, 1) for line in text.replace("\\\n", " ").splitlines() if line.strip()
    )
    return [(name, shlex.split(words)) for name, words in joined]


def of_image(name: str) -> list[list[str]]:
    """The words of every instruction ``name`` of the last stage, which the image is of."""
    read = instructions()
    last = max(at for at, (found, _) in enumerate(read) if found == "FROM")
    return [words for found, words in read[last:] if found == name]


def commands_in(words: list[str]) -> list[list[str]]:
    """The commands of a line of shell, by its words."""
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", ";"):
            commands.append([])
        elif word.endswith(";"):
            commands[-1].append(word[:-1])
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {folder: render(KUBERNETES / folder) for folder in APPLIED}


def values() -> dict[str, str]:
    return dict(yaml.safe_load((KUBERNETES / "values" / "values.yaml").read_text())["data"])


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., list[Manifest]]:
    """``variant(folder, components, **values)``: its manifests with more components, and other
    values.
    """

    def make(folder: str, components: tuple[str, ...] = (), **values: str) -> list[Manifest]:
        copy = tmp_path / "kubernetes"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(KUBERNETES, copy)
        kustomization = yaml.safe_load((copy / folder / "kustomization.yaml").read_text())
        kustomization["components"] += [f"../{component}" for component in components]
        (copy / folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        given = yaml.safe_load((copy / "values" / "values.yaml").read_text())
        assert set(values) <= set(given["data"])
        given["data"] |= values
        (copy / "values" / "values.yaml").write_text(yaml.safe_dump(given))
        identity = (copy / "values" / "identity.yaml").read_text().replace("{}", "{cloud/role: us}")
        (copy / "values" / "identity.yaml").write_text(identity)
        return render(copy / folder)

    return make


def named(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    (found,) = (m for m in manifests if m["kind"] == kind and name in (None, m["metadata"]["name"]))
    return found


def rayjob_spec(manifests: list[Manifest]) -> Manifest:
    """The spec of the one RayJob of ``manifests``, or that of the RayCronJob's."""
    for m in manifests:
        if m["kind"] in ("RayJob", "RayCronJob"):
            return dict(m["spec"].get("jobTemplate", m["spec"]))
    raise AssertionError("no RayJob")


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Every pod that comes of ``manifests``, by its component; the head's with the autoscaler that
    KubeRay adds.
    """
    found: dict[str, Manifest] = {}
    for m in manifests:
        if m["kind"] in ("RayJob", "RayCronJob"):
            spec = rayjob_spec([m])
            cluster = spec["rayClusterSpec"]
            (workers,) = cluster["workerGroupSpecs"]
            head = json.loads(json.dumps(cluster["headGroupSpec"]["template"]))
            if cluster["enableInTreeAutoscaling"]:
                kept = {
                    k: cluster["autoscalerOptions"][k]
                    for k in ("env", "resources", "securityContext", "volumeMounts")
                }
                image = head["spec"]["containers"][0]["image"]
                head["spec"]["containers"].append({"name": "autoscaler", "image": image, **kept})
            found |= {
                "head": head,
                "worker": workers["template"],
                "submitter": spec["submitterPodTemplate"],
            }
        if m["kind"] == "CronJob":
            found["launcher"] = m["spec"]["jobTemplate"]["spec"]["template"]
    return found


# --- schemas
# ---------------------------------------------------------------------------------------------


def strict(schema: Any) -> Any:
    """``schema`` that refuses what it does not name: the API server drops such fields, and says
    nothing.
    """
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: strict(v) for k, v in schema.items()}
    open_ended = (
        schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    )
    if isinstance(schema.get("properties"), dict) and not open_ended and "type" in schema:
        made["additionalProperties"] = False
    return made


@pytest.fixture(scope="module")
def ray_schemas() -> dict[str, Any]:
    if not CRDS.is_dir():
        pytest.skip(f"KubeRay's schemas are not in {CRDS}")
    schemas = {}
    for kind in ("RayJob", "RayCronJob"):
        crd = yaml.load((CRDS / f"ray.io_{kind.lower()}s.yaml").read_bytes(), yaml.CSafeLoader)
        (version,) = (v for v in crd["spec"]["versions"] if v["name"] == "v1")
        schema = strict(version["schema"]["openAPIV3Schema"])
        schemas[kind] = jsonschema.Draft202012Validator(schema)
    return schemas


@pytest.mark.parametrize("folder", APPLIED)
def test_kuberay_takes_them(
    rendered: dict[str, list[Manifest]], ray_schemas: dict[str, Any], folder: str
) -> None:
    for m in rendered[folder]:
        if m["apiVersion"] == "ray.io/v1":
            ray_schemas[m["kind"]].validate(m)
        for pod in pods([m]).values():
            as_pod = {"apiVersion": "v1", "kind": "Pod", **pod}
            kubernetes_validate.validate(as_pod, KUBERNETES_VERSION, strict=True)


def test_kuberay_schemas_find_what_is_not_there(
    rendered: dict[str, list[Manifest]], ray_schemas: dict[str, Any]
) -> None:
    m = json.loads(json.dumps(named(rendered["once"], "RayJob")))
    m["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "securityContekst"
    ] = {}
    with pytest.raises(jsonschema.ValidationError, match="securityContekst"):
        ray_schemas["RayJob"].validate(m)


@pytest.mark.parametrize("folder", APPLIED)
def test_kubernetes_takes_them(rendered: dict[str, list[Manifest]], folder: str) -> None:
    core = [m for m in rendered[folder] if m["apiVersion"] != "ray.io/v1"]
    assert core
    for m in core:
        kubernetes_validate.validate(m, KUBERNETES_VERSION, strict=True)


def test_kubernetes_schemas_find_what_is_not_there(rendered: dict[str, list[Manifest]]) -> None:
    m = json.loads(json.dumps(named(rendered["nightly"], "CronJob")))
    m["spec"]["concurencyPolicy"] = m["spec"].pop("concurrencyPolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="concurencyPolicy"):
        kubernetes_validate.validate(m, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize(
    ("folder", "components"),
    [("once", ("cpu",)), ("once", ("cpu", "kueue")), ("nightly", ("kueue",))],
)
def test_variants_are_of_the_schema_too(
    variant: Callable[..., list[Manifest]],
    ray_schemas: dict[str, Any],
    folder: str,
    components: tuple[str, ...],
) -> None:
    made = named(variant(folder, components, queue="lane", **{"max-workers": "5"}), "RayJob")
    ray_schemas["RayJob"].validate(made)
    (workers,) = made["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    text = yaml.safe_dump(made)
    assert ("nvidia.com/gpu" in text) == ("cpu" not in components)
    if "kueue" in components:
        assert made["spec"]["suspend"] and made["spec"]["shutdownAfterJobFinishes"]
        assert made["metadata"]["labels"].get("kueue.x-k8s.io/queue-name") == (
            "lane" if folder == "once" else None
        )
        assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"] == 5
        assert not made["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"]


def test_queues_for_kueue_are_enough_for_the_job(rendered: dict[str, list[Manifest]]) -> None:
    flavor, cluster_queue, local_queue = yaml.safe_load_all(
        (KUBERNETES / "kueue" / "queues.yaml").read_text()
    )
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    (group,) = cluster_queue["spec"]["resourceGroups"]
    (quota,) = group["flavors"]
    assert quota["name"] == flavor["metadata"]["name"]
    gib = {r["name"]: r["nominalQuota"] for r in quota["resources"]}
    assert set(gib) == set(group["coveredResources"])
    (workers,) = rayjob_spec(rendered["once"])["rayClusterSpec"]["workerGroupSpecs"]
    asked = workers["template"]["spec"]["containers"][0]["resources"]["requests"]
    head = rayjob_spec(rendered["once"])["rayClusterSpec"]["headGroupSpec"]["template"]["spec"][
        "containers"
    ][0]
    n = workers["maxReplicas"]
    assert gib["nvidia.com/gpu"] >= n * int(asked["nvidia.com/gpu"])
    assert gib["cpu"] > n * int(asked["cpu"]) + int(head["resources"]["requests"]["cpu"])
    memory = [
        int(x.removesuffix("Gi"))
        for x in (gib["memory"], asked["memory"], head["resources"]["requests"]["memory"])
    ]
    assert memory[0] > n * memory[1] + memory[2]


# --- safe by default
# -------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["once", "nightly", "raycronjob"])
def test_whatever_starts_ray_is_in_token_mode(
    rendered: dict[str, list[Manifest]], folder: str
) -> None:
    cluster = rayjob_spec(rendered[folder])["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    found = {
        c["name"]: c
        for component, pod in pods(rendered[folder]).items()
        if component != "launcher"
        for c in pod["spec"]["containers"]
    }
    assert set(found) == {"ray-head", "autoscaler", "ray-worker", "submitter"}
    for container in found.values():
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        assert not any(
            e["name"] == "RAY_AUTH_TOKEN" for e in container["env"]
        )  # KubeRay's, from its Secret


def test_a_field_that_an_old_kuberay_does_not_know_leaves_nothing_open() -> None:
    """It drops authOptions, so nobody gives a token: the image's Ray then does not start."""
    assert "RAY_AUTH_MODE=token" in [word for words in of_image("ENV") for word in words]


@pytest.mark.parametrize("folder", ["once", "nightly", "raycronjob"])
def test_pods_are_restricted(rendered: dict[str, list[Manifest]], folder: str) -> None:
    """Pods keep Kubernetes' Pod Security Standard "restricted", which the namespace
    enforces; and more.
    """
    (added,) = (c for words in of_image("RUN") for c in commands_in(words) if c[0] == "useradd")
    uid = added[added.index("--uid") + 1]
    for component, pod in pods(rendered[folder]).items():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC", "hostUsers"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] == int(uid)
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for volume in spec.get("volumes", []):
            assert set(volume) - {"name"} <= {"emptyDir", "configMap"}
        mounted = {v["name"] for v in spec.get("volumes", [])}
        for c in spec["containers"]:
            assert c["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {v["name"] for v in c.get("volumeMounts", [])} <= mounted
            assert not any("hostPort" in port for port in c.get("ports", []))
            assert c["resources"]["limits"]["memory"] == c["resources"]["requests"]["memory"]
            if component != "launcher":
                assert {"/home/afn", "/tmp"} <= {v["mountPath"] for v in c["volumeMounts"]}
        # Kubernetes' own credentials go to those who call it.
        assert spec["automountServiceAccountToken"] is (component in ("head", "launcher"))


def test_nothing_is_exposed_and_no_secret_is_in_a_file(rendered: dict[str, list[Manifest]]) -> None:
    kinds = {m["kind"] for manifests in rendered.values() for m in manifests}
    assert not kinds & {"Secret", "Service", "Ingress", "ClusterRole", "ClusterRoleBinding"}
    for folder in ("once", "nightly", "raycronjob"):
        head = rayjob_spec(rendered[folder])["rayClusterSpec"]["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress")
    secret = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|(?i:password|secret_?key|auth_token)\s*[:=]\s*['\"]?[\w/+]{8}"
    )
    for file in (f for f in INFRA.rglob("*") if f.is_file() and f.suffix != ".pyc"):
        assert not secret.search(file.read_text("utf-8")), file


def test_the_namespace_enforces_the_standard(rendered: dict[str, list[Manifest]]) -> None:
    namespace = named(rendered["access"], "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    name = namespace["metadata"]["name"]
    for m in (m for manifests in rendered.values() for m in manifests if m["kind"] != "Namespace"):
        assert m["metadata"]["namespace"] == name
    assert named(rendered["nightly"], "RoleBinding")["subjects"][0]["namespace"] == name


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for e in selector.get("matchExpressions", []):
        assert e["operator"] == "In"
        if labels.get(e["key"]) not in e["values"]:
            return False
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items())


@pytest.mark.parametrize("folder", ["once", "nightly"])
def test_ports_are_open_to_those_who_need_them_alone(
    rendered: dict[str, list[Manifest]], folder: str
) -> None:
    """Ray's ports are for the cluster's own pods, its dashboard for two callers more, metrics for
    Prometheus.
    """
    labels = {
        component: pod["metadata"]["labels"] for component, pod in pods(rendered[folder]).items()
    }
    policies = [m["spec"] for m in rendered["access"] if m["kind"] == "NetworkPolicy"]
    namespaces = values()
    outside = {
        "operator": (
            namespaces["operator-namespace"],
            {"app.kubernetes.io/name": "kuberay-operator"},
        ),
        "prometheus": (namespaces["monitoring-namespace"], {}),
        "stranger": (
            "default",
            {"app.kubernetes.io/name": "afn-ray", "app.kubernetes.io/component": "head"},
        ),
        "neighbour": ("afn", {}),
    }
    ports = {8265, 6379, 10001, 8080, 44217, 44227, 52365}

    def reaches(namespace: str, caller: dict[str, str], to: dict[str, str]) -> set[int]:
        mine = [p for p in policies if selects(p["podSelector"], to)]
        assert mine and all(p["policyTypes"] == ["Ingress"] for p in mine)
        reached: set[int] = set()
        for rule in (r for p in mine for r in p["ingress"]):
            for peer in rule["from"]:
                there = {"kubernetes.io/metadata.name": namespace}
                in_space = (
                    selects(peer["namespaceSelector"], there)
                    if "namespaceSelector" in peer
                    else namespace == "afn"
                )
                if in_space and selects(peer.get("podSelector", {}), caller):
                    reached |= {p["port"] for p in rule["ports"]} if "ports" in rule else ports
        return reached

    for to in ("head", "worker"):
        for caller in ("head", "worker"):
            assert reaches("afn", labels[caller], labels[to]) == ports
        assert reaches("afn", labels["submitter"], labels[to]) == {8265}
        assert reaches(*outside["operator"], labels[to]) == {8265}
        assert reaches(*outside["prometheus"], labels[to]) == {8080, 44217, 44227}
        assert not reaches(*outside["stranger"], labels[to]) and not reaches(
            *outside["neighbour"], labels[to]
        )
    for to in set(labels) & {"submitter", "launcher"}:
        assert not any(reaches("afn", labels[caller], labels[to]) for caller in labels)


def test_prometheus_looks_where_the_pods_are(rendered: dict[str, list[Manifest]]) -> None:
    (monitor,) = render(KUBERNETES / "monitoring")
    assert (
        monitor["kind"] == "PodMonitor" and "namespaceSelector" not in monitor["spec"]
    )  # so its own alone
    assert (
        monitor["metadata"]["namespace"]
        == named(rendered["once"], "RayJob")["metadata"]["namespace"]
    )
    (end,) = monitor["spec"]["podMetricsEndpoints"]
    for component in ("head", "worker"):
        assert selects(
            monitor["spec"]["selector"], {"ray.io/node-type": component}
        )  # KubeRay's label
        ports = {
            p["name"]: p["containerPort"]
            for p in pods(rendered["once"])[component]["spec"]["containers"][0]["ports"]
        }
        assert ports[end["port"]] == 8080


def test_alerts_of_nights_ask_for_the_names_that_nights_have(
    rendered: dict[str, list[Manifest]],
) -> None:
    groups = {
        g["name"]: g["rules"]
        for g in yaml.safe_load((INFRA / "monitoring" / "alerts.yaml").read_text())["groups"]
    }
    asked = " ".join(rule["expr"] for rule in groups["afn-nights"])
    name = named(rendered["nightly"], "CronJob")["metadata"]["name"]
    assert set(re.findall(r'cronjob="(.*?)"', asked)) == {name}
    (pattern,) = set(re.findall(r'job_name=~"(.*?)"', asked))
    assert re.fullmatch(pattern, f"{name}-29412345") and not re.fullmatch(pattern, "afn-tonight")


def test_what_may_not_be_evicted(rendered: dict[str, list[Manifest]]) -> None:
    labels = {
        component: pod["metadata"]["labels"] for component, pod in pods(rendered["nightly"]).items()
    }
    budgets = {
        m["metadata"]["name"]: m["spec"]
        for m in rendered["access"]
        if m["kind"] == "PodDisruptionBudget"
    }
    chosen = {
        name: {c for c in labels if selects(b["selector"], labels[c])}
        for name, b in budgets.items()
    }
    assert chosen == {"afn-head": {"head"}, "afn-worker": {"worker"}}
    for budget in budgets.values():  # pods without a scale take this form alone
        assert isinstance(budget["minAvailable"], int) and "maxUnavailable" not in budget
    assert budgets["afn-head"]["minAvailable"] > 100 > budgets["afn-worker"]["minAvailable"] > 0


def test_the_launcher_may_do_what_it_does_and_no_more(rendered: dict[str, list[Manifest]]) -> None:
    role, binding = named(rendered["nightly"], "Role"), named(rendered["nightly"], "RoleBinding")
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}
    ]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    account = named(rendered["nightly"], "ServiceAccount")["metadata"]["name"]
    assert [s["name"] for s in binding["subjects"]] == [account]
    assert pods(rendered["nightly"])["launcher"]["spec"]["serviceAccountName"] == account
    known = {m["metadata"]["name"] for m in rendered["access"] if m["kind"] == "ServiceAccount"}
    assert {
        pods(rendered["nightly"])[c]["spec"]["serviceAccountName"] for c in ("head", "worker")
    } == known


# --- in step with the code
# -------------------------------------------------------------------------------


@pytest.fixture
def run_config(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return config_from({}, KUBERNETES / "values" / "run.toml")


def test_a_pod_is_what_one_worker_asks_for(
    rendered: dict[str, list[Manifest]], run_config: RunConfig
) -> None:
    assert (
        run_config.device == "cuda" and run_config.workers
    )  # a cluster without workers yet cannot tell
    needs = connection.needs(run_config, run_config.device)
    (workers,) = rayjob_spec(rendered["once"])["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    has = container["resources"]["limits"]
    assert (int(has["cpu"]), int(has["nvidia.com/gpu"])) == (needs["num_cpus"], needs["num_gpus"])
    assert container["resources"]["requests"] == has
    assert (
        workers["maxReplicas"] == run_config.workers
        and workers["minReplicas"] == workers["replicas"] == 0
    )
    assert not {e["name"] for e in container["env"]} & set(
        connection.WORKER_ENV
    )  # each worker brings its own
    assert int(workers["rayStartParams"]["object-store-memory"]) >= connection.OBJECT_STORE_BYTES


@pytest.mark.parametrize("folder", ["once", "nightly", "raycronjob"])
def test_what_a_run_on_spot_needs(rendered: dict[str, list[Manifest]], folder: str) -> None:
    from ray._private import ray_constants

    spec = rayjob_spec(rendered[folder])
    cluster = spec["rayClusterSpec"]
    assert (
        spec["shutdownAfterJobFinishes"]
        and spec["backoffLimit"] > 0
        and spec["activeDeadlineSeconds"] > 0
    )
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["rayVersion"] == constraints()["ray"]
    drain = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    assert hasattr(ray_constants, drain)
    for component in ("head", "worker"):
        pod = pods(rendered[folder])[component]["spec"]
        env = {e["name"]: e.get("value") for e in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] > float(env[drain]) >= 30
        assert pod["terminationGracePeriodSeconds"] > float(env["RAY_JOB_STOP_WAIT_TIME_S"])
        assert pod.get("restartPolicy", "Never") == "Never"  # autoscaler v2
    spot = {
        ("eks.amazonaws.com/capacityType", "SPOT"),
        ("karpenter.sh/capacity-type", "spot"),
        ("cloud.google.com/gke-spot", "true"),
        ("kubernetes.azure.com/scalesetpriority", "spot"),
    }
    terms = {}
    for component in ("head", "worker"):
        affinity = pods(rendered[folder])[component]["spec"]["affinity"]["nodeAffinity"]
        (terms[component],) = [t["nodeSelectorTerms"] for t in affinity.values()]
    ((never,), any_of) = terms["head"], terms["worker"]
    assert {
        (e["key"], *e["values"]) for e in never["matchExpressions"] if e["operator"] == "NotIn"
    } == spot
    assert {
        (e["key"], *e["values"])
        for t in any_of
        for e in t["matchExpressions"]
        if e["operator"] == "In"
    } == spot
    tolerated = {t["key"] for t in pods(rendered[folder])["worker"]["spec"]["tolerations"]}
    assert {
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    } == tolerated


def test_the_nights_do_not_overlap(rendered: dict[str, list[Manifest]]) -> None:
    cron = named(rendered["nightly"], "CronJob")["spec"]
    template = named(rendered["nightly"], "RayJob")
    assert cron["concurrencyPolicy"] == "Forbid"
    assert (
        template["spec"]["suspend"] is True
        and template["metadata"]["labels"]["afn-ray/template"] == "true"
    )
    (launcher,) = pods(rendered["nightly"])["launcher"]["spec"]["containers"]
    assert launcher["command"][-1] == template["metadata"]["name"]
    assert (
        "activeDeadlineSeconds" not in cron["jobTemplate"]["spec"]
    )  # the RayJob's begins anew at each retry
    assert "suspend" not in rayjob_spec(rendered["raycronjob"])
    same = json.loads(
        json.dumps(template["spec"]).replace(
            '"configMap": {"name": "afn-nightly"}', '"configMap": {"name": "afn-raycronjob"}'
        )
    )
    assert rayjob_spec(rendered["raycronjob"]) == {k: v for k, v in same.items() if k != "suspend"}
    assert not any(m["kind"] == "RayJob" for m in rendered["raycronjob"])


def test_each_use_has_a_config_of_its_own(rendered: dict[str, list[Manifest]]) -> None:
    """Applied for a scan, edited values change no night; deleted with a scan, nights keep
    theirs.
    """
    made = {
        folder: [m["metadata"]["name"] for m in rendered[folder] if m["kind"] == "ConfigMap"]
        for folder in APPLIED
    }
    assert made == {
        "access": [],
        "once": ["afn-scan"],
        "nightly": ["afn-nightly"],
        "raycronjob": ["afn-raycronjob"],
    }
    for folder in ("once", "nightly", "raycronjob"):
        for component in ("head", "worker"):
            (config,) = (
                v
                for v in pods(rendered[folder])[component]["spec"]["volumes"]
                if v["name"] == "config"
            )
            assert [config["configMap"]["name"]] == made[folder]


SECRETS = {"AFN_WEBHOOK": ("afn-webhook", "url"), "AFN_NOTIFY": ("afn-notify", "urls")}
"""Secret and key of each variable with addresses that an audit reports to."""


@pytest.mark.parametrize("folder", ["once", "nightly"])
def test_what_is_run_exists_and_takes_its_arguments(
    rendered: dict[str, list[Manifest]], folder: str
) -> None:
    python, script, config, *flags = shlex.split(rayjob_spec(rendered[folder])["entrypoint"])
    (workdir,) = (words[1] for words in of_image("COPY") if words[0] == "jobs")
    assert python == "python" and (ROOT / "jobs" / Path(script).relative_to(workdir)).is_file()
    command = {"activation_scan.py": ["run", "--config"], "nightly_audit.py": ["audit"]}[
        Path(script).name
    ]
    given = grammar.parser().parse_args([*command, config, *flags])
    if given.command == "audit":  # all of a pod is gone when its job ends
        assert given.out == values()["audits"] and "://" in given.out
        head = pods(rendered[folder])["head"]["spec"]["containers"][0]
        secrets = {e["name"]: e["valueFrom"] for e in head["env"] if e["name"] in SECRETS}
        for name, (secret, key) in SECRETS.items():
            assert secrets[name] == {"secretKeyRef": {"name": secret, "key": key, "optional": True}}
    (mount,) = (
        v["mountPath"]
        for v in pods(rendered[folder])["head"]["spec"]["containers"][0]["volumeMounts"]
        if v["name"] == "config"
    )
    files = named(rendered[folder], "ConfigMap")["data"]
    for path in (config, *(f for f in flags if f.endswith(".toml"))):
        assert Path(path).parent == Path(mount) and Path(path).name in files
    assert "store" in tomllib.loads(files["run.toml"])


def test_the_policy_can_be_read() -> None:
    read_policy(KUBERNETES / "values" / "policy.toml")


def test_values_are_in_one_place(
    variant: Callable[..., list[Manifest]], rendered: dict[str, list[Manifest]]
) -> None:
    default = values()
    run = tomllib.loads((KUBERNETES / "values" / "run.toml").read_text())
    named_once = {default["image"], default["audits"]}
    in_configs = {*run["corpus"], run["store"], run["model"]}
    for file in (f for f in INFRA.rglob("*") if f.suffix in (".yaml", ".py", ".toml", ".sbatch")):
        if "values" not in file.parts:
            text = file.read_text()
            assert not [v for v in named_once | in_configs if v in text], file
            assert not re.search(r"s3://|gs://[a-z]", text), file
    other = {
        "image": "elsewhere/afn:9.9",
        "max-workers": "3",
        "schedule": "5 5 * * 5",
        "time-zone": "Europe/Vienna",
        "queue": "lane",
        "operator-namespace": "op",
        "monitoring-namespace": "mon",
        "audits": "gs://b/nights",
    }
    assert set(other) == set(default)
    used = set()
    for folder in APPLIED:
        manifests = variant(folder, **other)
        text = yaml.safe_dump_all(manifests)
        assert not [v for v in named_once if v in text] and "SET_BY_VALUES" not in text
        rest = yaml.safe_dump_all([m for m in manifests if m["kind"] != "ConfigMap"])
        assert not [v for v in in_configs if v in rest]
        used |= {
            key
            for key, value in other.items()
            if re.search(rf"(?<![\w.]){re.escape(value)}(?![\w.])", text)
        }
        images = set(re.findall(r"image: (\S+)", text))
        assert text.count("cloud/role: us") == (2 if folder == "access" else 0)
        assert images == (set() if folder == "access" else {other["image"]})
        assert "SET_BY_VALUES" not in yaml.safe_dump_all(rendered[folder])
    assert used == set(other)
    assert re.search(r":[\w.]*\d[\w.]*$", default["image"])  # a version, never "latest"


# --- the launcher
# ----------------------------------------------------------------------------------------


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch", KUBERNETES / "launch.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "token").write_text("of-the-pod\n")
    (tmp_path / "namespace").write_text("afn")
    monkeypatch.setattr(
        module.ssl, "create_default_context", lambda cafile: cafile.name == "ca.crt" and None
    )
    for name, value in (
        ("ACCOUNT", tmp_path),
        ("SCHEME", "http"),
        ("POLL_S", 0.01),
        ("PATIENCE_S", 0.3),
    ):
        monkeypatch.setattr(module, name, value)
    return module


class Api:
    """The part of an API server that a launcher meets. ``answers``: status codes given before it
    works.

    ``batch``: Jobs by name. As KubeRay does, it submits a RayJob by a Job of the same name, and
    takes one that is there for its own, so that nothing is submitted. ``leaving``: how often a
    RayJob is still seen before it is gone.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Manifest] = {}
        self.batch = {"afn-nightly-123"}
        self.leaving: dict[str, int] = {}
        self.statuses: list[Manifest] = []
        self.answers: list[int] = []
        self.created = 0

    def __call__(self, method: str, name: str, body: Manifest | None) -> tuple[int, Manifest]:
        if self.answers and (code := self.answers.pop(0)) != 200:
            return code, {}
        if method == "POST":
            assert body is not None
            name = body["metadata"]["name"]
            if name in self.leaving:
                self.leaving[name] -= 1
                if not self.leaving[name]:
                    del self.leaving[name], self.jobs[name]
            if name in self.jobs:
                return 409, {}
            self.jobs[name] = body
            self.created += 1
            if name in self.batch:
                self.statuses = [{"jobDeploymentStatus": "Running"}] * 2 + [LATE]
            self.batch.add(name)
            return 201, body
        if name not in self.jobs:
            return 404, {}
        if "afn-ray/template" in self.jobs[name]["metadata"]["labels"]:
            return 200, self.jobs[name]
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return 200, {**self.jobs[name], "status": status}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, rendered: dict[str, list[Manifest]]) -> Iterator[Api]:
    api = Api()
    api.jobs["afn-nightly"] = named(rendered["nightly"], "RayJob")

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            prefix = "/apis/ray.io/v1/namespaces/afn/rayjobs"
            assert (
                self.path.startswith(prefix)
                and self.headers["Authorization"] == "Bearer of-the-pod"
            )
            body = json.loads(
                self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null"
            )
            code, value = api(self.command, self.path.removeprefix(prefix).strip("/"), body)
            data = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = answer

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
    yield api
    server.shutdown()
    thread.join()
    server.server_close()


DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
LATE = {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}
BROKEN = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "exit code 1",
}


def test_a_launcher_waits_for_the_end_of_a_copy_of_the_template(
    launcher: ModuleType, api: Api, rendered: dict[str, list[Manifest]]
) -> None:
    api.statuses = [
        {},
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Retrying"},
        {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"},
        DONE,
    ]
    assert launcher.launch("afn-nightly", "afn-nightly-123", "uid", "") == 0
    assert api.statuses == [DONE]
    template, made = api.jobs["afn-nightly"], api.jobs["afn-nightly-123-run"]
    assert made["spec"] == {**template["spec"], "suspend": False}
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("Job", "afn-nightly-123", "uid")
    assert api.batch == {
        "afn-nightly-123",
        "afn-nightly-123-run",
    }  # the launcher's, and the submitter's
    night = f"{named(rendered['nightly'], 'CronJob')['metadata']['name']}-{2**31}-run"
    assert len(night) <= 47  # what KubeRay takes


def test_a_copy_for_kueue_stays_suspended(launcher: ModuleType, api: Api) -> None:
    api.statuses = [{"jobDeploymentStatus": "Suspended"}, DONE]
    assert launcher.launch("afn-nightly", "n", "uid", "lane") == 0
    assert api.jobs["n-run"]["spec"]["suspend"] is True
    assert api.jobs["n-run"]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "lane"


def test_a_launcher_in_place_of_a_lost_one_starts_nothing(launcher: ModuleType, api: Api) -> None:
    api.statuses = [DONE]
    assert [launcher.launch("afn-nightly", "n", "uid", "") for _ in range(2)] == [0, 0]
    assert api.created == 1


def test_a_rayjob_of_an_earlier_job_of_that_name_is_not_taken_for_this_one(
    launcher: ModuleType, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.statuses = [DONE]
    assert launcher.launch("afn-nightly", "n", "yesterday", "") == 0
    with (
        monkeypatch.context() as patch,
        pytest.raises(launcher.Unknown, match="n-run is not of this Job"),
    ):
        patch.setattr(launcher, "PATIENCE_S", 0.05)
        launcher.launch("afn-nightly", "n", "today", "")
    api.leaving["n-run"], api.batch = 3, set()
    assert launcher.launch("afn-nightly", "n", "today", "") == 0
    assert (
        api.created == 2 and api.jobs["n-run"]["metadata"]["ownerReferences"][0]["uid"] == "today"
    )


@pytest.mark.parametrize(
    "status",
    [BROKEN, {**DONE, "jobStatus": "STOPPED"}, {"jobDeploymentStatus": "ValidationFailed"}],
)
def test_a_failed_night_fails_its_job(
    launcher: ModuleType, api: Api, status: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    api.statuses = [status]
    assert launcher.launch("afn-nightly", "n", "uid", "") == 1
    assert "RayJob n-run failed" in capsys.readouterr().err


def test_an_api_server_that_is_away_is_asked_again_and_one_that_refuses_is_not(
    launcher: ModuleType, api: Api
) -> None:
    api.statuses, api.answers = [DONE], [500, 503, 429]
    assert launcher.launch("afn-nightly", "n", "uid", "") == 0
    api.answers = [422]
    with pytest.raises(launcher.Refused, match="422"):
        launcher.launch("afn-nightly", "m", "uid", "")
    with pytest.raises(launcher.Refused, match="404"):
        launcher.launch("nothing", "m", "uid", "")


@pytest.mark.parametrize("code", [503, 401, 403])
def test_a_night_under_way_is_given_up_for_no_answer(
    launcher: ModuleType,
    api: Api,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A token that is renewed late or a right that is lost for a while: the RayJob runs on."""
    monkeypatch.setenv("JOB_NAME", "m")
    monkeypatch.setenv("JOB_UID", "uid")
    api.statuses, api.answers = [DONE], [200, 200, code, code]
    assert launcher.main("afn-nightly") == 0
    monkeypatch.setattr(launcher, "PATIENCE_S", 0.03)
    api.answers = [code] * 10_000
    assert launcher.main("afn-nightly") == 75  # another launcher
    assert "no answer from the API server" in capsys.readouterr().err


def test_whatever_goes_wrong_with_a_launcher_says_nothing_of_the_night(
    launcher: ModuleType, api: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert launcher.main("afn-nightly") == 75  # JOB_NAME is not there
    monkeypatch.setenv("JOB_NAME", "m")
    monkeypatch.setenv("JOB_UID", "uid")
    api.statuses = [DONE]
    assert launcher.main("nothing") == 2
    monkeypatch.setattr(launcher, "PATIENCE_S", 0.03)
    (tmp_path / "token").unlink()
    assert launcher.main("afn-nightly") == 75
    monkeypatch.setattr(launcher.ssl, "create_default_context", lambda cafile: cafile.read_text())
    (tmp_path / "token").write_text("of-the-pod")
    assert launcher.main("afn-nightly") == 75
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert launcher.main("afn-nightly") == 75


def test_a_cronjob_tells_a_failed_night_from_a_lost_launcher(
    rendered: dict[str, list[Manifest]],
) -> None:
    rules = named(rendered["nightly"], "CronJob")["spec"]["jobTemplate"]["spec"][
        "podFailurePolicy"
    ]["rules"]
    codes = {code for r in rules if r["action"] == "FailJob" for code in r["onExitCodes"]["values"]}
    returned = {
        node.value.value
        for node in ast.walk(ast.parse((KUBERNETES / "launch.py").read_text()))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant)
    }
    assert codes == {1, 2} and {code for code in returned if code is not None} == {0, 1, 2, 75}


# --- the image
# -------------------------------------------------------------------------------------------


def constraints() -> dict[str, str]:
    lines = (
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    return dict(line.split("==") for line in lines)


def test_the_containerfile_lints_and_pins_what_the_project_asks_for() -> None:
    lint("hadolint", INFRA / "Containerfile")
    *_, (user,) = of_image("USER")
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", user)
    given = dict(w[0].split("=", 1) for name, w in instructions() if name == "ARG")
    assert re.fullmatch(r"3\.11\.\d+-slim-\w+", given["PYTHON"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert given["VERSION"] == project["version"]
    extras = given["EXTRAS"].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    pinned = {name.lower().replace("_", "-") for name in constraints()}
    for requirement in (
        *project["dependencies"],
        *(r for e in extras for r in project["optional-dependencies"][e]),
    ):
        assert re.split(r"[\[><=; ]", requirement)[0].lower().replace("_", "-") in pinned, (
            requirement
        )


def test_an_image_installs_nothing_that_is_not_pinned() -> None:
    built: list[str] = []
    for name, words in instructions():
        for command in commands_in(words) if name == "RUN" else ():
            if command[:2] != ["pip", "install"]:
                continue
            alone = "--no-deps" in command
            assert alone or command[command.index("-c") + 1] == "constraints.txt"
            if "." in command:  # what builds it is pinned too: it was installed before
                assert alone and "--no-build-isolation" in command
                assert "setuptools" in built and "setuptools" in constraints()
            built += command
    assert "." in built


def test_what_an_image_is_built_from_is_there_and_nothing_else_is_sent() -> None:
    copied = [w for name, w in instructions() if name == "COPY" and not w[0].startswith("--from")]
    sources = [source for words in copied for source in words[:-1]]
    first, *rest = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert first == "*"
    let_in = {line.removeprefix("!") for line in rest if line.startswith("!")}
    assert set(sources) == let_in and all((ROOT / s).exists() for s in sources)
    template = yaml.safe_load((KUBERNETES / "nightly" / "cronjob.yaml").read_text())
    command = template["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0][
        "command"
    ]
    assert ["infra/kubernetes/launch.py", command[1]] in of_image("COPY")


# --- clouds
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_ray_cluster_on_machines(cloud: str, run_config: RunConfig) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((INFRA / "ray" / f"{cloud}.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    assert config["provider"]["use_internal_ips"] is True
    head, workers = (config["available_node_types"][name] for name in ("head", "workers"))
    assert (
        head["resources"] == {"CPU": 0}
        and workers["min_workers"] == 0
        and workers["max_workers"] == run_config.workers
    )
    needs = connection.needs(run_config, "cuda")
    assert workers["resources"] == {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
    for node in (head["node_config"], workers["node_config"]):
        if cloud == "aws":
            assert node["SecurityGroupIds"] and node["SubnetIds"] and node["IamInstanceProfile"]
            assert node["MetadataOptions"]["HttpTokens"] == "required"
        else:
            assert node["networkInterfaces"] and not any(
                "accessConfigs" in n for n in node["networkInterfaces"]
            )
            assert node["serviceAccounts"]
    spot = workers["node_config"].get(
        "InstanceMarketOptions", workers["node_config"].get("scheduling")
    )
    assert spot.get("MarketType") == "spot" or spot.get("provisioningModel") == "SPOT"
    assert not {"InstanceMarketOptions", "scheduling"} & set(head["node_config"])
    starts = []
    for line in (c for role in ("head", "worker") for c in config[f"{role}_start_ray_commands"]):
        for words in commands_in(shlex.split(line)):
            environment = list(itertools.takewhile(lambda w: "=" in w, words))
            program, *rest = words[len(environment) :]
            if program.endswith("/ray"):
                assert "RAY_AUTH_MODE=token" in environment
                starts += [of_ray(*rest)] if rest[0] == "start" else []
    (head_start,) = (params for params in starts if params["head"])
    assert len(starts) == 2
    assert (head_start["dashboard_host"], head_start["num_cpus"]) == ("127.0.0.1", 0)
    assert "~/.ray/auth_token" in config["file_mounts"] and "RAY_AUTH_TOKEN" not in json.dumps(
        given
    )
    assert not config["docker"]
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config({**config, "idle_timeout": 5})


def of_ray(name: str, *words: str) -> dict[str, Any]:
    """Result of Ray's own parser for ``words`` after ``ray`` and the name of a command."""
    from ray.scripts import scripts

    group: Any = scripts.cli
    if name == "job":
        group, (name, *rest) = group.commands["job"], words
    else:
        rest = list(words)
    return dict(group.commands[name].make_context(name, rest, resilient_parsing=True).params)


def template() -> Manifest:
    """infra/cloud/aws.yaml with its tags as what they stand before."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
        pass

    def plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return loader.construct_scalar(node)
        return loader.construct_sequence(node)

    Loader.add_multi_constructor("!", plain)
    return dict(yaml.load((INFRA / "cloud" / "aws.yaml").read_text(), Loader))


def test_the_template_of_rights_is_one_that_cloudformation_takes() -> None:
    lint("cfn-lint", INFRA / "cloud" / "aws.yaml")


CALLS = {"head_object": "GetObject", "get_object": "GetObject", "put_object": "PutObject",
         "delete_object": "DeleteObject", "list_objects_v2": "ListBucket",
         "head_bucket": "ListBucket",
         "create_multipart_upload": "PutObject",
         "upload_part": "PutObject", "complete_multipart_upload": "PutObject",
         "abort_multipart_upload": "AbortMultipartUpload"}  # fmt: skip
"""Calls of S3's API, and the right that each asks for."""


def test_a_run_needs_the_rights_that_the_template_gives(
    make_config: Callable[..., RunConfig],
    object_store: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from s3fs import S3FileSystem

    corpus, store = f"{object_store}/texts", f"{object_store}/afn"
    storage.upload(
        write_jsonl(tmp_path / "a.jsonl", [{"text": "In the beginning"}] * 3), f"{corpus}/a.jsonl"
    )
    made: list[tuple[str, str, str]] = []
    call = S3FileSystem._call_s3

    async def recorded(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        words: dict[str, str] = {
            k: v for a in args if isinstance(a, dict) for k, v in a.items()
        } | kwargs
        made.append((CALLS[method], words["Bucket"], words.get("Key", words.get("Prefix", ""))))
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(S3FileSystem, "_call_s3", recorded)
    config = make_config(corpus=(corpus,), store=store, executor="inline")
    policy_of_nights = read_policy(KUBERNETES / "values" / "policy.toml")
    night = audit.run_audit(config, policy_of_nights, Night(frozen=True))
    assert audit.write_json(night, f"{object_store}/audits") == f"{object_store}/audits/audit.json"
    bucket = object_store.removeprefix("s3://")
    policy = template()["Resources"]["RunPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    names = {
        "arn:${AWS::Partition}:s3:::${CorpusBucket}": bucket,
        "${Store.Arn}": bucket,
        "${CorpusPrefix}": "texts",
        "${StorePrefix}": "afn",
        "CorpusPrefix": "texts",
        "StorePrefix": "afn",
        "${AuditPrefix}": "audits",
    }

    def allows(statement: Manifest, right: str, tried: str) -> bool:
        if f"s3:{right}" not in listed(statement["Action"]):
            return False
        given = (
            statement["Condition"]["StringLikeIfExists"]["s3:prefix"]
            if right == "ListBucket"
            else statement["Resource"]
        )
        for pattern in listed(given):
            for name, value in names.items():
                pattern = pattern.replace(name, value)
            if re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), tried):
                return True
        return False

    def allowed(right: str, key: str) -> bool:
        return any(
            allows(s, right, key if right == "ListBucket" else f"{bucket}/{key}") for s in policy
        )

    assert {b for _, b, _ in made} == {bucket}
    assert not {(right, key) for right, _, key in made if not allowed(right, key)}
    assert {right for right, _, _ in made} == {
        "GetObject",
        "PutObject",
        "DeleteObject",
        "ListBucket",
    }
    assert allowed("AbortMultipartUpload", "afn/shards/m/s/a-tokens.parquet")  # of larger files
    assert (
        "DeleteObject",
        bucket,
        "afn/planning.json",
    ) in made  # what a run replaces and deletes, beside leftovers
    for kept in (
        "shards/m/s/commit.json",
        "runs/r/status.json",
        "runs/r/run.json",
        "runs/r/thresholds.parquet",
    ):
        assert not allowed("DeleteObject", f"afn/{kept}")
    assert {("PutObject", "audits/audit.json"), ("DeleteObject", "audits/report.html")} <= {
        (r, k) for r, _, k in made
    }
    assert not allowed("PutObject", "texts/a.jsonl") and not allowed("GetObject", "elsewhere/a")


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_the_store_bucket_holds_writers_to_the_protocol() -> None:
    resources = template()["Resources"]
    bucket = resources["Store"]["Properties"]
    assert (
        all(bucket["PublicAccessBlockConfiguration"].values())
        and len(bucket["PublicAccessBlockConfiguration"]) == 4
    )
    (rule,) = bucket["LifecycleConfiguration"]["Rules"]
    assert (
        rule["Status"] == "Enabled"
        and rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] <= 7
    )
    assert resources["Store"]["DeletionPolicy"] == "Retain"
    by_id = {
        s["Sid"]: s for s in resources["StorePolicy"]["Properties"]["PolicyDocument"]["Statement"]
    }
    once = by_id["ACommitIsWrittenOnce"]
    assert once["Effect"] == "Deny" and once["Condition"]["Null"] == {"s3:if-none-match": "true"}
    assert once["Resource"].endswith("/commit*.json")


# --- Slurm
# -----------------------------------------------------------------------------------------------

SBATCH = INFRA / "slurm" / "afn.sbatch"


def test_the_slurm_script_is_clean() -> None:
    lint("shellcheck", SBATCH)
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SBATCH.read_text(), re.M))
    assert options["signal"] == "B:TERM@300" and "requeue" in options


@pytest.fixture
def slurm(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``slurm(driver_code, restarts, addresses)``: the script among commands that write down how
    they were called.
    """
    fakes = {
        "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\nn3\\n"; fi',
        "hostname": 'if [ "$1" = -I ]; then echo "fd00::2 $ADDRESSES"; else echo 127.0.1.1; fi',
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "ray": """case "$*" in *--address=*) [ ! -e "$LOG.lost" ] || exit 1;; esac
            if [ "$1" = start ]; then exec /bin/sleep 30; fi""",
        "sleep": "exec /bin/sleep 0.05",
        "python": """if [ "$DRIVER" = wait ]; then
            trap "exit 75" TERM; touch "$LOG.up"; while :; do /bin/sleep 0.05; done
        fi; until [ "$(grep -c "^ray start" "$LOG")" = 2 ]; do sleep 0.02; done; exit $DRIVER""",
    }
    (tmp_path / "bin").mkdir()
    for name, body in fakes.items():
        path = tmp_path / "bin" / name
        log = (
            f'echo "{name} $*" >> "$LOG"; echo "{name} $RAY_AUTH_MODE $RAY_AUTH_TOKEN" '
            '>> "$LOG.env"'
        )
        path.write_text(f"#!/bin/sh\n{log}\n{body}\n")
        path.chmod(0o755)

    def start(
        driver: str, restarts: int = 0, addresses: str = "10.0.0.1 10.0.0.2"
    ) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "LOG": str(tmp_path / "log"),
            "DRIVER": driver,
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-3]",
            "SLURM_CPUS_PER_TASK": "16",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_RESTART_COUNT": str(restarts),
            "ADDRESSES": addresses,
        }
        return subprocess.Popen(
            ["bash", str(SBATCH), "run.toml", "--workers", "8"],
            env=env,
            text=True,
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    return start


def test_a_slurm_job_starts_a_ray_with_a_token_of_its_own(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    tokens = set()
    for code in (0, 2):
        with slurm(str(code)) as job:
            assert job.wait(30) == code, job.stderr and job.stderr.read()
        calls, environment = (tmp_path / "log").read_text(), (tmp_path / "log.env").read_text()
        seen = {
            tuple(line.split()[1:])
            for line in environment.splitlines()
            if line.split()[0] in ("ray", "python", "srun")
        }
        ((mode, token),) = seen
        assert mode == "token" and re.fullmatch("[0-9a-f]{64}", token) and token not in calls
        tokens.add(token)
        (tmp_path / "log").unlink()
        (tmp_path / "log.env").unlink()
        assert "scontrol requeue" not in calls
        starts = [line for line in calls.splitlines() if line.startswith("ray start")]
        assert sorted("--head" in s for s in starts) == [False, True]
        assert all("--block --num-cpus=16 --num-gpus=4" in s for s in starts)
        assert "srun --overlap --nodes=2 --ntasks=2 --exclude=n1 ray start" in calls
        assert (
            "python jobs/activation_scan.py run.toml --address 10.0.0.1:20007 --workers 8" in calls
        )
    assert len(tokens) == 2


def test_a_slurm_job_that_is_stopped_is_queued_again(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    with slurm("wait") as job:
        wait_until("the script is up", (tmp_path / "log.up").exists, job)
        job.send_signal(signal.SIGTERM)  # to the batch shell alone, as --signal=B:TERM does
        assert job.wait(30) == 75
    assert "scontrol requeue 7" in (tmp_path / "log").read_text()
    (tmp_path / "log").unlink()
    with slurm("75", restarts=20) as job:  # not for ever
        assert job.wait(30) == 75
    assert "scontrol requeue" not in (tmp_path / "log").read_text()


def test_a_slurm_job_whose_workers_are_lost_is_queued_again(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "log.lost").touch()
    with slurm("wait") as job:
        assert job.wait(30) == 75 and job.stderr
        assert "the Ray of the other nodes has ended before the run" in job.stderr.read()
    assert "scontrol requeue 7" in (tmp_path / "log").read_text()


def test_a_slurm_job_whose_head_no_node_can_reach_does_not_begin(
    slurm: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    with slurm("0", addresses="127.0.0.1") as job:
        assert job.wait(30) == 2 and job.stderr
        assert "no IPv4 address" in job.stderr.read()
    assert "ray start" not in (tmp_path / "log").read_text()


# --- the page
# --------------------------------------------------------------------------------------------

PAGE = (INFRA / "README.md").read_text("utf-8")
COMMANDS = [line for block in fenced(PAGE, "sh") for line in block.splitlines()]


def test_what_the_page_names_exists() -> None:
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S)
    paths = set(re.findall(r"(?:infra|jobs)/[\w./-]*\w", PAGE))
    assert len(paths) > 12
    for path in paths:
        assert (ROOT / path).exists(), path
    for name in re.findall(r"^\| `([\w.]+)` \|", prose, re.M):
        assert (KUBERNETES / "values" / name).is_file()
    for component in re.findall(r"^- `\.\./(\w+)`", prose, re.M):
        assert (
            yaml.safe_load((KUBERNETES / component / "kustomization.yaml").read_text())["kind"]
            == "Component"
        )
    resources = template()["Resources"]["RunPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert {a for s in resources for a in listed(s["Action"])} == set(
        re.findall(r"`(s3:\w+)`", PAGE)
    )
    rayjob = yaml.safe_load((KUBERNETES / "cluster" / "rayjob.yaml").read_text())["spec"]
    uid = rayjob["submitterPodTemplate"]["spec"]["securityContext"]["runAsUser"]
    assert {int(n) for n in re.findall(r"\buser (\d+)", PAGE)} == {uid}
    hours = {int(n) for n in re.findall(r"\b(\d+)\s+hours", prose)}
    assert rayjob["activeDeadlineSeconds"] / 3600 in hours
    assert rayjob["backoffLimit"] == 2 and re.search(r"retr[^.]*\btwice", prose)
    args = set(re.findall(r"--build-arg (\w+)=", PAGE))
    assert args and args <= {w[0].partition("=")[0] for name, w in instructions() if name == "ARG"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page(command: str, rendered: dict[str, list[Manifest]]) -> None:
    program, *words = shlex.split(command.replace("(umask 077 && ", "").rstrip(")"))
    if program == "kubectl" and words[:2] == ["apply", "-k"]:
        assert Path(words[2]).relative_to(KUBERNETES.relative_to(ROOT)).name in (
            *rendered,
            "monitoring",
        )
    elif program == "kubectl":
        assert words[:2] == ["-n", named(rendered["access"], "Namespace")["metadata"]["name"]]
        match words[2:]:
            case ["create", "secret", "generic", secret, key]:
                (in_secret,) = (key for name, key in SECRETS.values() if name == secret)
                assert key.startswith(f"--from-file={in_secret}=")
            case ["create", "job", source, "afn-tonight"]:
                assert (
                    source
                    == f"--from=cronjob/{named(rendered['nightly'], 'CronJob')['metadata']['name']}"
                )
            case ["delete", "job", name]:
                assert name == "afn-tonight"
            case ["get", "rayjob", name]:
                assert name == named(rendered["once"], "RayJob")["metadata"]["name"]
            case ["logs", "-f", "-l", label]:
                assert (
                    label.partition("=")[::2]
                    in pods(rendered["once"])["submitter"]["metadata"]["labels"].items()
                )
            case _:
                raise AssertionError(command)
    elif program == "ray":
        assert of_ray(*words)
    elif program == "docker":
        image = values()["image"]
        assert words[0] in ("build", "push") and image in words
    elif program == "sbatch":
        (script,) = (w for w in words if w.endswith(".sbatch"))
        config, *flags = words[words.index(script) + 1 :]
        grammar.parser().parse_args(["run", "--config", config, *flags])
    elif program == "aws":
        given = dict(w.split("=") for w in words[words.index("--parameter-overrides") + 1 :])
        parameters = template()["Parameters"]
        assert (
            {k for k, v in parameters.items() if "Default" not in v}
            <= set(given)
            <= set(parameters)
        )
        run = tomllib.loads((KUBERNETES / "values" / "run.toml").read_text())
        assert (
            given["CorpusBucket"] in run["corpus"][0]
            and f"{given['StoreBucket']}/afn" in run["store"]
        )
    else:
        assert command == "export RAY_AUTH_MODE=token"
