"""deploy/: both descriptions hold to their schemas, contain no secret, and agree with `make services`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from flows.services import plan
from onediff.config import Runtime

DEPLOY = Path(__file__).parents[1] / "deploy"
KUBERNETES = "1.34"
SECRET = re.compile(r"PASSWORD|AUTH_STRING|SECRET|ACCESS_KEY")


def compose() -> dict[str, Any]:
    return dict(YAML(typ="safe").load((DEPLOY / "compose.yaml").read_text()))


def manifests() -> list[dict[str, Any]]:
    yaml = YAML(typ="safe")
    return [item for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")) for item in yaml.load_all(path.read_text())]


def containers() -> Iterator[dict[str, Any]]:
    for item in manifests():
        yield from item["spec"].get("template", {}).get("spec", {}).get("containers", []) if "spec" in item else []


def compose_schema() -> Any:
    vendored = resources.files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
    return json.loads(vendored.read_text(encoding="utf-8"))


def test_the_compose_file_holds_to_the_compose_specification() -> None:
    jsonschema.validate(compose(), compose_schema())


def test_a_wrong_compose_file_does_not() -> None:
    wrong = compose()
    wrong["services"]["mlflow"]["helthcheck"] = {}
    with pytest.raises(jsonschema.ValidationError, match="helthcheck"):
        jsonschema.validate(wrong, compose_schema())


@pytest.mark.parametrize("item", manifests(), ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_a_manifest_holds_to_the_schema_of_its_kind(item: dict[str, Any]) -> None:
    kubernetes_validate.validate(item, KUBERNETES, strict=True)
    assert item["kind"] == "Namespace" or item["metadata"]["namespace"] == "onediff"


def test_a_wrong_manifest_does_not() -> None:
    wrong = next(item for item in manifests() if item["kind"] == "StatefulSet")
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_secrets_come_from_the_environment_and_their_lack_stops_compose() -> None:
    found = [(key, value) for service in compose()["services"].values() for key, value in service["environment"].items()
             if SECRET.search(key)]
    assert len(found) > 8
    for key, value in found:
        assert re.fullmatch(r"\$\{\w+:\?.+\}|\$\{(AWS_\w+):-\}", value), key
    assert not re.search(r"//[^/\s]+:[^/@\s]+@", (DEPLOY / "compose.yaml").read_text())  # a password in an address


def test_manifests_refer_to_secrets_and_contain_none() -> None:
    assert "Secret" not in {item["kind"] for item in manifests()}
    found = [variable for container in containers() for variable in container["env"] if SECRET.search(variable["name"])]
    assert len(found) > 6
    assert all(variable["valueFrom"]["secretKeyRef"]["name"] == "onediff" for variable in found)
    asked = {variable["valueFrom"]["secretKeyRef"]["key"] for variable in found}
    command = (DEPLOY / "README.md").read_text()
    assert asked == set(re.findall(r"--from-literal=([\w-]+)=", command))


def test_both_servers_ask_for_a_password() -> None:
    servers = {container["name"]: container for container in containers()}
    for kind in (compose()["services"], servers):
        for name, key in (("prefect", "PREFECT_SERVER_API_AUTH_STRING"), ("mlflow", "MLFLOW_AUTH_ADMIN_PASSWORD")):
            env = kind[name].get("environment") or {variable["name"] for variable in kind[name]["env"]}
            assert key in env
        assert "basic-auth" in kind["mlflow"]["command"]


def test_images_are_pinned_and_containers_are_bounded_and_asked() -> None:
    images = [service["image"] for service in compose()["services"].values()] + [box["image"] for box in containers()]
    images += re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert all(re.search(r":\d+\.\d+", image) for image in images), images
    assert all(service["healthcheck"] for service in compose()["services"].values())
    for box in containers():
        assert box["livenessProbe"] and box["resources"]["limits"]["memory"]


def test_workers_serve_the_pools_of_make_services() -> None:
    pools = set(plan.pools(Runtime(device="cuda")))
    commands = [service["command"] for name, service in compose()["services"].items() if name.startswith("worker")]
    commands += [box["command"] for box in containers() if box["name"] == "worker"]
    assert len(commands) == 4
    assert {command[command.index("--pool") + 1] for command in commands} == pools
    gpu = [box for box in containers() if "nvidia.com/gpu" in box["resources"]["limits"]]
    assert ["onediff-gpu" in box["command"] for box in gpu] == [True]
