"""`benchmarks/tutorial_results.py`: pages with other constants, what they print, and what the site says of it."""

import io
import pathlib
import re

import pytest

import measure
import tutorial_results

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.parametrize("name", tutorial_results.PAGES)
def test_constants_are_those_of_the_page(name):
    source = (DOCS.parent / "examples" / f"{name}.py").read_text(encoding="utf-8")
    constants = {**tutorial_results.PAGES[name]["constants"], "ALPHA": 0.0, "SEED": 1}
    changed = tutorial_results.with_constants(source, constants)
    for constant, value in constants.items():
        assert f"\n{constant} = {value!r}\n" in changed


def test_unknown_constant():
    with pytest.raises(ValueError, match=r"The page must have one line `EPOCHS = …`. Received: 0 of them."):
        tutorial_results.with_constants("ALPHA = 1\n", {"ALPHA": 2, "EPOCHS": 3})


def test_what_is_kept_of_a_progress_bar():
    kept, shown = io.StringIO(), io.StringIO()
    stream = tutorial_results.Tee(shown, kept)
    stream.write("\x1b[1m1/2\x1b[0m loss: 3\r")
    stream.write("\x1b[1m2/2\x1b[0m loss: 2\nEpoch")
    stream.write(" 2\n")
    assert kept.getvalue() == "2/2 loss: 2\nEpoch 2\n"
    assert shown.getvalue().startswith("\x1b[1m1/2")


def test_pages_say_what_was_measured():
    runs = measure.read_runs(tutorial_results.RESULTS)
    for name in tutorial_results.PAGES:
        page = (DOCS / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        rows = re.findall(r"^\| (plain|R-Drop) \|(.*)\|$", page, flags=re.MULTILINE)
        assert len(rows) == (2 if f"{name}, rdrop, seed 0" in runs else 0)
        for kind, cells in rows:
            assert [cell.strip() for cell in cells.split("|")] == tutorial_results.cells(name, kind, runs)
