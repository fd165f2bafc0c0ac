"""Where this package was installed from: what pip installs in a project, and what `copier update` renders again."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

PACKAGE = "lora_lightning"


def git(*args: str, cwd: Path | None = None) -> str | None:
    """git's output, or None where it is not installed or fails."""
    try:
        done = subprocess.run(["git", *args], cwd=cwd, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def installable() -> str | None:
    """Where pip can install this package from, if it did not come from an index: a repository's commit, or a folder.

    A clone is named by its remote where that has the commit, and by its folder otherwise.
    """
    direct_url = _direct_url()
    if commit := direct_url.get("vcs_info", {}).get("commit_id"):
        return f"git+{direct_url['url']}@{commit}"
    folder = _installed_folder(direct_url) or Path(__file__).parents[2]
    if not (folder / "pyproject.toml").is_file():
        return str(direct_url["url"]) if "archive_info" in direct_url else None
    remote = _remote_with_head(folder)
    if remote and "://" in remote:
        return f"git+{remote}@{git('rev-parse', 'HEAD', cwd=folder)}"
    return folder.as_uri()


def template_origin(template: Path) -> dict[str, str]:
    """`_src_path`, a git repository, and `_commit`, a tag or commit of it; empty where they are unknown.

    It is the first known of: the repository and commit that pip installed from; the clone that the unchanged package
    was installed from or is in, by the address of its remote where that has the commit; the repository in the package's
    metadata, at the version's tag.

    Args:
        template: the folder that was rendered.
    """
    direct_url = _direct_url()
    if commit := direct_url.get("vcs_info", {}).get("commit_id"):
        return {"_src_path": f"git+{direct_url['url']}", "_commit": commit}
    places = [template]
    if folder := _installed_folder(direct_url):
        source = folder / "lora_lightning" / "template"
        places = [source, template] if _files(source) == _files(template) else places
    return next(filter(None, map(_of_clone, places)), None) or _of_metadata()


def _direct_url() -> dict[str, Any]:
    """The content of pip's direct_url.json; empty for an installation from an index."""
    try:
        text = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return {}
    return json.loads(text) if text else {}


def _installed_folder(direct_url: dict[str, Any]) -> Path | None:
    """The folder that pip installed from."""
    return Path(url2pathname(urlparse(direct_url["url"]).path)) if "dir_info" in direct_url else None


def _files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _remote_with_head(folder: Path) -> str | None:
    """The address of a clone's remote that has the current commit."""
    pushed = git("branch", "--remotes", "--contains", "HEAD", cwd=folder)
    return git("remote", "get-url", pushed.split("/")[0].strip(), cwd=folder) if pushed else None


def _of_clone(template: Path) -> dict[str, str]:
    root = git("rev-parse", "--show-toplevel", cwd=template)
    commit = git("describe", "--tags", "--always", cwd=template)
    if not root or not commit or not (Path(root) / "copier.yml").is_file():
        return {}
    if not Path(root, "lora_lightning", "template").samefile(template):
        return {}  # a package that is installed into an environment within somebody else's repository
    return {"_src_path": _remote_with_head(template) or root, "_commit": commit}


def _of_metadata() -> dict[str, str]:
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return {}
    urls = dict(line.split(", ", 1) for line in metadata.get_all("Project-URL") or [])
    url = next((url for label, url in urls.items() if label.lower() in ("repository", "source")), None)
    return {"_src_path": f"git+{url}", "_commit": f"v{metadata['Version']}"} if url else {}
