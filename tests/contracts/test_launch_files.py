"""The launch files are valid for the tools that read them, closed by default, and up to date.

The file for `ray up` goes through Ray's own validation and preparation, and launches machines in a
simulated AWS; the RayJob is checked against KubeRay's fields and Kubernetes' schemas; the Slurm
script runs on a real Slurm cluster. None of these tests uses a real cloud.
"""

import copy
import json
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import pytest
import tyro
import yaml
from moto import mock_aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from study.config import StudyConfig
from tests.support import ROOT
from tests.support.servers import slurm

LAUNCH = ROOT / "study" / "launch"
NAMES = ("aws.yaml", "aws-iam.yaml", "kuberay.yaml", "slurm.sh", "Dockerfile")
FILES = tuple(LAUNCH / name for name in NAMES)
GUIDE = ROOT / "docs" / "cluster.md"
STUDIES = (LAUNCH / "aws.yaml", LAUNCH / "kuberay.yaml", LAUNCH / "slurm.sh", GUIDE)
BIN = Path(sys.executable).parent

AWS: dict[str, Any] = yaml.safe_load((LAUNCH / "aws.yaml").read_text())
KUBERAY: list[dict[str, Any]] = list(yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text()))
RAYJOB = next(one for one in KUBERAY if one["kind"] == "RayJob")
RAYJOB_SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "kuberay-1.6-rayjob.json").read_text())

Spoil = Callable[[Any], object]


# ------------------------------------------------------------------------------------- all files


def test_every_launch_file_is_covered() -> None:
    assert set(LAUNCH.iterdir()) == set(FILES)


