"""The overlays of a project are those of `configs/`, written once."""

import pytest

from tests.template_overlays import COPIED, THERE, of_a_project


@pytest.mark.parametrize("name", COPIED)
def test_an_overlay_of_the_template_is_that_of_configs(name):
    assert (THERE / f"{name}.jinja").read_text() == of_a_project(name), "python -m tests.template_overlays"


def test_the_template_has_no_other_overlays_than_these_and_a_projects_own():
    own = {"experiment.yaml.jinja", "own.yaml.jinja", "{{ offline_yaml }}.jinja"}
    own |= {"experiments/wider.yaml.jinja", "logger/tensorboard.yaml.jinja"}
    assert {str(p.relative_to(THERE)) for p in THERE.rglob("*.jinja")} == own | {f"{name}.jinja" for name in COPIED}
