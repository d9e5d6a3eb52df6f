"""Tutorials from the files of `examples/`: text, code, text, and at the end what a run printed.

The page `docs/tutorials/NAME.md` is replaced by what `to_markdown` makes of `examples/NAME.py`. In such a file the
module's docstring is the introduction, its first line the title. A comment block at the left margin that begins with
`# ## ` is a heading with text below it. Everything else is code.
"""

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "This is the small model of `--small`, trained for minutes on one core: too little to be of use, enough to see "
    "each part at work. [Benchmarks](../benchmarks.md#when_it_payspy-when-does-r-drop-pay) says what the data are."
)


def to_markdown(source, output=None, picture=None):
    """The page of a tutorial. `output` is the text of `docs/outputs/NAME.txt`."""
    docstring = ast.get_docstring(ast.parse(source))
    title, _, introduction = docstring.partition("\n")
    parts = [f"# {title.rstrip('.')}", fenced(introduction.strip()).strip()]
    lines = source.splitlines()[ast.parse(source).body[0].end_lineno :]
    code = []
    while lines:
        if lines[0].startswith("# ## "):
            parts += [as_code(code), f"## {lines.pop(0).removeprefix('# ## ')}"]
            text, code = [], []
            while lines and lines[0].startswith("#"):
                text.append(lines.pop(0).removeprefix("#").removeprefix(" "))
            parts.append("\n".join(text).strip())
        else:
            code.append(lines.pop(0))
    parts.append(as_code(code))
    if output is not None:
        parts.append("## What it prints")
        if " --small " in output.partition("\n")[0]:
            parts.append(SMALL)
        parts.append(f"```console\n{output.rstrip()}\n```")
    if picture is not None:
        parts.append(picture)
    return "\n\n".join(filter(None, parts)) + "\n"


def as_code(lines):
    text = "\n".join(lines).strip("\n")
    return f"```python\n{text}\n```" if text else ""


def fenced(text):
    """`text` with its indented blocks as fenced ones, of commands or of Python."""

    def fence(match):
        block = re.sub(r"^    ", "", match[0], flags=re.MULTILINE).strip("\n")
        language = "bash" if re.match(r"python |KERAS_BACKEND=", block) else "python"
        return f"```{language}\n{block}\n```\n"

    return re.sub(r"(?:^    .*\n?)+", fence, text, flags=re.MULTILINE)


def read(app, docname, content):
    folder, _, name = docname.rpartition("/")
    path = ROOT / "examples" / f"{name}.py"
    if folder != "tutorials" or not path.exists():
        return
    output = ROOT / "docs" / "outputs" / f"{name}.txt"
    app.env.note_dependency(str(path))
    if output.exists():
        app.env.note_dependency(str(output))
    picture = re.search(r"^!\[.*", content[0], flags=re.MULTILINE | re.DOTALL)
    content[0] = to_markdown(
        path.read_text(encoding="utf-8"),
        output.read_text(encoding="utf-8") if output.exists() else None,
        picture and picture[0].strip(),
    )


def setup(app):
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
