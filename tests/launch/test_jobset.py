"""``launch/jobset.yaml`` matches the APIs of JobSet and Kubernetes."""

import copy
import math
import re
from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parents[2] / "launch" / "jobset.yaml"

STRINGS = {str: str}
POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "hostNetwork": bool,
    "dnsPolicy": {"ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": STRINGS,
    "containers": [
        {
            "name": str,
            "image": str,
            "command": [str],
            "args": [str],
            "env": [{"name": str, "value": str}],
            "ports": [{"containerPort": int}],
            "resources": {"limits": {str: int}},
        }
    ],
}
JOB = {
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onExitCodes": {
                    "containerName": str,
                    "operator": {"In", "NotIn"},
                    "values": [int],
                },
            }
        ]
    },
    "template": {"spec": POD},
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": STRINGS},
    "spec": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [
                {
                    "name": str,
                    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                    "onJobFailureReasons": [
                        {
                            "BackoffLimitExceeded",
                            "DeadlineExceeded",
                            "FailedIndexes",
                            "MaxFailedIndexesExceeded",
                            "PodFailurePolicy",
                        }
                    ],
                }
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}
"""The fields that the file may have, with their types or the values that the API takes: the part
that it uses of jobset.x-k8s.io/v1alpha2 (JobSet 0.12), batch/v1 and v1."""


@pytest.fixture
def jobset():
    return yaml.safe_load(FILE.read_text())


def mismatches(value, shape, where=""):
    """Every path at which ``value`` does not have the types of ``shape``."""
    if isinstance(shape, set):
        return [] if value in shape else [f"{where} is {value}"]
    if isinstance(shape, type):
        return [] if type(value) is shape else [f"{where} is not of type {shape.__name__}"]
    if type(value) is not type(shape):
        return [f"{where} is not of type {type(shape).__name__}"]
    if isinstance(shape, list):
        items = enumerate(value)
        return [text for at, item in items for text in mismatches(item, shape[0], f"{where}[{at}]")]
    found = []
    for name, item in value.items():
        if name in shape or str in shape:
            found += mismatches(item, shape.get(name, shape.get(str)), f"{where}.{name}")
        else:
            found.append(f"{where}.{name} is unknown")
    return found


def job_of(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_every_field_exists_in_the_api(jobset):
    assert mismatches(jobset, JOBSET) == []


def test_a_misspelt_field_or_value_is_found(jobset):
    slips = copy.deepcopy(jobset)
    job_of(slips)["paralelism"] = job_of(slips).pop("parallelism")
    job_of(slips)["completions"] = "4"
    slips["spec"]["failurePolicy"]["rules"][0]["action"] = "FailJobset"
    at = ".spec.replicatedJobs[0].template.spec"
    assert mismatches(slips, JOBSET) == [
        ".spec.failurePolicy.rules[0].action is FailJobset",
        f"{at}.completions is not of type int",
        f"{at}.paralelism is unknown",
    ]


def test_hosts_and_mesh_match_the_topology(jobset):
    job = job_of(jobset)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    chips = math.prod(map(int, sides))
    hosts = chips // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts
    (command,) = container["args"]
    mesh = dict(re.findall(r"--mesh\.(\w+) (\d+)", command))
    slices = jobset["spec"]["replicatedJobs"][0]["replicas"]
    assert {axis: int(size) for axis, size in mesh.items()} == {"data": slices, "fsdp": chips}


def test_only_a_user_error_ends_the_job(jobset):
    """Any other exit code fails the job of one slice, and JobSet restarts all slices."""
    job = job_of(jobset)
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # required by a pod failure policy
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (container,) = job["template"]["spec"]["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_compilation_cache_survives_restarts(jobset):
    (container,) = job_of(jobset)["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert variables["JAX_COMPILATION_CACHE_DIR"].startswith("gs://")
