"""Links of a page to files of the repository, such as `../configs/demo.yaml`, in the site.

The pages are written for the repository, where such links work as they stand. In the site they lead to
`repository_address`; where that is empty, to the files on this disk. A file that is not there is a warning, and so an
error of a strict build.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)


class RepositoryLinks(SphinxTransform):
    """Turns MyST's nodes for links out of `docs/` into plain links."""

    default_priority = 5  # before Sphinx collects downloads

    def apply(self, **kwargs: Any) -> None:
        for node in list(self.document.findall(_leads_out)):
            path, _, anchor = node["reftarget"].partition("#")
            _, file = self.env.relfn2path(path, self.env.docname)
            target = Path(os.path.normpath(file))
            root = Path(self.config.repository_root)
            if not target.exists() or not target.is_relative_to(root):
                logger.warning("there is no %s in the repository", node["reftarget"], location=node, type="repository")
                continue
            link = nodes.reference("", "", internal=False)
            link["refuri"] = self._address(target.relative_to(root)) + (f"#{anchor}" if anchor else "")
            link += [child.deepcopy() for child in node.children]
            node.replace_self(link)

    def _address(self, inside: Path) -> str:
        base = self.config.repository_address.rstrip("/")
        if base:
            return f"{base}/{inside.as_posix()}"
        page = Path(self.env.app.outdir, self.env.docname).parent
        return Path(os.path.relpath(Path(self.config.repository_root, inside), page)).as_posix()


def _leads_out(node: nodes.Node) -> bool:
    ours = isinstance(node, addnodes.download_reference | addnodes.pending_xref) and node.get("reftype") == "myst"
    return ours and node["reftarget"].startswith("../")


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the transform and its two settings known."""
    app.add_config_value("repository_address", "", "env", [str])
    app.add_config_value("repository_root", "", "env", [str])
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
