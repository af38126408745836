"""What infra/ says is what the program knows: its commands, options, settings, ports and times."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import hcl2
import pytest
import typer
import yaml

from flows.cli import app
from flows.deployments import WORK_POOL
from tasks.scheduler import PORT
from tasks.settings import Settings
from tasks.worker import GRACE_SECONDS

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
COMPOSE: dict[str, Any] = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
DOCKERFILE = (INFRA / "Dockerfile").read_text()
MANIFESTS = [
    (path.name, document)
    for path in sorted((INFRA / "k8s").glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for document in yaml.safe_load_all(path.read_text())
]
PODS = {
    document["metadata"]["name"]: document["spec"]["template"]
    for _, document in MANIFESTS
    if document["kind"] in {"Deployment", "StatefulSet", "Job"}
}
IN_FILES = "prefect.server.concurrency.lease_storage.filesystem"
# Read by docker compose or by a script of ours, not by the program.
OURS = {"SCAIL_TLS_CA", "SCAIL_TLS_CERTIFICATE", "SCAIL_TLS_KEY"}


def container_of(pod: dict[str, Any]) -> dict[str, Any]:
    [container] = pod["spec"]["containers"]
    return container


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command of the program or of Prefect that a file starts, with where it stands."""
    for name, service in SERVICES.items():
        if "command" in service:
            yield f"compose {name}", service["command"]
            if "healthcheck" in service:
                yield f"compose {name} health", service["healthcheck"]["test"][1:]
    for name, pod in PODS.items():
        container = container_of(pod)
        if "args" in container:
            yield f"k8s {name}", container["args"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "exec" in container.get(probe, {}):
                yield f"k8s {name} {probe}", container[probe]["exec"]["command"]
    for line in re.findall(r"^(?:HEALTHCHECK .*)?CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE):
        yield "Dockerfile", json.loads(line)
    script = (INFRA / "runpod" / "pod.sh").read_text()
    yield "pod.sh", re.search(r"^exec (.*)$", script, flags=re.MULTILINE)[1].replace('"', "").split()


def guide_commands() -> Iterator[tuple[str, list[str]]]:
    """Every line of the guide that calls the program."""
    text = (INFRA / "README.md").read_text()
    for block in re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words and words[0] == "scail":
                yield f"guide: {line}", words


COMMANDS = [(where, command) for where, command in commands() if command[0] in {"scail", "prefect"}]
GUIDE_COMMANDS = list(guide_commands())


@pytest.mark.parametrize(("where", "command"), [*(each for each in COMMANDS if each[1][0] == "scail"), *GUIDE_COMMANDS])
def test_every_command_of_ours_is_one(where, command):
    context = click.Context(typer.main.get_command(app), info_name="scail")
    group = context.command

    name, subcommand, rest = group.resolve_command(context, command[1:])
    parsed = subcommand.make_context(name, list(rest), parent=context)

    assert parsed.command.name == command[1]


@pytest.mark.parametrize("words", [("server", "start"), ("worker", "start")])
def test_every_command_of_prefects_is_one(words):
    ours = [command for _, command in COMMANDS if command[0] == "prefect" and tuple(command[1:3]) == words]
    options = {word for command in ours for word in command if word.startswith("--")}
    run = [sys.executable, "-m", "prefect", *words, "--help"]

    described = subprocess.run(run, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "200"})

    assert ours
    assert all(option in described.stdout for option in options)


def environments() -> Iterator[tuple[str, str]]:
    """Every variable that a container finds, with where it is set."""
    for name, service in SERVICES.items():
        yield from ((f"compose {name}", variable) for variable in service.get("environment", {}))
    for file, document in MANIFESTS:
        if document["kind"] == "ConfigMap":
            yield from ((file, variable) for variable in document["data"])
    for name, pod in PODS.items():
        yield from ((f"k8s {name}", each["name"]) for each in container_of(pod).get("env", []))
    for block in re.findall(r"^ENV (.*?[^\\])$", DOCKERFILE, flags=re.MULTILINE | re.DOTALL):
        yield from (("Dockerfile", variable) for variable in re.findall(r"([A-Z_]+)=", block))
    template = json.loads((INFRA / "runpod" / "pod.json").read_text())
    yield from (("pod.json", variable) for variable in template["env"])


def test_every_setting_that_is_set_exists():
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings as PrefectSettings

    known = {f"SCAIL_{name.upper()}" for name in Settings.model_fields} | set(_get_settings_fields(PrefectSettings))

    wrong = {
        (where, variable)
        for where, variable in environments()
        if variable.startswith(("SCAIL_", "PREFECT_")) and variable.removesuffix("_FILE") not in known | OURS
    }

    assert not wrong


def test_every_variable_of_the_compose_file_is_explained_in_the_example():
    text = (INFRA / "compose.yaml").read_text()
    explained = set(re.findall(r"^([A-Z_]+)=", (INFRA / "example.env").read_text(), flags=re.MULTILINE))
    used = set(re.findall(r"\$\{([A-Z_]+)", text))

    assert used - explained <= {"SCAIL_COORDINATOR_IMAGE", "SCAIL_WORKER_IMAGE", "PREFECT_UI_API_URL"}
    assert explained <= used


def test_a_setting_left_empty_is_one_that_is_not_set(monkeypatch):
    monkeypatch.setenv("SCAIL_PRICE_PER_GPU_HOUR", "")
    monkeypatch.setenv("SCAIL_WEBHOOK_URL", "")

    assert (Settings().price_per_gpu_hour, Settings().webhook_url) == (None, None)


def test_whoever_is_told_of_certificates_finds_them():
    for name, service in SERVICES.items():
        mounted = any(isinstance(volume, dict) and volume["target"] == "/certificates" for volume in service["volumes"])
        assert mounted == ("SCAIL_TLS_DIR" in service.get("environment", {})), name
    for name, pod in PODS.items():
        container = container_of(pod)
        told = "envFrom" in container or any(each["name"] == "SCAIL_TLS_DIR" for each in container["env"])
        assert told == any(mount["mountPath"] == "/certificates" for mount in container["volumeMounts"]), name


def test_ports_pool_and_addresses_agree():
    config = next(document["data"] for _, document in MANIFESTS if document["kind"] == "ConfigMap")
    services = {d["metadata"]["name"]: d["spec"]["ports"][0]["port"] for _, d in MANIFESTS if d["kind"] == "Service"}
    environment = SERVICES["worker"]["environment"]
    coordinators = [SERVICES["coordinator"]["command"], container_of(PODS["coordinator"])["args"]]

    assert services == {"scheduler": PORT, "server": 4200, "postgres": 5432}
    for said in (config, environment):
        assert said["SCAIL_WORKERS"] == f"tls://scheduler:{PORT}"
        assert said["PREFECT_API_URL"] == "http://server:4200/api"
    assert f"SCAIL_WORKERS=tls://scheduler:{PORT}" in DOCKERFILE
    for command in (SERVICES["scheduler"]["command"], container_of(PODS["scheduler"])["args"]):
        assert command[command.index("--port") + 1] == str(PORT)
    assert all(command[command.index("--pool") + 1] == WORK_POOL for command in coordinators)


def test_a_worker_has_the_time_that_its_clips_need():
    in_compose = int(SERVICES["worker"]["stop_grace_period"].removesuffix("s"))
    in_pods = PODS["worker"]["spec"]["terminationGracePeriodSeconds"]

    assert GRACE_SECONDS < 25 <= min(in_compose, in_pods)


def test_nothing_of_compose_is_open_and_everything_comes_back():
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${SCAIL_SCHEDULER_BIND:-127.0.0.1}:")), name
        assert service["restart"] == ("on-failure:10" if name == "deploy" else "always")
        assert "healthcheck" in service or name == "deploy"
        assert "password" not in json.dumps(service.get("environment", {})).replace("_password", "").lower().replace(
            "password_file", ""
        ), name
        for other, condition in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if other == "deploy" else "service_healthy"
            assert condition["condition"] == expected


def test_a_restart_of_the_server_takes_no_run_its_place():
    leases = {"name": "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE", "value": IN_FILES}
    claims = {d["metadata"]["name"] for _, d in MANIFESTS if d["kind"] == "PersistentVolumeClaim"}
    [claimed] = [volume for volume in PODS["server"]["spec"]["volumes"] if volume["name"] == "home"]
    [kept] = [each for each in SERVICES["server"]["volumes"] if each["target"] == "/var/lib/scail"]

    assert SERVICES["server"]["environment"][leases["name"]] == leases["value"]
    assert leases in container_of(PODS["server"])["env"]
    assert kept["type"] == "volume"
    assert kept["source"] in COMPOSE["volumes"]
    assert claimed["persistentVolumeClaim"]["claimName"] in claims
    for guide in (INFRA / "README.md", ROOT / "docs" / "ways-in.md"):
        assert f"export {leases['name']}={leases['value']}" in guide.read_text()


def test_images_are_pinned_and_their_stages_exist():
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, flags=re.MULTILINE))
    bases = re.findall(r"^ARG \w+_IMAGE=(\S+)$", DOCKERFILE, flags=re.MULTILINE)
    built = [service["build"]["target"] for service in SERVICES.values() if "build" in service]

    assert set(built) <= stages
    assert all(re.search(r":\d+\.\d+", image) for image in [*bases, SERVICES["postgres"]["image"]])
    assert "constraint constraints.txt" in DOCKERFILE
    for final in ("worker", "serverless", "coordinator"):
        assert final in stages


