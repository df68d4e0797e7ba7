"""Tests of `deploy/`: Compose files and manifests fit their schemas, contain no secret and agree with the commands."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from flows.services import topology
from onediff.config import Runtime

DEPLOY = Path(__file__).parents[1] / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE_FILES = sorted(DEPLOY.glob("*.yaml"))
KUBERNETES = "1.34"
SECRET = re.compile(r"PASSWORD|AUTH_STRING|SECRET|ACCESS_KEY|API_KEY")


def compose(path: Path) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(path.read_text(encoding="utf-8")))


def services() -> dict[str, dict[str, Any]]:
    """Return the services of all Compose files by name."""
    return {name: service for path in COMPOSE_FILES for name, service in compose(path)["services"].items()}


def manifests() -> list[dict[str, Any]]:
    return [item for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
            for item in YAML(typ="safe").load_all(path.read_text(encoding="utf-8"))]


def workloads() -> dict[str, dict[str, Any]]:
    """Return the specification of each Deployment and StatefulSet by name."""
    return {item["metadata"]["name"]: item["spec"] for item in manifests() if "template" in item.get("spec", {})}


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = workload["template"]["spec"]["containers"]
    return dict(only)


def compose_schema() -> Any:
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    return json.loads(vendored.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_a_compose_file_fits_the_compose_schema(path: Path) -> None:
    jsonschema.validate(compose(path), compose_schema())
    wrong = compose(path)
    next(iter(wrong["services"].values()))["helthcheck"] = {}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate(wrong, compose_schema())


@pytest.mark.parametrize("item", manifests(), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_a_manifest_fits_the_schema_of_its_kind(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "onediff"


def test_a_misspelled_key_of_a_manifest_is_reported() -> None:
    wrong = next(item for item in manifests() if item["kind"] == "Deployment")
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_secrets_of_compose_come_from_the_environment_and_compose_stops_without_them() -> None:
    secrets = [(key, value) for service in services().values() for key, value in service["environment"].items()
               if SECRET.search(key)]
    assert len(secrets) > 12
    for key, value in secrets:
        assert re.fullmatch(r"\$\{\w+:\?.+\}|\$\{(AWS_\w+):-\}", value), key
        name = re.match(r"\$\{(\w+)", value)
        assert name and name[1] in README, f"deploy/README.md must list {value}"
    for path in COMPOSE_FILES:
        assert not re.search(r"//[^/\s]+:[^/@\s]+@", path.read_text(encoding="utf-8")), "an address has a password"


def test_manifests_refer_to_one_secret_that_the_readme_creates() -> None:
    assert "Secret" not in {item["kind"] for item in manifests()}
    variables = [variable for workload in workloads().values() for variable in container(workload)["env"]
                 if SECRET.search(variable["name"])]
    references = [variable["valueFrom"]["secretKeyRef"] for variable in variables]
    assert {reference["name"] for reference in references} == {"onediff"}
    assert {reference["key"] for reference in references} == set(re.findall(r"--from-literal=([\w-]+)=", README))


def test_every_server_requires_a_password_or_key() -> None:
    needed = {"prefect": "PREFECT_SERVER_API_AUTH_STRING", "mlflow": "MLFLOW_AUTH_ADMIN_PASSWORD",
              "serve": "ONEDIFF_API_KEY", "serve-gpu": "ONEDIFF_API_KEY"}
    for name, variable in needed.items():
        assert variable in services()[name]["environment"]
        assert variable in {item["name"] for item in container(workloads()[name])["env"]}
    assert "basic-auth" in services()["mlflow"]["command"]
    assert "basic-auth" in container(workloads()["mlflow"])["command"]


def test_images_have_versions_and_containers_have_memory_limits_and_health_checks() -> None:
    images = [re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"]) for service in services().values()]
    images += [container(workload)["image"] for workload in workloads().values()]
    images += [name for name in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if ":" in name]
    assert [image for image in images if not re.search(r":\d+\.\d+[\w.-]*$", image)] == []
    assert all(service["healthcheck"] for service in services().values())
    assert all(container(workload)["livenessProbe"] and container(workload)["resources"]["limits"]["memory"]
               for workload in workloads().values())


def test_each_image_is_a_stage_of_the_dockerfile() -> None:
    stages = re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE)
    assert stages[-1] == "team", "docker build without --target makes the last stage"
    targets = {service["build"].get("target", "team") for service in services().values() if "build" in service}
    assert targets == {"team", "serve"} and targets <= {*stages}


def test_workers_poll_the_pools_of_make_services() -> None:
    pools = set(topology.pools(Runtime(device="cuda")))
    commands = [service["command"] for name, service in services().items() if name.startswith("worker")]
    commands += [container(spec)["command"] for name, spec in workloads().items() if name.startswith("worker")]
    assert len(commands) == 4
    assert {command[command.index("--pool") + 1] for command in commands} == pools


def test_only_workloads_for_gpus_get_one() -> None:
    names = {name for name, spec in workloads().items() if "nvidia.com/gpu" in container(spec)["resources"]["limits"]}
    assert names == {"worker-gpu", "serve-gpu"}
    assert names == {name for name, service in services().items()
                     if "reservations" in service.get("deploy", {}).get("resources", {})}


@pytest.mark.parametrize(("name", "device"), [("serve", "cpu"), ("serve-gpu", "cuda")])
def test_replicas_of_the_caption_server_get_requests_only_while_they_are_ready(name: str, device: str) -> None:
    spec, box = workloads()[name], container(workloads()[name])
    assert spec["replicas"] >= 2 and spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert {probe: box[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/healthz"}
    service = next(item["spec"] for item in manifests()
                   if item["kind"] == "Service" and item["metadata"]["name"] == "serve")
    assert service["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert {"name": "ONEDIFF_DEVICE", "value": device} in box["env"]
    assert services()[name]["environment"]["ONEDIFF_DEVICE"] == device
    assert box["securityContext"]["readOnlyRootFilesystem"] and services()[name]["read_only"]


def test_the_caption_server_is_started_with_a_command_that_exists() -> None:
    from typer.testing import CliRunner

    from onediff.cli.main import app

    started = re.findall(r"^CMD (\[.*\])", DOCKERFILE, re.MULTILINE)
    commands = [json.loads(started[0]), *(container(workloads()[name])["command"] for name in ("serve", "serve-gpu"))]
    for command in commands:
        assert command[0] == "onediff" and "0.0.0.0" in command and "8000" in command
        answer = CliRunner().invoke(app, [*command[1:], "--help"])
        assert answer.exit_code == 0, answer.output
