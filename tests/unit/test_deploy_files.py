"""The files of `deploy/` and `compose.yaml`: their commands, settings, ports and probes exist."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import typer.main
import yaml  # type: ignore[import-untyped]  # its types are a package of their own, which is not pinned
from starlette.routing import Route

from receiver.app import create_app
from receiver.cli import app
from receiver.config_file import variable_name
from receiver.setting_fields import SettingFields
from receiver.settings import Settings

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
KUBERNETES = ROOT / "deploy/kubernetes"
OTHERS = {"RECEIVER_CONFIG", "RABBITMQ_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
"""Variables that are no settings: of the file, and of clients."""


def parse(words: list[str]) -> dict[str, Any]:
    """Return the options of a command; fail if the command line rejects it."""
    command: Any = typer.main.get_command(app)
    context = command.make_context("receiver", list(words), resilient_parsing=False)
    name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
    found: dict[str, Any] = command.make_context(name, rest, parent=context).params
    return found


def known_variables() -> set[str]:
    """Return the names of all settings."""
    return {variable_name(field) for field in SettingFields.model_fields} | OTHERS


def manifests(kind: str) -> list[dict[str, Any]]:
    """Return the objects of a kind."""
    paths = sorted(KUBERNETES.glob("*.yaml"))
    documents = [each for path in paths for each in yaml.safe_load_all(path.read_text(encoding="utf-8"))]
    return [each for each in documents if each["kind"] == kind]


def pods() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return the name, the pod and the only container of each workload."""
    for each in (*manifests("Deployment"), *manifests("Job")):
        pod = each["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        yield each["metadata"]["name"], pod, container


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The paths of the web application."""
    url = f"sqlite:///{tmp_path_factory.mktemp('paths') / 'receiver.db'}"
    settings = Settings.load(database_url=url, clipia_webhook_secret="whsec_0123456789abcdef0123456789abcdef")
    return {route.path for route in create_app(settings, worker=False).routes if isinstance(route, Route)}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_commands_of_the_receiver(path: Path) -> None:
    """Each command parses, its settings exist, and a stop has the time that work needs."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "=" in line and line[0] != "#"]
    pairs = [(name, value) for name, _, value in (line.partition("=") for line in lines)]
    (command,) = [value for name, value in pairs if name == "ExecStart"]
    program, *words = shlex.split(command.replace("%i", "9121"))
    assert Path(program).name == "receiver"
    parse(words)
    variables = {value.partition("=")[0] for name, value in pairs if name == "Environment"}
    assert variables <= known_variables()
    if words[0] != "migrate":
        assert ("TimeoutStopSec", "60") in pairs
        assert any(name == "After" and "receiver-migrate.service" in value for name, value in pairs)
    assert ("User", "receiver") in pairs
    assert ("NoNewPrivileges", "yes") in pairs


def test_units_are_valid() -> None:
    """`systemd-analyze verify` finds nothing but the program, which is not installed here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd is not installed")
    done = subprocess.run(
        [program, "verify", "--recursive-errors=no", "--man=no", *UNITS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in done.stderr.splitlines() if "receiver" in line]
    assert [line for line in ours if "/opt/receiver/bin/receiver is not executable" not in line] == []


def test_containers_of_kubernetes_start_commands_of_the_receiver(paths: set[str]) -> None:
    """Each command parses, and its ports are those of the container, its probes and its Service."""
    for name, pod, container in pods():
        options = parse(container["args"])
        ports = {each["name"]: each["containerPort"] for each in container.get("ports", [])}
        assert set(ports.values()) == {
            options[option] for option in ("port", "metrics_port") if options.get(option)
        }, name
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            probe = container.get(kind, {})
            if "httpGet" in probe:
                assert probe["httpGet"]["path"] in paths
                assert probe["httpGet"]["port"] in ports
            elif probe:
                program, *words = probe["exec"]["command"]
                assert program == "receiver"
                parse(words)
        if name != "receiver-migrate":
            assert "livenessProbe" in container
            # docs/deployment.md: the drain period and 35 seconds.
            (drain,) = [each["data"]["RECEIVER_DRAIN"] for each in manifests("ConfigMap")]
            assert pod["terminationGracePeriodSeconds"] >= float(drain) + 35


def test_pods_have_no_more_rights_than_they_need() -> None:
    """No root, no capability, a root that is read-only, and every volume that is mounted exists."""
    assert {name for name, _, _ in pods()} == {
        f"receiver-{part}" for part in ("internal", "migrate", "web", "worker")
    }
    for name, pod, container in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["automountServiceAccountToken"] is False, name
        rights = container["securityContext"]
        assert (rights["readOnlyRootFilesystem"], rights["capabilities"]) == (True, {"drop": ["ALL"]}), name
        mounted = {each["name"] for each in container["volumeMounts"]}
        assert mounted == {each["name"] for each in pod["volumes"]}, name
        assert container["resources"]["limits"]["memory"], name


def test_objects_of_kubernetes_find_each_other() -> None:
    """Selectors match labels of pods, targets of Services are ports, and variables are settings."""
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in manifests("Deployment")
    }
    ports = {name: {each["name"] for each in container.get("ports", [])} for name, _, container in pods()}
    for each in manifests("Deployment"):
        name = each["metadata"]["name"]
        assert each["spec"]["selector"]["matchLabels"] == labels[name]
    for service in manifests("Service"):
        (target,) = [name for name, found in labels.items() if found == service["spec"]["selector"]]
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[target]
    for budget in manifests("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] in labels.values()
    (secret,), (config,) = manifests("Secret"), manifests("ConfigMap")
    names = secret["stringData"].keys() | {name for name in config["data"] if name != "receiver.toml"}
    assert names <= known_variables()
    assert not any(secret["stringData"].values())
    for _, _, container in pods():
        assert [next(iter(each.values()))["name"] for each in container["envFrom"]] == ["receiver"] * 2


def test_variables_of_compose_are_settings() -> None:
    """A variable with a typo would be ignored."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    for row in services.values():
        if "build" in row:
            parse([str(word) for word in row["command"]])
            assert set(row["environment"]) <= known_variables()
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    named = set(re.findall(r"^(\w+)=", text, re.MULTILINE))
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text(encoding="utf-8")))
    assert named <= used


def test_the_example_of_the_file_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`receiver.toml.example` and the file in the ConfigMap are settings."""
    (config,) = manifests("ConfigMap")
    monkeypatch.setenv("RABBITMQ_PASSWORD", "0123456789abcdef")
    for text in (
        (ROOT / "receiver.toml.example").read_text(encoding="utf-8"),
        config["data"]["receiver.toml"],
    ):
        tmp_path.joinpath("receiver.toml").write_text(text)
        settings = Settings.load(clipia_webhook_secret="whsec_0123456789abcdef0123456789abcdef")
        assert [each.name for each in settings.all_destinations] == ["queue"]


def test_the_wheel_holds_what_is_read_at_run_time(tmp_path: Path) -> None:
    """Templates, static files, migrations and the mark of types: an image installs the wheel."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    package = ROOT / "receiver"
    read = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in read} <= names
    assert {"receiver/py.typed", "receiver/dashboard/templates/layout.html"} <= names
    assert [name for name in names if name.startswith("receiver/migrations/versions/0020")]
