"""The cluster files: valid to Ray's own validator and KubeRay's published schemas, and secret-free.

`golden/kuberay-v1.7.0.json` is cut from the published CRDs; it says how.
"""

import copy
import importlib.metadata
import json
import re

import jsonschema
import pytest
import yaml

from tests.helpers.paths import GOLDEN, ROOT

RAY_UP = ["ray_cluster.yaml", "deploy/gcp.yaml", "deploy/on_premise.yaml"]
CLOUD = RAY_UP[:2]
KUBERAY = ["deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayjob.yaml"]
SCHEMAS = json.loads((GOLDEN / "kuberay-v1.7.0.json").read_text())["schemas"]


def read(name: str) -> dict:
    """The first document of a YAML file."""
    return next(yaml.safe_load_all((ROOT / name).read_text()))


def checked(config: dict) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def published(manifest: dict) -> None:
    jsonschema.Draft7Validator(SCHEMAS[manifest["kind"]]).validate(manifest)


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file_and_no_typo_in_it(name):
    checked(read(name))
    spoilt = read(name) | {"idle_timeout_minute": 5}
    with pytest.raises(jsonschema.ValidationError):
        checked(spoilt)


@pytest.mark.parametrize("name", CLOUD)
def test_a_cloud_has_a_head_without_tasks_and_two_kinds_of_workers_with_bounds(name):
    config = read(name)
    kinds = config["available_node_types"]
    assert config["head_node_type"] == "head" and kinds["head"]["resources"] == {"CPU": 0}
    workers = {kind: about for kind, about in kinds.items() if kind != "head"}
    assert set(workers) == {"cpu", "gpu"} and "GPU" not in workers["cpu"]["resources"]
    assert workers["gpu"]["resources"]["GPU"] >= 1
    for about in workers.values():
        assert 0 <= about["min_workers"] < about["max_workers"]
    assert sum(about["max_workers"] for about in workers.values()) <= config["max_workers"]
    with pytest.raises(jsonschema.ValidationError):
        spoilt = copy.deepcopy(config)
        spoilt["available_node_types"]["gpu"]["min_worker"] = 1
        checked(spoilt)


@pytest.mark.parametrize("name", RAY_UP)
def test_the_head_serves_mlflow_and_every_node_asks_for_the_token(name):
    config, text = read(name), (ROOT / name).read_text()
    head = " ".join(config["head_start_ray_commands"])
    assert "ray start --head" in head and "mlflow server" in head and "sqlite:///$HOME" in head
    assert "~/.ray/auth_token" in config["file_mounts"]
    starts = head + " ".join(config["worker_start_ray_commands"])
    assert starts.count("ulimit -n 65536") == 2
    everywhere = "RAY_AUTH_MODE=token" in " ".join(config.get("setup_commands", []))
    assert everywhere or text.count("RAY_AUTH_MODE=token") == 2


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_manifest(name):
    published(read(name))


def cluster_of(name: str) -> dict:
    spec = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.update(rayVersions="2"),
        lambda c: c["workerGroupSpecs"][0].update(minReplica=1),
        lambda c: c["workerGroupSpecs"][0].update(minReplicas="one"),
        lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0].update(envfrom=[]),
        lambda c: c["authOptions"].update(mode="tokens"),
        lambda c: c["workerGroupSpecs"][0].pop("template"),
    ],
)
def test_kuberays_schema_finds_what_is_misspelt(name, spoil):
    manifest = copy.deepcopy(read(name))
    spec = manifest["spec"]
    spoil(spec.get("rayClusterSpec", spec))
    with pytest.raises(jsonschema.ValidationError):
        published(manifest)


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_have_shared_memory_a_token_and_their_keys_from_a_secret(name):
    cluster = cluster_of(name)
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "halftone-storage"}}]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounted = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert volumes[mounted["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_the_kubernetes_job_is_a_command_that_there_is():
    words = read(KUBERAY[1])["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "jobs.end_to_end"]
    assert (ROOT / "recipes" / f"{words[4]}.yaml").exists()


@pytest.mark.parametrize("name", [*RAY_UP, *KUBERAY])
def test_no_file_holds_a_secret(name):
    text = (ROOT / name).read_text()
    assert not re.search(r"AKIA[0-9A-Z]{12}|BEGIN [A-Z ]*PRIVATE|[0-9a-f]{40}", text)
    for key, value in re.findall(
        r"(\w*(?:SECRET|TOKEN|PASSWORD|ACCESS_KEY\w*))\s*[=:]\s*(\S+)", text
    ):
        assert value.startswith(("…", "$")), (key, value)