def test_what_the_images_copy_is_sent_to_the_builder():
    ignored = (INFRA / "Dockerfile.dockerignore").read_text().split()
    copied = re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.+) \S+$", DOCKERFILE, flags=re.MULTILINE)

    for source in {name for line in copied for name in line.split()}:
        assert f"!{source}" in ignored
        assert (ROOT / source).exists()


@pytest.mark.parametrize("name", sorted(PODS))
def test_every_pod_runs_without_rights(name):
    pod = PODS[name]
    spec, container = pod["spec"], container_of(pod)

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False
    assert container["resources"]["requests"]
    assert container["resources"]["limits"]["memory"]


def test_kubernetes_files_refer_to_what_is_there():
    kustomization = yaml.safe_load((INFRA / "k8s" / "kustomization.yaml").read_text())
    there = {(document["kind"], document["metadata"]["name"]) for _, document in MANIFESTS}
    images = {image["name"] for image in kustomization["images"]}
    labels = {pod["metadata"]["labels"]["app"] for pod in PODS.values()}

    assert sorted(kustomization["resources"]) == sorted({name for name, _ in MANIFESTS})
    for name, pod in PODS.items():
        spec, container = pod["spec"], container_of(pod)
        assert ("ServiceAccount", spec.get("serviceAccountName", "worker")) in there
        assert container["image"] in images | {"postgres:16.10-bookworm"}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claimed = {"data"} if name == "postgres" else set()
        assert mounted == {volume["name"] for volume in spec["volumes"]} | claimed
        for source in container.get("envFrom", []):
            assert ("ConfigMap", source["configMapRef"]["name"]) in there
    named = re.findall(r"\{app: ([a-z]+)\}", json.dumps([d for _, d in MANIFESTS]).replace('"', ""))
    in_lists = {label for _, d in MANIFESTS for label in re.findall(r'"values": \[([^\]]*)\]', json.dumps(d))}
    assert set(named) <= labels
    assert {name.strip(' "') for names in in_lists for name in names.split(",")} <= labels


