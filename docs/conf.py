"""How Sphinx builds the site: `python -m sphinx -W --keep-going -n -b html docs build/site`."""

import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "_extensions"))

import rdrop_keras

project = "rdrop_keras"
version = release = rdrop_keras.__version__
html_title = f"{project} {version}"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    # Those of this folder.
    "built_pages",
    "docstrings",
    "mathml",
    "tutorials",
]
exclude_patterns = ["_*", "outputs"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# A page that is made of others may leave out a level of headings.
suppress_warnings = ["myst.header"]

# Docstrings are in Google's form and write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"
