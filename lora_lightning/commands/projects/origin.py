"""The origin of an installed package's template, as `.copier-answers.yml` has it, for `copier update`."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from lora_lightning.commands.projects.repository import git

PACKAGE = "lora_lightning"


def origin(template: Path) -> dict[str, str]:
    """`_src_path`, a git repository, and `_commit`, a tag or commit of it; empty where they are unknown.

    It is the first known of: the repository and commit that pip installed from; the clone that the package was
    installed from or is in, by the address of its remote where that has the commit; the repository in the package's
    metadata, at the version's tag.

    Args:
        template: the folder that was rendered.
    """
    return _from_direct_url(template) or _from_clone(template) or _from_metadata()


def _from_direct_url(template: Path) -> dict[str, str]:
    """The repository's commit or the folder that pip installed from, if the folder is unchanged."""
    direct_url = _direct_url()
    commit = direct_url.get("vcs_info", {}).get("commit_id")
    if commit:
        return {"_src_path": f"git+{direct_url['url']}", "_commit": commit}
    source = Path(url2pathname(urlparse(direct_url.get("url", "")).path), "lora_lightning", "template")
    return _from_clone(source) if "dir_info" in direct_url and _are_equal(source, template) else {}


def installable() -> str | None:
    """Where pip can install this package from, if it did not come from an index: a repository's commit, or a folder.

    A clone is named by its remote where that has the commit, and by its folder otherwise.
    """
    direct_url = _direct_url()
    if commit := direct_url.get("vcs_info", {}).get("commit_id"):
        return f"git+{direct_url['url']}@{commit}"
    here = Path(__file__).parents[3]
    folder = Path(url2pathname(urlparse(direct_url["url"]).path)) if "dir_info" in direct_url else here
    if not (folder / "pyproject.toml").is_file():
        return str(direct_url["url"]) if "archive_info" in direct_url else None
    remote = _remote_with_head(folder)
    if remote and "://" in remote:
        return f"git+{remote}@{git('rev-parse', 'HEAD', cwd=folder)}"
    return folder.as_uri()


def _direct_url() -> dict[str, Any]:
    """The content of pip's direct_url.json; empty for an installation from an index."""
    try:
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return json.loads(text) if text else {}


def _remote_with_head(folder: Path) -> str | None:
    """The address of a clone's remote that has the current commit."""
    pushed = git("branch", "--remotes", "--contains", "HEAD", cwd=folder)
    return git("remote", "get-url", pushed.split("/")[0].strip(), cwd=folder) if pushed else None


def _are_equal(a: Path, b: Path) -> bool:
    """Whether two folders have the same files."""
    first, second = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (a, b))
    return first == second


def _from_clone(folder: Path) -> dict[str, str]:
    root = git("rev-parse", "--show-toplevel", cwd=folder)
    described = git("describe", "--tags", "--always", cwd=folder)
    if not root or not described or not (Path(root) / "copier.yml").is_file():
        return {}
    if not Path(root, "lora_lightning", "template").samefile(folder):
        return {}  # a package that is installed into an environment within somebody else's repository
    return {"_src_path": _remote_with_head(folder) or root, "_commit": described}


def _from_metadata() -> dict[str, str]:
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return {}
    for line in metadata.get_all("Project-URL") or []:
        label, _, url = line.partition(", ")
        if label.lower() in ("repository", "source"):
            return {"_src_path": f"git+{url}", "_commit": f"v{metadata['Version']}"}
    return {}
