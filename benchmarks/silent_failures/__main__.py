"""Run the failures and print the table.

python -m benchmarks.silent_failures [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all models are made here

from benchmarks.silent_failures.harness import WAYS, Outcome, failures, judge, table, words

VERSIONS = ("torch", "lightning", "transformers", "peft")


def main() -> None:
    known = failures()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.silent_failures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all outcomes, with every warning, to FILE")
    options = parser.parse_args()
    rows: dict[str, dict[str, Outcome]] = {}
    for name in options.only or known:
        module = known[name]
        rows[name] = {way: judge(getattr(module, way), module.WARNS) for way in WAYS}
        seconds = sum(outcome.seconds for outcome in rows[name].values())
        print(f"{name}: {', '.join(o.kind for o in rows[name].values())} ({seconds:.1f} s)", flush=True)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    print(f"\n{datetime.date.today()}, {versions}\n\n{table(rows)}\n\n{words(rows)}")
    if options.json:
        found = {name: {way: asdict(outcome) for way, outcome in row.items()} for name, row in rows.items()}
        options.json.write_text(json.dumps({"versions": versions, "failures": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
