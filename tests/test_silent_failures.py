"""docs/silent-failures.md holds what benchmarks/silent_failures prints, and its judge can come out each way."""

import importlib.metadata
import re
import warnings

import pytest

from benchmarks.silent_failures.__main__ import VERSIONS
from benchmarks.silent_failures.harness import WAYS, Measured, cell, failures, judge, link
from tests.command.process import REPOSITORY

PAGE = (REPOSITORY / "docs" / "silent-failures.md").read_text(encoding="utf-8")
ROWS = {
    row[0]: row[1:] for row in re.findall(r"^\| `(\w+)`: (.*?) \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", PAGE, re.M)
}
SAME_VERSIONS = all(f"{name} {importlib.metadata.version(name)}" in PAGE for name in VERSIONS)


def test_the_page_lists_the_programs_with_their_threads_and_counts_its_rows():
    assert {name: (m.TITLE, link(m.THREAD)) for name, m in failures().items()} == {n: r[:2] for n, r in ROWS.items()}
    assert len(ROWS) >= 20
    for name, module in failures().items():
        place, _, number = module.THREAD.partition("#")
        assert re.search(rf"`{name}`", PAGE.partition("## What is adapted")[2]), name
        assert re.search(rf"https://github.com/{place}/(issues|pull)/{number}\)", PAGE), name
    for kind in ("right", "refused", "warned", "silently wrong"):
        counted = re.search(rf"^\| {kind} \| \| (\d+) \| (\d+) \| (\d+) \|$", PAGE, re.M)
        cells = zip(*[row[2:] for row in ROWS.values()], strict=True)
        assert [int(n) for n in counted.groups()] == [sum(c.strip("*").startswith(kind) for c in way) for way in cells]


@pytest.mark.parametrize("name", ["misspelt_target", "dropout_in_eval", "nan_adapter"])
def test_a_quick_one_comes_out_as_the_page_says(name):
    module = failures()[name]
    for way, said in zip(WAYS, ROWS[name][2:], strict=True):
        if way == "ours" or SAME_VERSIONS:  # others may mend theirs
            assert cell(judge(getattr(module, way), module.WARNS)) == said


def test_the_judge_goes_by_the_number_and_by_what_was_said_of_it():
    def told(right, text="", error=None):
        def run(folder):
            if text:
                warnings.warn(text, stacklevel=1)
            if error:
                raise error
            return Measured(right, "a number")

        return run

    assert judge(told(True, "the mane is long"), "mane").kind == "right"
    assert judge(told(False, "the mane is long"), "mane").kind == "warned"
    assert judge(told(False, "of something else"), "mane").kind == "silently wrong"
    refused = judge(told(True, error=ValueError("no mane\nand more")), "mane")
    assert (refused.kind, refused.said) == ("refused", ["no mane"])
    with pytest.raises(TypeError):  # the program's own mistake is no outcome
        judge(told(True, error=TypeError("a slip")), "mane")
