"""What the code host reads parses, and calls what is there: the workflow, the issue forms, the citation."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import dora_diffusion
from dora_diffusion.cli import COMMANDS

ROOT = Path(__file__).parents[2]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
STEPS = [(job, step) for job, body in WORKFLOW["jobs"].items() for step in body["steps"]]
FORMS = ("bug.yml", "feature.yml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def called(text: str) -> set[str]:
    """The make targets that a text calls."""
    return set(re.findall(r"\bmake (?:--no-print-directory )?([a-z][a-z-]*)", text))


def commands() -> str:
    return "\n".join(step.get("run", "") for _, step in STEPS)


def form(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE" / name).read_text())


def test_the_workflow_calls_what_the_makefile_has() -> None:
    assert called(commands()) == {"setup", "check", "docs", "browser", "test", "demo"}
    assert called(commands()) <= TARGETS


def test_the_workflow_may_read_only_and_pins_its_actions() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert WORKFLOW["concurrency"]["cancel-in-progress"] is True
    used = [step["uses"] for _, step in STEPS if "uses" in step]
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []
    assert "secrets." not in (ROOT / ".github/workflows/ci.yml").read_text()


def test_the_workflow_tests_every_python_that_the_project_names() -> None:
    named = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert WORKFLOW["jobs"]["test"]["strategy"]["matrix"]["python"] == named
    assert PROJECT["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize(
    "document", ["CONTRIBUTING.md", ".ci/run", "docs/releasing.md", ".github/pull_request_template.md"]
)
def test_documents_call_targets_that_there_are(document: str) -> None:
    text = (ROOT / document).read_text()
    assert (
        called(text if document == ".ci/run" else "\n".join(re.findall(r"`[^`]+`|^make .*", text, re.MULTILINE)))
        <= TARGETS
    )


def test_contributing_lists_every_target() -> None:
    listed = called((ROOT / "CONTRIBUTING.md").read_text())
    assert TARGETS - listed - {"browser"} == set()


@pytest.mark.parametrize("name", FORMS)
def test_issue_forms_have_what_the_code_host_asks_for(name: str) -> None:
    fields = form(name)
    assert {"name", "description", "body"} <= fields.keys()
    ids = [field["id"] for field in fields["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in fields["body"])


def test_an_issue_without_a_form_is_welcome_and_no_address_is_made_up() -> None:
    assert form("config.yml") == {"blank_issues_enabled": True}


def test_a_bug_report_asks_for_the_environment() -> None:
    (field,) = [field for field in form("bug.yml")["body"] if field["id"] == "environment"]
    assert "dora-diffusion env" in field["attributes"]["label"]
    assert field["validations"]["required"] is True
    spoken = re.findall(r"dora-diffusion (\w+)", (ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert set(spoken) <= COMMANDS.keys()


def test_the_citation_names_toolkit_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["title"] == "DoRA: Weight-Decomposed Low-Rank Adaptation"
    assert len(paper["authors"]) == 7
    assert "2402.09353" in (dora_diffusion.__doc__ or "")
    assert paper["url"].endswith("/2402.09353")


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"]
    holders = [
        str(path.relative_to(ROOT))
        for folder in ("dora_diffusion", "ui", "train_scripts")
        for path in (ROOT / folder).rglob("*.py")
        if f'"{dora_diffusion.__version__}"' in path.read_text()
    ]
    assert holders == ["dora_diffusion/_version.py"]