def test_the_secrets_that_pods_need_are_those_that_the_guide_makes():
    text = "".join(path.read_text() for path in (INFRA / "k8s").glob("*.yaml"))
    needed = set(re.findall(r"secretKeyRef: \{name: ([\w-]+)", text)) | set(re.findall(r"secretName: ([\w-]+)", text))
    made = set(re.findall(r"create secret generic ([\w-]+)", (INFRA / "README.md").read_text()))

    assert needed == made


def test_what_the_guide_says_that_one_sees_is_what_the_program_says():
    text = (INFRA / "README.md").read_text()
    sources = "".join(path.read_text() for top in ("tasks", "scail", "flows") for path in (ROOT / top).rglob("*.py"))
    rows = re.findall(r"^\| (.*?) \|", text[text.index("## When a run is red") :], flags=re.MULTILINE)
    theirs = {"database is locked"}  # SQLite's

    quoted = {words for row in rows for words in re.findall(r"`([^`]+)`", row)} - theirs

    assert len(quoted) > 15
    missing = [words for words in quoted if words not in sources and not words.startswith(("scail ", "make "))]
    assert [words for words in missing if not (ROOT / words).exists()] == []


def entrypoint(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    run = ["sh", str(INFRA / "entrypoint.sh"), *command]
    return subprocess.run(
        run, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]} | environment
    )


def test_a_secret_that_is_a_file_becomes_a_variable(tmp_path):
    (tmp_path / "auth").write_text("scail:a b$c")
    print_it = ("printenv", "PREFECT_API_AUTH_STRING")

    read = entrypoint({"PREFECT_API_AUTH_STRING_FILE": str(tmp_path / "auth")}, *print_it)
    missing = entrypoint({"PREFECT_API_AUTH_STRING_FILE": str(tmp_path / "none")}, *print_it)

    assert read.stdout == "scail:a b$c\n"
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr


