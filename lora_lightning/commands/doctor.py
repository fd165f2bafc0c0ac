"""`lora-lightning doctor`: what is installed, what this machine has, and whether a tiny fit and its export work."""

from __future__ import annotations

import json as json_format
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("torch", "lightning", "transformers", "jsonargparse", "safetensors", "datasets", "torchmetrics", "wandb")
EXTRAS = {
    "demo": "the linear probe that a classifier is compared with",
    "lm": "models that lie in GGUF files",
    "vision": "images, and backbones of torchvision and timm",
    "text-metrics": "rougeLsum of generated texts",
    "qlora": "4- and 8-bit bases: --trainer.precision nf4-base",
    "plots": "the figures of analyze",
}
"""Purposes of extras; other extras are described by their packages."""
LITTLE = 1e9
"""Bytes of free disk below which a run may end early: a demo takes 100 MB, a model's merged export as much as the
model."""


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    group: str
    name: str
    said: str
    ok: bool = True
    """False where something does not work that every run needs."""


def doctor(runs_dir: str = "runs", fit: bool = True, json: bool = False) -> None:
    """Versions, devices, what each extra would add, room on the disk, and whether a tiny fit and its export work.

    Exit code 0 where all that every run needs works, 1 where something does not.

    Args:
        runs_dir: the folder of runs whose disk is checked.
        fit: train a tiny model, export it and compare, in a temporary folder; `false` leaves that out.
        json: print the findings as JSON, one object with a list.
    """
    shown: list[Finding] = []
    for finding in findings(Path(runs_dir), fit=fit):
        if not json:
            show(finding, first=not shown or shown[-1].group != finding.group)
        shown.append(finding)
    failed = [finding.name for finding in shown if not finding.ok]
    if json:
        print(json_format.dumps({"ok": not failed, "findings": [asdict(finding) for finding in shown]}, indent=2))
    else:
        print("\n" + (f"does not work: {', '.join(failed)}" if failed else "all that every run needs works"))
    if failed:
        sys.exit(1)


def show(finding: Finding, *, first: bool) -> None:
    """Print a finding as a line, below its group's name where it is the first."""
    if first:
        print(f"\n{finding.group}")
    print(f"  {'' if finding.ok else 'FAILS: '}{finding.name:<18}{finding.said}", flush=True)


def findings(runs: Path, *, fit: bool) -> Iterator[Finding]:
    """All findings, one by one."""
    yield from versions()
    yield from devices()
    yield from extras()
    yield from surroundings(runs)
    if fit:
        yield trial()


def versions() -> Iterator[Finding]:
    """Versions of the packages that every run needs."""
    yield Finding("versions", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in ("lora_lightning", *PACKAGES):
        installed = installed_version(name)
        yield Finding("versions", name, installed or "not installed: pip install lora_lightning", installed is not None)


def installed_version(package: str) -> str | None:
    """The version, or None where the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices() -> Iterator[Finding]:
    """Devices that torch can use."""
    import torch

    for number in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(number)
        narrow = (
            "bfloat16 in hardware" if torch.cuda.is_bf16_supported() else "no bfloat16: --trainer.precision 16-mixed"
        )
        yield Finding("devices", f"cuda:{number}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {narrow}")
    if torch.backends.mps.is_available():
        yield Finding("devices", "mps", "Apple's GPU")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for CPUs"
        yield Finding("devices", "cuda", f"none ({built})")
    threads = f"torch uses {torch.get_num_threads()} threads"
    yield Finding("devices", "cpu", f"{os.cpu_count()} cores, {threads}{_memory()}")


def _memory() -> str:
    try:
        return f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB of memory"
    except (ValueError, OSError, AttributeError):  # not on every system
        return ""


def extras() -> Iterator[Finding]:
    """Each extra of the package but the developers': installed, or what it would add and how to install it."""
    needed = [Requirement(line) for line in requires("lora_lightning") or []]
    marked = [(requirement.marker, requirement) for requirement in needed if requirement.marker is not None]
    for extra in metadata("lora_lightning").get_all("Provides-Extra") or []:
        if extra in ("dev", "docs"):
            continue
        requirements = [requirement for marker, requirement in marked if marker.evaluate({"extra": extra})]
        missing = [requirement.name for requirement in requirements if not _is_there(requirement)]
        purpose = EXTRAS.get(extra, ", ".join(requirement.name for requirement in requirements))
        lacks = f"would add {purpose} (lacks {', '.join(missing)}): pip install 'lora_lightning[{extra}]'"
        yield Finding("extras", extra, lacks if missing else f"there: {purpose}")


def _is_there(requirement: Requirement) -> bool:
    installed = installed_version(requirement.name)
    return installed is not None and requirement.specifier.contains(installed, prereleases=True)


def surroundings(runs: Path) -> Iterator[Finding]:
    """Weights & Biases, and the disk for the runs."""
    from lora_lightning.training.tracking.loggers import has_wandb_key

    where = "runs are uploaded" if has_wandb_key() else "no key here, so runs stay offline: wandb login"
    yield Finding("surroundings", "Weights & Biases", where)
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("surroundings", "disk", f"{runs} cannot be written: give another --runs_dir", ok=False)
        return
    free = shutil.disk_usage(existing).free
    little = f" (little: a run may not have room; free some, or give another --runs_dir than {runs})"
    yield Finding("surroundings", "disk", f"{free / 1e9:.1f} GB free for {runs}{little if free < LITTLE else ''}")


def trial() -> Finding:
    """A fit of a few steps and its export."""
    from lora_lightning.commands.tiny_fit import tiny_fit

    try:
        figures = tiny_fit()
    except Exception as error:  # any failure is a finding
        reason = " ".join(str(error).split())
        return Finding("trial", "tiny fit", f"{type(error).__name__}: {reason}", ok=False)
    return Finding(
        "trial",
        "tiny fit",
        f"{figures.steps} steps on {figures.device}: loss {figures.before:.2f} to {figures.after:.2f}; exported, and"
        f" the merged model is within {figures.apart:.0e} of the adapted one ({figures.seconds:.1f} s)",
        ok=figures.after < figures.before,
    )