@pytest.mark.parametrize("path", [*FILES, GUIDE], ids=lambda path: path.name)
def test_launch_file_contains_no_secret(path: Path) -> None:
    text = path.read_text()
    secret = (
        r"AKIA[0-9A-Z]{12,}|PRIVATE KEY|[0-9a-fA-F]{32,}|(?i:secret_?access_?key|password)\s*[:=]"
        r"|RAY_AUTH_TOKEN\s*[:=]\s*\S"
    )
    assert not re.findall(secret, text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_launch_file_states_cost_and_what_to_edit(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^# (.*[.:] )?Cost", text, re.M) or "Costs nothing" in text
    assert "Edit" in text or "EDIT" in text


def studies(path: Path) -> list[list[str]]:
    """Return the arguments of each `run_study.py` command in a file."""
    text = re.sub(r"\\\n", " ", path.read_text())
    text = re.sub(r"\n[# ]*(?=--)", " ", text)
    found = re.findall(r"run_study\.py((?: +(?:--[\w-]+|\"[^\"\n]*\"|[\w$/:.\-]+))+)", text)
    return [words for one in found if (words := shlex.split(one))[0].startswith("--")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_studies_use_existing_options(path: Path) -> None:
    known = {f"--{field.name.replace('_', '-')}" for field in fields(StudyConfig)}
    assert studies(path)
    for words in studies(path):
        unknown = [word for word in words if word.startswith("--") and word not in known]
        assert not unknown
        config = tyro.cli(StudyConfig, args=words)
        # Launch files may restart by themselves, so they must resume; the guide's are typed.
        assert path == GUIDE or config.dry_run or (config.resume and config.name)


def test_versions_match_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["tool"]["uv"]["constraint-dependencies"]
    assert f"ray=={RAYJOB['spec']['rayClusterSpec']['rayVersion']}" in pins
    aws, image = (LAUNCH / "aws.yaml").read_text(), (LAUNCH / "Dockerfile").read_text()
    assert re.findall(r"uv==([\d.]+)", aws) == re.findall(r"uv==([\d.]+)", image)
    assert "--python 3.11 " in aws
    assert "FROM python:3.11-" in image
    groups = set(project["dependency-groups"])
    assert set(re.findall(r"--group ([\w-]+)", aws + image)) <= groups


def ray_start(words: list[str]) -> dict[str, Any]:
    """Parse arguments as `ray start` does; an unknown one is an error."""
    return start.make_context("start", words).params


# --------------------------------------------------------------------------------------------- AWS


def on_aws(config: dict[str, Any], home: Path) -> list[Any]:
    """Do what `ray up` does before the first ssh, in a simulated AWS; return the machines."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    region = config["provider"]["region"]
    iam, ec2 = boto3.client("iam"), boto3.resource("ec2", region_name=region)
    for name in instance_profiles():
        iam.create_instance_profile(InstanceProfileName=name)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    prepared = prepare_config(config)
    validate_config(prepared)
    prepared = AWSNodeProvider.bootstrap_config(prepared)
    prepared = AWSNodeProvider.fillout_available_node_types_resources(prepared)
    assert (home / ".ssh").is_dir()
    provider = AWSNodeProvider(prepared["provider"], prepared["cluster_name"])
    for name, node in prepared["available_node_types"].items():
        provider.create_node(node["node_config"], {"ray-user-node-type": name}, 1)
    return list(ec2.instances.all())


def instance_profiles() -> list[str]:
    """Return the instance profiles that aws-iam.yaml creates."""
    text = (LAUNCH / "aws-iam.yaml").read_text()
    return re.findall(r"InstanceProfileName: (\S+)", text)


def from_anywhere(machine: Any) -> list[tuple[Any, Any]]:
    """Return the ports of a machine that are open beyond its own security group."""
    ec2 = boto3.resource("ec2", region_name=AWS["provider"]["region"])
    own = {group["GroupId"] for group in machine.security_groups}
    return [
        (rule.get("FromPort"), rule.get("ToPort"))
        for group in own
        for rule in ec2.SecurityGroup(group).ip_permissions
        if rule["IpRanges"]
        or rule["Ipv6Ranges"]
        or rule["PrefixListIds"]
        or {pair["GroupId"] for pair in rule["UserIdGroupPairs"]} - own
    ]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", AWS["provider"]["region"])
    monkeypatch.chdir(ROOT)
    with mock_aws():
        yield tmp_path


def test_ray_up_launches_a_closed_head_and_spot_workers(aws: Path) -> None:
    machines = on_aws(copy.deepcopy(AWS), aws)

    def kind(machine: Any) -> str:
        return str({t["Key"]: t["Value"] for t in machine.tags}["ray-user-node-type"])

    head, gpu = sorted(machines, key=kind, reverse=True)
    assert (kind(head), kind(gpu)) == ("head", "gpu")
    assert head.instance_lifecycle is None  # on demand
    assert gpu.instance_lifecycle == "spot"
    for machine in machines:
        assert from_anywhere(machine) == [(22, 22)]
        assert machine.metadata_options["HttpTokens"] == "required"
    assert head.iam_instance_profile["Arn"].endswith("/dropout-study-head")
    assert gpu.iam_instance_profile["Arn"].endswith("/dropout-study-worker")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.update(idle_timeout="5"), "idle_timeout"),
        (lambda c: c.update(max_workers="four"), "'four' is not of type"),
        (lambda c: c.update(head_node_type="haed"), "head_node_type"),
        (
            lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": 0.5}),
            "0.5 is not of type",
        ),
        (lambda c: c["available_node_types"]["gpu"].update(spot=True), "spot"),
        (lambda c: node(c).update(InstanceMarketOption={}), "InstanceMarketOption"),
        (lambda c: node(c).update(InstanceMarketOptions={"MarketType": 1}), "MarketType"),
        (lambda c: node(c).update(IamInstanceProfile={"Name": "nobody"}), "nobody"),
    ],
)
def test_invalid_file_for_ray_up_is_refused(spoil: Spoil, message: str, aws: Path) -> None:
    config = copy.deepcopy(AWS)
    spoil(config)
    with pytest.raises(Exception, match=message):
        on_aws(config, aws)


def test_open_port_is_detected(aws: Path) -> None:
    config = copy.deepcopy(AWS)
    port = {"FromPort": 8265, "ToPort": 8265, "IpProtocol": "tcp"}
    rule = {**port, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    config["provider"]["security_group"] = {"GroupName": "open", "IpPermissions": [rule]}
    assert (8265, 8265) in from_anywhere(on_aws(config, aws)[0])


def node(config: dict[str, Any]) -> dict[str, Any]:
    """Return the node configuration of the GPU workers."""
    found: dict[str, Any] = config["available_node_types"]["gpu"]["node_config"]
    return found


def test_ray_on_aws_requires_the_token_and_exposes_nothing() -> None:
    commands = AWS["head_start_ray_commands"] + AWS["worker_start_ray_commands"]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token ray start" in command
        ray_start(shlex.split(command.partition("ray start")[2]))
    assert (
        ray_start(shlex.split(starts[0].partition("ray start")[2]))["dashboard_host"] == "127.0.0.1"
    )
    assert AWS["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("export RAY_AUTH_MODE=token" in command for command in AWS["setup_commands"])
    assert "security_group" not in AWS["provider"]
    assert "docker" not in AWS
    head = AWS["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0}
    assert AWS["available_node_types"]["gpu"]["min_workers"] == 0


def test_files_that_ray_up_copies_exist() -> None:
    mounts = {k: v for k, v in AWS["file_mounts"].items() if not v.startswith("~")}
    assert all((ROOT / path).exists() for path in mounts.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in project["packages"]["find"]["include"]}
    assert packages | {"pyproject.toml", "run_study.py"} == set(mounts.values())


def lint(*command: str) -> None:
    done = subprocess.run([str(BIN / command[0]), *command[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_roles_are_a_valid_stack(tmp_path: Path) -> None:
    text = (LAUNCH / "aws-iam.yaml").read_text()
    lint("cfn-lint", str(LAUNCH / "aws-iam.yaml"))
    # The policy lets the head terminate only the machines of this cluster.
    assert f"""ray-cluster-name": {AWS["cluster_name"]}}}""" in text
    kinds = AWS["available_node_types"].values()
    used = {kind["node_config"]["IamInstanceProfile"]["Name"] for kind in kinds}
    assert used == set(instance_profiles())
    spoilt = tmp_path / "spoilt.yaml"
    spoilt.write_text(text.replace("Effect: Allow", "Efect: Allow", 1))
    with pytest.raises(AssertionError, match="Efect"):
        lint("cfn-lint", str(spoilt))


# ------------------------------------------------------------------------------------------ KubeRay


def check_kubernetes(documents: list[dict[str, Any]]) -> None:
    """Raise on whatever KubeRay or Kubernetes would refuse, including unknown fields."""
    for document in documents:
        if document["kind"] != "RayJob":
            kubernetes_validate.validate(document, "1.37", strict=True)
            continue
        jsonschema.validate(document, RAYJOB_SCHEMA)
        spec = document["spec"]
        cluster = spec["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for template in (spec["submitterPodTemplate"], *(group["template"] for group in groups)):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
            kubernetes_validate.validate(pod, "1.37", strict=True)
        for group in groups:
            ray_start([f"--{key}={value}" for key, value in group["rayStartParams"].items()])


def test_rayjob_is_valid() -> None:
    check_kubernetes(KUBERAY)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda job: job["spec"].update(backOffLimit=5), "backOffLimit"),
        (lambda job: job["spec"].update(ttlSecondsAfterFinished="600"), "'600' is not of"),
        (
            lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="on"),
            "'on' is not one of",
        ),
        (lambda job: workers(job).update(maxReplicas="4"), "'4' is not of type"),
        (lambda job: workers(job)["rayStartParams"].update({"num-gpus": 1}), "1 is not"),
        (lambda job: workers(job)["rayStartParams"].update({"num-gpu": "1"}), "num-gpu"),
        (lambda job: pod(job).update(nodeselector={}), "nodeselector"),
        (lambda job: pod(job)["containers"][0].pop("name"), "name"),
        (lambda job: pod(job)["tolerations"][0].update(key=1), "1 is not"),
    ],
)
def test_invalid_rayjob_is_refused(spoil: Spoil, message: str) -> None:
    job = copy.deepcopy(RAYJOB)
    spoil(job)
    with pytest.raises(Exception, match=message):
        check_kubernetes([job])