def test_the_entrypoint_knows_every_secret_of_the_compose_file():
    script = (INFRA / "entrypoint.sh").read_text()
    files = {
        variable.removesuffix("_FILE")
        for name, service in SERVICES.items()
        for variable in service.get("environment", {})
        if variable.endswith("_FILE") and name != "postgres"
    }

    assert all(re.search(rf"\b{name}\b", script) for name in files)


def test_secrets_are_made_once_and_are_read_by_their_owner_alone(tmp_path):
    script = tmp_path / "infra" / "prepare-secrets.sh"
    script.parent.mkdir()
    shutil.copy(INFRA / "prepare-secrets.sh", script)
    (tmp_path / "scail").write_text(f'#!/bin/sh\nexec {sys.executable} -m flows.cli "$@"\n')
    (tmp_path / "scail").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    make = [str(script), "render-1.studio"]

    subprocess.run(make, check=True, capture_output=True, env=environment)
    files = {path: path.read_bytes() for path in script.parent.glob("secrets/**/*") if path.is_file()}
    subprocess.run(make, check=True, capture_output=True, env=environment)

    assert {path.name for path in files} == {
        "postgres_password",
        "prefect_auth",
        "ca.key",
        "ca.pem",
        "node.pem",
        "node.key",
    }
    assert all(path.read_bytes() == data for path, data in files.items())
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    assert all(not data.endswith(b"\n") for path, data in files.items() if path.suffix == "")


def test_a_pod_tells_the_scheduler_where_its_port_is_mapped_to(tmp_path):
    (tmp_path / "scail").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "scail").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SCAIL_TLS_DIR": str(tmp_path / "certificates"),
        "SCAIL_TLS_CA": "ca",
        "SCAIL_TLS_CERTIFICATE": "certificate",
        "SCAIL_TLS_KEY": "key",
    }
    mapped = {"RUNPOD_PUBLIC_IP": "203.0.113.7", "RUNPOD_TCP_PORT_9000": "31234"}
    run = ["sh", str(INFRA / "runpod" / "pod.sh")]

    said = subprocess.run(run, capture_output=True, text=True, check=True, env=environment | mapped)
    unmapped = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)

    assert said.stdout.split() == ["worker", "--port", "9000", "--contact-address", "tls://203.0.113.7:31234"]
    assert stat.S_IMODE((tmp_path / "certificates" / "node.key").stat().st_mode) == 0o600
    assert (tmp_path / "certificates" / "ca.pem").read_text() == "ca\n"
    assert unmapped.returncode == 2


def test_terraform_files_parse_and_refer_to_what_they_declare():
    sys.path.insert(0, str(INFRA / "terraform"))
    try:
        import check
    finally:
        sys.path.pop(0)

    assert check.check(INFRA / "terraform") == []
    assert {"var.project", "google_storage_bucket.inputs", "data.google_project.this", "local.pubsub_agent"} <= {
        name for path in (INFRA / "terraform").glob("*.tf") for name in check.declarations(hcl2.loads(path.read_text()))
    }


def test_a_terraform_file_with_a_mistake_is_named(tmp_path):
    sys.path.insert(0, str(INFRA / "terraform"))
    try:
        import check
    finally:
        sys.path.pop(0)
    (tmp_path / "a.tf").write_text('resource "google_pubsub_topic" "a" {\n  name = var.missing\n}\n')
    (tmp_path / "b.tf").write_text('resource "google_pubsub_topic" {{\n')

    problems = check.check(tmp_path)

    assert any("a.tf: var.missing is declared nowhere" in problem for problem in problems)
    assert any("b.tf" in problem for problem in problems)


def test_terraform_gives_rights_to_buckets_and_to_nothing_larger():
    text = "".join(path.read_text() for path in (INFRA / "terraform").glob("*.tf"))
    roles = set(re.findall(r'role\s+= "roles/([\w.]+)"', text))

    assert "google_project_iam" not in text
    assert roles == {
        "storage.objectViewer",
        "storage.objectUser",
        "storage.objectCreator",
        "pubsub.publisher",
        "pubsub.subscriber",
        "iam.workloadIdentityUser",
    }


def test_terraforms_buckets_are_those_of_the_kubernetes_files():
    config = next(document["data"] for _, document in MANIFESTS if document["kind"] == "ConfigMap")
    outputs = (INFRA / "terraform" / "outputs.tf").read_text()

    for name in ("SCAIL_OUTPUT", "SCAIL_INBOX", "SCAIL_MANIFESTS"):
        kind, folder = re.search(
            rf'{name}\s+= "gs://\$\{{google_storage_bucket\.(\w+)\.name\}}/(\w+)"', outputs
        ).groups()
        assert config[name] == f"gs://PROJECT-scail-{kind}/{folder}"
