"""The rooms of the package: which module may import which, private names of Keras, documented names."""

import ast
import inspect
import pathlib

import pytest

import rdrop_keras

PACKAGE = pathlib.Path(rdrop_keras.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the top down. A module imports from its own floor and those below, without circles.
FLOORS = ["", "dropout", "passes", "wrapper", "keras_private", "arguments", "_version"]


def imports(path):
    """The modules of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names & set(MODULES) or {node.module})
            found.update({node.module} if names - set(MODULES) else ())
    return {name for name in found if name in MODULES}


def floor(module):
    room = module.removeprefix("rdrop_keras").removeprefix(".").partition(".")[0]
    return FLOORS.index(room if room in FLOORS else "")


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"rdrop_keras"}))
def test_imports_point_downwards(module):
    for imported in imports(MODULES[module]):
        assert imported != "rdrop_keras" and floor(imported) >= floor(module), f"{module} imports {imported}"


def test_imports_make_no_circle():
    waiting = {module: imports(path) - {module} for module, path in MODULES.items()}
    while waiting:
        free = [module for module, needs in waiting.items() if not needs & set(waiting)]
        # A room's `__init__` is imported with each of its modules, and may import them.
        assert free, f"these import each other: {sorted(waiting)}"
        for module in free:
            del waiting[module]


def test_every_room_is_installed():
    packages = {".".join(path.relative_to(PACKAGE.parent).parent.parts) for path in PACKAGE.rglob("__init__.py")}
    setup = (pathlib.Path(__file__).parents[1] / "setup.cfg").read_text(encoding="utf-8")
    listed = setup.split("packages =\n")[1].split("\npython_requires")[0].split()
    assert set(listed) == packages


@pytest.mark.parametrize("name", sorted(set(rdrop_keras.__all__) - {"__version__"}))
def test_public_names_are_documented(name):
    public = getattr(rdrop_keras, name)
    assert inspect.getdoc(public)
    for method, value in vars(public).items() if inspect.isclass(public) else ():
        if not method.startswith("_") and callable(value):
            assert inspect.getdoc(getattr(public, method)), method
