"""The pages as a site: built with no warning and without a network, strict about links."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lightning
from tests.command.process import REPOSITORY

pytest.importorskip("furo")  # the extra [docs]
pytest.importorskip("myst_parser")

DOCS = REPOSITORY / "docs"


def build(source: Path, out: Path) -> subprocess.CompletedProcess:
    """`make docs` for these pages."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", DOCS, "-b", "html", source, out]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(DOCS, out)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_there_needs_no_network_and_links_to_files_of_the_repository(site):
    for page in DOCS.glob("*.md"):
        text = (site / f"{page.stem}.html").read_text()
        assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"(https?:[^\"]*)", text) == [], page.name
    assert re.search(r"<math[^>]*display=\"block\".*<mfrac>", (site / "idea.html").read_text(), re.S)
    links = re.findall(r'href="([^":#]*/configs/[^"]*)"', (site / "tasks.html").read_text())
    assert len(links) > 5
    assert all((site / link).resolve().exists() for link in links)


def test_every_public_name_is_in_one_of_two_references_and_every_field_with_its_docstring(site):
    text = (site / "reference.html").read_text()
    for field in dataclasses.fields(lora_lightning.LoRAConfig):
        assert f'id="loraconfig-{field.name.replace("_", "-")}"' in text, field.name
    assert "Rank of the update: A is (r, in), B is (out, r)." in text
    for key in ("huggingface-on-meta", "textclassificationdata-split-group-by", "checkpoints-save-every"):
        assert f'id="{key}"' in text
    in_configs = re.findall(r"^lora_lightning\.(\w+)$", (DOCS / "reference.md").read_text(), re.M)
    in_python = re.findall(r"^\.\. auto\w+:: (\w+)$", (DOCS / "api.md").read_text(), re.M)
    assert sorted([*in_configs, *in_python]) == sorted(lora_lightning.__all__)
    text = (site / "api.html").read_text()
    for name in in_python:
        assert f'id="lora_lightning.{name}"' in text, name
    assert 'id="lora_lightning.AdapterBank.rows"' in text


FAULTY = r"""# Title

[x](nowhere.md) [x](#nohere) [x](../configs/nowhere.yaml) ![x](nowhere.svg) $\nocommand{x}$
"""
FAULTS = ["nowhere", "nohere", "../configs/nowhere.yaml", "nowhere.svg", "nocommand", "isn't included in any toctree"]
"""What is said of a page, heading, file, picture and formula that are not there, and of a page in no toctree."""


def test_each_fault_of_a_page_fails_the_build(tmp_path):
    (tmp_path / "index.md").write_text(FAULTY)
    (tmp_path / "lost.md").write_text("# Lost\n")
    done = build(tmp_path, tmp_path / "out")
    assert done.returncode != 0
    assert [said for said in FAULTS if said not in done.stderr] == []
