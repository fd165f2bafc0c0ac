"""How `make docs` builds the pages of this folder into a site; neither that nor the site needs a network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

project = "lora_lightning"
author = "the authors of lora_lightning"
extensions = [
    *("sphinx.ext.autodoc", "sphinx.ext.napoleon"),
    *("myst_parser", "sphinx_copybutton", "repository_links", "mathml", "config_reference", "long_names"),
]

# Docstrings write code between single backquotes; a signature's types are told apart from the prose, not linked.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
nitpick_ignore_regex = [("py:.*", ".*")]  # torch, Lightning and the standard library lie in no inventory: no network

exclude_patterns = ["_ext", "_static"]
nitpicky = True
smartquotes_action = "D"  # dashes alone; quotes stand as they are written: they are copied into configs
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

# The web address of the tree, such as https://github.com/OWNER/NAME/blob/main: links to files of the repository lead
# there. Empty, they lead to the files beside the site. Set it with `-D repository_address=...`.
repository_address = ""
repository_root = str(HERE.parent)

html_theme = "furo"
html_title = "lora_lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"
