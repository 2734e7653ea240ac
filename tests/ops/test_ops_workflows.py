"""The workflows of .github: rules of ours that hold whatever the linters think of them (those run in scripts/lint)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    parts: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    parts["on"] = parts.pop(True)  # `on` is a truth value in YAML 1.1, which is what PyYAML reads
    return parts


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def test_these_are_all() -> None:
    assert [path.name for path in WORKFLOWS] == ["checks.yaml", "deploy.yaml", "drift.yaml", "reap.yaml"]


@each
def test_every_action_is_pinned_by_commit_and_says_its_version(path: Path) -> None:
    used = re.findall(r"\buses:\s*(.*)", path.read_text(encoding="utf-8"))
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line)] == []


def test_one_action_has_one_pin_and_few_are_used() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    pins = {name: set(re.findall(rf"{name}@(\S+ # \S+)", text)) for name in set(re.findall(r"uses: (\S+)@", text))}
    assert {name: len(found) for name, found in pins.items()} == {"actions/checkout": 1}


@each
def test_nothing_is_allowed_that_a_job_does_not_name(path: Path) -> None:
    assert read(path)["permissions"] == {}
    for name, job in jobs(path).items():
        assert job["permissions"], name
        assert job["permissions"].items() <= {"contents": "read", "packages": "read"}.items() | {("packages", "write")}
        writing = job["permissions"].get("packages") == "write"
        assert writing == (path.name == "deploy.yaml"), name


@each
def test_every_job_ends_by_itself_on_a_named_system(path: Path) -> None:
    for name, job in jobs(path).items():
        assert 0 < job["timeout-minutes"] <= 120, name
        assert re.fullmatch(r"ubuntu-\d\d\.\d\d", job["runs-on"]), name


@each
def test_no_token_stays_in_the_checkout(path: Path) -> None:
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert len(checkouts) == len(jobs(path))
    assert all(step["with"] == {"persist-credentials": False} for step in checkouts)


@each
def test_a_script_stops_at_its_first_fault_and_gets_values_through_the_environment_only(path: Path) -> None:
    assert read(path)["defaults"] == {"run": {"shell": "bash -eu -o pipefail {0}"}}
    assert [step["run"] for step in steps(path) if "${{" in step.get("run", "")] == []
    assert [step for step in steps(path) if "shell" in step] == []


@each
def test_a_secret_is_seen_by_one_step_of_a_job_with_an_environment(path: Path) -> None:
    workflow = read(path)
    assert "secrets." not in str(workflow.get("env", {}))
    for name, job in workflow["jobs"].items():
        assert "secrets." not in str(job.get("env", {})), name
        holders = [step for step in job["steps"] if "secrets." in str(step)]
        assert len(holders) <= 1, name
        assert not holders or job["environment"] in {"plan", "production", "reap"}, name
        # Only where it is the value of a variable, and only the ones that the page tells to set.
        told = set(re.findall(r"secrets\.(\w+)", str(holders)))
        assert told <= {"RUNPOD_API_KEY", "HF_TOKEN"}
        for step in holders:
            assert not told - set(step["env"]), name


@each
def test_no_event_that_runs_foreign_code_with_our_secrets(path: Path) -> None:
    events = read(path)["on"]
    assert set(events) <= {"pull_request", "push", "schedule", "workflow_dispatch"}
    if "pull_request" in events:
        for name, job in jobs(path).items():
            assert ("environment" in job) == ("head.repo.full_name == github.repository" in job.get("if", "")), name


@each
def test_what_is_run_can_be_typed_on_a_laptop(path: Path) -> None:
    known = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE)) | {"plan", "deploy", "reap"}
    verbs = {
        verb
        for step in steps(path)
        for verb in re.findall(r"(?:^|\$\()\s*make ([a-z-]+)", step.get("run", ""), re.MULTILINE)
    }
    assert verbs
    assert verbs <= known
    programs = {
        word
        for step in steps(path)
        for line in step.get("run", "").splitlines()
        for word in re.findall(r"^\s*(?:\w+=\$\()?([\w./-]+)(?= |$)", line)
    }
    assert programs <= {"make", "docker", "echo", "export"}


def test_a_deploy_is_never_cut_short_and_deploys_just_what_was_pushed() -> None:
    workflow = read(ROOT / ".github" / "workflows" / "deploy.yaml")
    assert workflow["on"]["push"]["branches"] == ["main"]
    assert workflow["concurrency"] == {"group": "deploy", "cancel-in-progress": False}
    image, deploy = workflow["jobs"]["image"], workflow["jobs"]["deploy"]
    assert "environment" not in image
    assert deploy["environment"] == "production"
    assert deploy["needs"] == "image"
    assert deploy["env"] == {"IMAGE": "${{ needs.image.outputs.image }}"}
    assert "refs/heads/main" in image["if"]
    assert [step["run"] for step in deploy["steps"] if "make" in step.get("run", "")] == [
        "make deploy STRICT=1",
        "make push MARK=production",
    ]


def test_a_change_to_what_is_deployed_starts_a_deploy() -> None:
    paths = read(ROOT / ".github" / "workflows" / "deploy.yaml")["on"]["push"]["paths"]
    for path in paths:
        assert list(ROOT.glob(path.removesuffix("/**"))), f"{path} does not exist"
    # All that the worker's image is built from.
    bake = (ROOT / "docker-bake.hcl").read_text(encoding="utf-8")
    (contexts,) = re.findall(r'contexts = \{\n((?:    \w+ += "\S+"\n)+)', bake)
    built_from = ["docker-bake.hcl", "images/worker", *re.findall(r'"(\S+)"', contexts)]
    whole = [path.removesuffix("/**") for path in paths]
    assert [part for part in built_from if not any(f"{part}/".startswith(f"{path}/") for path in whole)] == []


def test_drift_fails_on_changes_and_a_pull_request_does_not() -> None:
    drift, checks = ((ROOT / ".github" / "workflows" / name).read_text() for name in ("drift.yaml", "checks.yaml"))
    assert "make plan AS=markdown STRICT=1 >>" in drift
    assert "make plan AS=markdown >>" in checks


def test_the_page_names_every_environment_secret_and_variable() -> None:
    page = (ROOT / "docs" / "gitops.md").read_text(encoding="utf-8")
    text = "".join(path.read_text(encoding="utf-8") for path in WORKFLOWS)
    named = set(re.findall(r"(?:secrets|vars)\.(\w+)", text)) | set(re.findall(r"^    environment: (\w+)$", text, re.M))
    assert named >= {"REGISTRY", "RUNPOD_API_KEY", "HF_TOKEN", "FLASH_KERNEL", "production", "plan", "reap"}
    assert [name for name in named if f"`{name}`" not in page] == []
    assert "60 days" in page


def test_dependabot_looks_at_every_image() -> None:
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text(encoding="utf-8"))["updates"]
    images = {f"/{path.parent.relative_to(ROOT)}" for path in (ROOT / "images").glob("*/Dockerfile")}
    kinds = {update["package-ecosystem"]: update for update in updates}
    assert set(kinds) == {"github-actions", "docker", "pip"}
    assert set(kinds["docker"]["directories"]) == set(kinds["pip"]["directories"]) == images
