"""How Sphinx renders the course. `python course.py site` calls it; see helpers/site."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "PEFT, Measured"
author = "The PEFT, Measured authors"
project_copyright = author
language = "en-GB"

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the stored outputs are the course's results
nb_output_stderr = "remove"
suppress_warnings = ["misc.highlighting_failure"]  # a stored traceback has "…" for its folders
nb_code_prompt_show = "Show the solution"  # nothing else is folded
nb_code_prompt_hide = "Hide the solution"
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 4
smartquotes = False

html_theme = "furo"
html_title = project
html_static_path = ["static"]
html_css_files = ["course.css"]
html_js_files = ["course.js"]
html_favicon = "static/favicon.svg"
html_show_sourcelink = False
html_copy_source = False
html_show_sphinx = False
html_use_index = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def visit_math(writer: HTML5Translator, node: nodes.math) -> None:
    """A formula as MathML, which browsers draw themselves: no script, no font, no network."""
    writer.body.append(tex2mathml(node.astext(), as_block=False))
    raise nodes.SkipNode


def visit_displaymath(writer: HTML5Translator, node: nodes.math_block) -> None:
    """The same for a formula on a line of its own."""
    writer.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def name_levels(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Captions of the side bar are headings for screen readers, which need a heading's level."""
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app: Sphinx) -> None:
    """Puts MathML in the place of MathJax, and levels into the side bar."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_displaymath, None))
    app.connect("html-page-context", name_levels, priority=900)  # after the theme's own


html_math_renderer = "mathml"
