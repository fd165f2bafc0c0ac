"""Projects of every task, and a person who has told git who they are."""

import pytest

from lora_lightning.commands.new import new
from tests.new.projects import TASKS


@pytest.fixture(scope="session")
def projects(tmp_path_factory):
    """One of each task, with its defaults."""
    folder = tmp_path_factory.mktemp("projects")
    for task in TASKS:
        new(str(folder / f"for_{task.replace('-', '_')}"), task, license="MIT", author="Ann", git=False, defaults=True)
    return folder


@pytest.fixture(params=TASKS)
def project(request, projects, monkeypatch):
    """One of them, as the folder in which a person works."""
    folder = projects / f"for_{request.param.replace('-', '_')}"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def person(monkeypatch, tmp_path):
    """Someone who has told git who they are."""
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Ann\nemail = ann@example.org\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return config
