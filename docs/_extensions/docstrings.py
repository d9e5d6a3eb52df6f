"""Docstrings of the package for autodoc, which reads them as reStructuredText.

Their indented paragraphs, such as formulas, are shown as they are written, and a bar is a bar. Classes show the
arguments of their constructor.
"""

import inspect
import re


def to_restructured_text(lines):
    """`lines` with `::` before each indented block that follows an unindented line and a blank one."""
    result, last, literal = [], "", False
    for line in lines:
        if line and not line.startswith(" "):
            literal = False
        elif line.startswith("    ") and not last.startswith(" ") and result and not result[-1]:
            literal = True
            result += ["::", ""]
        # `::` takes bars as they are; in text two of them would be a substitution.
        result.append(line if literal else re.sub(r"(`[^`]*`)|\|", lambda match: match[1] or r"\|", line))
        last = line or last
    return result


def process(app, what, name, obj, options, lines):
    lines[:] = to_restructured_text(lines)


def constructor(app, what, name, obj, options, signature, returns):
    """The arguments of `__init__`: autodoc would show those of Keras's `Model.__new__`, which takes anything."""
    if what != "class" or signature != "(*args, **kwargs)":
        return None
    _, *parameters = inspect.signature(obj.__init__).parameters.values()
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return str(inspect.Signature(parameters)), None


def setup(app):
    app.connect("autodoc-process-signature", constructor)
    app.connect("autodoc-process-docstring", process, priority=400)  # Before napoleon.
    return {"parallel_read_safe": True, "parallel_write_safe": True}
