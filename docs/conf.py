"""Sphinx configuration: every warning is an error in CI."""

import re
from importlib.metadata import version as installed_version

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "lightning-plugins"
author = "The lightning-plugins developers"
copyright = f"2026, {author}"
release = version = installed_version("lightning-plugins")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
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
html_css_files = ["site.css"]
html_math_renderer = "mathml"  # browsers draw it without a script, hence without a network
html_show_sourcelink = False


def mathml(translator, node):
    """Write a formula as MathML, which sizes its brackets by itself."""
    formula = re.sub(r"\\[bB]igg?[lr]?(?![a-z])", "", node.astext()).replace(r"\dots", r"\ldots")
    block = isinstance(node, nodes.math_block)
    drawn = tex2mathml(formula, as_block=block)
    translator.body.append(f'<div class="formula">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def keep_spreads(app, doctree):
    """Keep a mean and its spread on one line of a table."""
    for text in [text for entry in doctree.findall(nodes.entry) for text in entry.findall(nodes.Text)]:
        if " ± " in text:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")))


def setup(app):
    """Add the formulas, and leave Lightning's hooks out: when they run is the business of a callback's docstring."""
    from lightning.pytorch import Callback, LightningDataModule, LightningModule

    hooks = {name for base in (Callback, LightningDataModule, LightningModule) for name in vars(base)}
    hooks -= {"__init__", "forward"}

    def skip(app, what, name, obj, skip, options):
        return True if what == "class" and name in hooks else None

    app.connect("autodoc-skip-member", skip)
    app.connect("doctree-read", keep_spreads)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
