"""Sphinx configuration: every warning is an error in CI."""

from importlib.metadata import version as installed_version

project = "lightning-plugins"
author = "The lightning-plugins developers"
copyright = f"2026, {author}"
release = version = installed_version("lightning-plugins")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "results"]  # results: tables that pages include

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Shape", "params_style")]

html_theme = "furo"
html_title = "lightning-plugins"
html_static_path = ["_static"]
html_show_sourcelink = False


def setup(app):
    """Leave Lightning's hooks out of the callbacks' pages: when they run is the class docstring's business."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    hooks = {name for base in (Callback, LightningDataModule, LightningModule) for name in vars(base)}
    hooks -= {"__init__", "forward"}

    def skip(app, what, name, obj, skip, options):
        return True if what == "class" and name in hooks else None

    app.connect("autodoc-skip-member", skip)
