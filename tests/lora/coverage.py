"""What the laws were held over in this run: kinds of layer, dtypes, families. `conftest.py` prints it at the end."""

import re

COVERED: dict[str, set[str]] = {"kinds": set(), "families": set(), "dtypes": set()}
COVERED |= {"families that travelled": set(), "options that travelled": set(), "directions": set()}


def note(*, dtype, report, family=None):
    """One model on which the laws held."""
    COVERED["dtypes"].add(str(dtype).removeprefix("torch."))
    COVERED["kinds"].update(re.sub(r"\[.*", " in parts", row.kind) for row in report.modules)
    if report.tokens:
        COVERED["kinds"].add("token rows")
    if family is not None:
        COVERED["families"].add(family)


def note_travel(*, family, options, direction):
    """One adapter that arrived, computing what it computed at home."""
    COVERED["families that travelled"].add(family)
    COVERED["options that travelled"].update(options)
    COVERED["directions"].add(direction)
