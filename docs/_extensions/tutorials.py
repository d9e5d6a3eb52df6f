"""Tutorials from the files of `examples/`: text, code, text, and at the end what a run printed.

The page `docs/tutorials/NAME.md` is replaced by what `to_markdown` makes of `examples/NAME.py`. That file is made of
cells, which begin with `# %% [markdown]` or `# %%`, as editors and Jupytext read them. What the page says of results,
from its first heading of the second level on, stays at the end, before the text of `docs/outputs/NAME.txt`.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[2]


def to_markdown(source, results="", output=None):
    """The page of a tutorial. `results` is the text that introduces the `output` of a run."""
    marks_and_cells = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    parts = []
    for mark, cell in zip(marks_and_cells[::2], marks_and_cells[1::2]):
        if mark.strip() == "[markdown]":
            parts.append(fenced(re.sub(r"^# ?", "", cell, flags=re.MULTILINE).strip()))
        else:
            parts.append(f"```python\n{cell.strip()}\n```")
    parts.append(results.strip())
    if output is not None:
        parts.append(f"```console\n{output.rstrip()}\n```")
    return "\n\n".join(filter(None, parts)) + "\n"


def fenced(text):
    """`text` with its indented blocks, which are commands, as fenced ones."""

    def fence(match):
        block = re.sub(r"^    ", "", match[0], flags=re.MULTILINE).strip("\n")
        return f"```bash\n{block}\n```\n"

    return re.sub(r"(?:^    .*\n?)+", fence, text, flags=re.MULTILINE).strip()


def read(app, docname, content):
    folder, _, name = docname.rpartition("/")
    path = ROOT / "examples" / f"{name}.py"
    if folder != "tutorials" or not path.exists():
        return
    output = ROOT / "docs" / "outputs" / f"{name}.txt"
    app.env.note_dependency(str(path))
    if output.exists():
        app.env.note_dependency(str(output))
    _, heading, results = content[0].partition("\n## ")
    content[0] = to_markdown(
        path.read_text(encoding="utf-8"),
        heading + results,
        output.read_text(encoding="utf-8") if output.exists() else None,
    )


def setup(app):
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
