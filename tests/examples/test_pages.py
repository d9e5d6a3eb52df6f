"""What holds for every tutorial as a page, without running it."""

import ast
import pathlib
import re

import pytest

PAGES = sorted((pathlib.Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def source(request):
    return request.param.read_text(encoding="utf-8")


def cells(source):
    """The cells of code."""
    kinds = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)
    return [cell for kind, cell in zip(kinds[1::2], kinds[2::2]) if not kind.strip()]


def lines_of_code(text):
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_page_is_cells(source):
    assert source.startswith("# %% [markdown]\n# # ")
    prose = re.split(r"^# %%.*\n", source, flags=re.MULTILINE)
    assert all(cell.startswith("# ") or not cell.startswith("#") for cell in prose)


def test_page_is_short(source):
    assert len(lines_of_code("\n".join(cells(source)))) <= 92


def test_page_is_no_program(source):
    names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not names & {"argparse", "main", "__name__"}


def test_imports_nothing_of_ours_but_the_library(source):
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {name for name in imported if name.startswith(("rdrop", "benchmarks", "examples"))} == {"rdrop_keras"}


def test_constants_are_in_the_first_cell(source):
    first, *others = cells(source)
    assert re.search(r"^ALPHAS? = ", first, flags=re.MULTILINE)
    assert not [cell for cell in others if re.search(r"^[A-Z_]+ = ", cell, flags=re.MULTILINE)]


def test_rdrop_comes_early(source):
    """About half of the code, imports included, comes before it, and neither compiling nor training does."""
    lines = lines_of_code(source)
    line = next(i for i, line in enumerate(lines) if "rdrop_keras.RDropModel(" in line)
    assert line < 0.65 * len(lines)
    assert line < next(i for i, line in enumerate(lines) if ".fit(" in line or ".compile(" in line)
