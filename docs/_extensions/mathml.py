"""Formulas as MathML, which browsers draw by themselves, so that the pages load no scripts for them."""

from docutils.nodes import SkipNode
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging


def to_mathml(node, as_block):
    try:
        return latex2mathml.tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        logging.getLogger(__name__).warning("a formula cannot be drawn: %s", error, location=node)
        return ""


def inline(self, node):
    self.body.append(to_mathml(node, as_block=False))
    raise SkipNode


def block(self, node):
    self.body.append(f'<div class="math">{to_mathml(node, as_block=True)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