def test_invalid_network_policy_is_refused() -> None:
    policy = copy.deepcopy(next(one for one in KUBERAY if one["kind"] == "NetworkPolicy"))
    policy["spec"]["ingres"] = policy["spec"].pop("ingress")
    with pytest.raises(Exception, match="ingres"):
        check_kubernetes([policy])


def workers(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    return found


def pod(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = workers(job)["template"]["spec"]
    return found


def test_ray_on_kubernetes_requires_the_token_and_restricts_access() -> None:
    spec = RAYJOB["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP"
    assert head["enableIngress"] is False
    assert "headService" not in head
    assert head["rayStartParams"]["num-cpus"] == "0"
    offered = head["template"]["spec"]["containers"][0]["ports"]
    assert {port["containerPort"] for port in offered} == {6379, 8265}
    assert workers(RAYJOB)["minReplicas"] == 0
    assert pod(RAYJOB)["automountServiceAccountToken"] is False

    # Only the study's own pods have access, and the operator to the dashboard.
    policy = next(one["spec"] for one in KUBERAY if one["kind"] == "NetworkPolicy")
    label = policy["podSelector"]["matchLabels"]
    templates = [spec["submitterPodTemplate"], head["template"], workers(RAYJOB)["template"]]
    assert all(label.items() <= one["metadata"]["labels"].items() for one in templates)
    own, operator = policy["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": label}}]}
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert [peer["podSelector"]["matchLabels"] for peer in operator["from"]] == [
        {"app.kubernetes.io/name": "kuberay-operator"}
    ]
    assert policy["policyTypes"] == ["Ingress"]
    assert {one["kind"] for one in KUBERAY} == {"RayJob", "ServiceAccount", "NetworkPolicy"}


