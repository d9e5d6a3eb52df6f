"""What makes the pages of the site: tutorials from their files, docstrings, and the check of what was built."""

import importlib.util
import pathlib
import re

import pytest

import rdrop_keras

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
TUTORIALS = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def extension(name):
    spec = importlib.util.spec_from_file_location(f"site_{name}", DOCS / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TUTORIALS)
def test_tutorial_is_its_file(name):
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    page = extension("tutorials").to_markdown(source, "## What it prints", "output")
    assert page.startswith(f"# {source.splitlines()[1].removeprefix('# # ')}\n")
    # The page has the lines of the file, in its order.
    text = page.removesuffix("\n\n## What it prints\n\n```console\noutput\n```\n")
    assert text != page
    lines = [line.lstrip("# ") for line in text.splitlines() if not line.startswith("```")]
    expected = [line.lstrip("# ") for line in source.splitlines() if not line.startswith("# %%")]
    assert list(filter(None, lines)) == list(filter(None, expected))


def test_tutorial_by_hand():
    source = """# %% [markdown]
# # A title
#
# Text:
#
#     python file.py
#
# More.

# %%
import keras


def f():
    # Why.
    pass

# %% [markdown]
# ## Data
#
# Read it.
"""
    expected = """# A title

Text:

```bash
python file.py
```

More.

```python
import keras


def f():
    # Why.
    pass
```

## Data

Read it.
"""
    assert extension("tutorials").to_markdown(source) == expected


def test_every_tutorial_has_a_page():
    assert {path.stem for path in (DOCS / "tutorials").glob("*.md")} - {"index"} == set(TUTORIALS)


def test_outputs():
    for path in (DOCS / "outputs").glob("*.txt"):
        assert path.stem in TUTORIALS
        assert "\n## " in (DOCS / "tutorials" / f"{path.stem}.md").read_text(encoding="utf-8")  # It introduces them.
        output = path.read_text(encoding="utf-8")
        assert len(output.splitlines()) > 3
        # No folders of the machine, errors, or characters that move a cursor.
        assert not re.search(r"(?<!\w)/(?:home|root|tmp|work)/|Traceback|\x08|\x1b", output)


def test_api_page_has_every_public_name():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto\w+:: rdrop_keras\.([\w.]+)", page, flags=re.MULTILINE)
    assert set(rdrop_keras.__all__) - {"__version__", "plot"} <= set(documented)
    assert {"plot.compare", "plot.Clock"} <= set(documented)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["One:", "", "    a |b|", "", "and |c|"], ["One:", "", "::", "", "    a |b|", "", r"and \|c\|"]),
        (["Args:", "    a: `x | y`.", "", "End."], ["Args:", "    a: `x | y`.", "", "End."]),
    ],
)
def test_docstrings_keep_indented_lines(lines, expected):
    assert extension("docstrings").to_restructured_text(lines) == expected


BAD = {
    '<script src="https://a.org/x.js"></script>': "p.html fetches https://a.org/x.js",
    '<link rel="stylesheet" href="//a.org/x.css">': "p.html fetches //a.org/x.css",
    '<link rel="preload" href="http://a.org/x">': "p.html fetches http://a.org/x",
    '<img src="http://a.org/x.png">': "p.html fetches http://a.org/x.png",
    '<img srcset="p.html 1x, http://a.org/x.png 2x">': "p.html fetches http://a.org/x.png",
    "<style>@import url('https://a.org/x.css');</style>": "p.html fetches https://a.org/x.css",
    '<p style="background: url(https://a.org/x.png)">': "p.html fetches https://a.org/x.png",
    '<a href="q.html">': "p.html links to q.html, which does not exist",
    '<a href="p.html#b">': "p.html links to p.html#b, a place that the page does not have",
    '<img src="x.png">': "p.html links to x.png, which does not exist",
}
GOOD = (
    '<link rel="canonical" href="https://a.org"><a id="a" href="https://a.org"></a><a href="#a"></a><a href="p.html">'
)


@pytest.mark.parametrize(("text", "problem"), BAD.items())
def test_check_finds(text, problem, tmp_path):
    (tmp_path / "p.html").write_text(GOOD + text, encoding="utf-8")
    assert extension("built_pages").problems(tmp_path) == [problem]


def test_check_reads_css_and_passes_what_is_good(tmp_path):
    (tmp_path / "p.html").write_text(GOOD, encoding="utf-8")
    assert extension("built_pages").problems(tmp_path) == []
    (tmp_path / "s.css").write_text('@import "https://a.org/x.css"; a { src: url(data:font/woff2;base64,AA) }')
    assert extension("built_pages").problems(tmp_path) == ["s.css fetches https://a.org/x.css"]
