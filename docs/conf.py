"""The documentation: hand-written pages here; while it is built, a page for every primitive and every experiment."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from bioadapt import __version__

project = "bioadapt"
author = "the bioadapt developers"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "catalogue", "house", "ledger"]
exclude_patterns = ["_build", "_ext", "ledger_intro.md", "catalogue/evidence.md"]  # the last two are parts of pages
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"bioadapt {version}"
html_static_path = ["_static"]
html_css_files = ["bioadapt.css"]
html_js_files = ["tables.js"]
html_theme_options = {"sidebar_hide_name": False}