def test_image_contains_what_the_job_runs(tmp_path: Path) -> None:
    lint("hadolint", str(LAUNCH / "Dockerfile"))
    text = (LAUNCH / "Dockerfile").read_text()
    folder = re.findall(r"^WORKDIR (\S+)", text, re.M)[0]
    assert RAYJOB["spec"]["entrypoint"].startswith(f"python {folder}/run_study.py ")
    for path in set(AWS["file_mounts"].values()) - {"~/.ray/auth_token"}:
        assert re.search(rf"^COPY {re.escape(path)} ", text, re.M), path
    spoilt = tmp_path / "Dockerfile"
    spoilt.write_text(text.replace("WORKDIR /opt", "WORKDIR opt"))
    with pytest.raises(AssertionError, match="DL3000"):
        lint("hadolint", str(spoilt))


# -------------------------------------------------------------------------------------------- Slurm


def test_slurm_script_passes_shellcheck(tmp_path: Path) -> None:
    lint("shellcheck", str(LAUNCH / "slurm.sh"))
    spoilt = tmp_path / "slurm.sh"
    spoilt.write_text((LAUNCH / "slurm.sh").read_text().replace('"$secrets/ray.log"', "$secrets"))
    with pytest.raises(AssertionError, match="SC2086"):
        lint("shellcheck", str(spoilt))


@pytest.mark.integration
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())
def test_slurm_script_runs_ray_on_all_nodes_and_resumes_after_its_time_limit(
    tmp_path: Path,
) -> None:
    script = LAUNCH / "slurm.sh"
    (tmp_path / "slurm").mkdir()
    (tmp_path / ".venv").symlink_to(sys.prefix)
    small = ["--cpus-per-task=2", "--mem=2G"]
    with slurm.cluster(tmp_path / "slurm") as cluster:
        tried = cluster.run("sbatch", "--test-only", str(script))
        assert tried.returncode == 0, tried.stderr
        spoilt = tmp_path / "spoilt.sh"
        spoilt.write_text(script.read_text().replace("--gpus-per-node", "--gpu-per-node"))
        assert cluster.run("sbatch", "--test-only", str(spoilt)).returncode != 0

        command = ["python", str(ROOT / "tests" / "support" / "launched.py")]
        sent = cluster.run("sbatch", "--parsable", *small, str(script), *command, cwd=tmp_path)
        job = sent.stdout.strip()
        log = tmp_path / f"dropout-study-{job}.log"

        def wait_for(line: str) -> None:
            until = time.monotonic() + 200
            while not (log.exists() and line in log.read_text().splitlines()):
                assert time.monotonic() < until, log.read_text() if log.exists() else sent.stderr
                time.sleep(0.3)

        wait_for("waiting")
        printed = log.read_text()
        for line in (
            "gpus 2",
            "nodes 2",
            "token 600 of 700",
            "without token: refused",
            "wrong token: refused",
            "right token: 0",
        ):
            assert line in printed.splitlines(), printed
        # The signal that Slurm sends five minutes before the time limit.
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        wait_for("stopping")
        wait_for(f"slurm.sh: the time is over; job {job} is queued again")
        until = time.monotonic() + 90
        while cluster.field(job, "JobState") != "PENDING" and time.monotonic() < until:
            time.sleep(0.3)
        cluster.run("scontrol", "update", f"jobid={job}", "starttime=now")
        wait_for("resumed")
        until = time.monotonic() + 90
        while cluster.field(job, "JobState") in {"RUNNING", "COMPLETING"}:
            assert time.monotonic() < until
            time.sleep(0.3)
        assert cluster.field(job, "JobState") == "FAILED"
        assert cluster.field(job, "ExitCode") == "3:0"
        assert cluster.field(job, "Restarts") == "1"
    assert not list((tmp_path / "slurm" / "home" / ".ray").iterdir())  # the token is deleted
    assert not Path(f"/tmp/ray-{job}").exists()
