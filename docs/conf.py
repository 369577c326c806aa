"""The documentation site; ``scripts/docs`` builds it and opens it in a browser."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent

sys.path.insert(0, str(DOCS / "_extensions"))
# The Python twins: their functions have annotations and sources to show.
os.environ["BGTASKS_IMPLEMENTATION"] = "python"

_project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = _project["urls"]["Source"]

project = "bgtasks"
author = _project["authors"][0]["name"]
project_copyright = author
version = release = _project["version"]
language = "en"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "api_links",
]
nitpicky = True
nitpick_ignore_regex = [
    # The frameworks' own: their inventories are not here.
    ("py:.*", r"(aiohttp|dishka|fastapi|injectq|litestar|opentelemetry|prometheus_client|starlette|web)\..*"),
    # Type variables.
    ("py:class", r"bgtasks\..*\.(App|Function|Result|Service)"),
]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_display_short_literal_types = True
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
viewcode_follow_imported_members = True

napoleon_numpy_docstring = False
napoleon_use_rtype = False

# From a file alone: a build must need no network. _inventories/update.py renews it.
intersphinx_mapping = {"python": ("https://docs.python.org/3", "_inventories/python.inv")}

copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"bgtasks {version}"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view", "edit"],
    "footer_icons": [],
}
