"""The rooms of the package: which module may import which, and what `keras_gaps` offers by itself."""

import ast
import doctest
import inspect
import pathlib

import keras
import numpy as np
import pytest

import rdrop_keras
from models import mlp
from rdrop_keras.keras_gaps import _keras, wrapper

PACKAGE = pathlib.Path(rdrop_keras.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
# From the top down. A module imports from its own floor and those below, without circles.
FLOORS = ["", "passes", "keras_gaps"]


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


def test_private_names_that_are_gone_are_told():
    _keras.check_private_names()
    with pytest.raises(
        ImportError, match=rf"that Keras {keras.__version__} has no more: Layer._gone, Model._away. Inst"
    ):
        _keras.check_private_names({keras.Layer: ("_layers", "_gone"), keras.Model: ("_away",)})


@pytest.mark.parametrize("name", sorted(set(rdrop_keras.__all__) - {"__version__"}))
def test_public_names_are_documented(name):
    public = getattr(rdrop_keras, name)
    assert inspect.getdoc(public)
    for method, value in vars(public).items() if inspect.isclass(public) else ():
        if not method.startswith("_") and callable(value):
            assert inspect.getdoc(getattr(public, method)), method


def test_docstring_of_the_wrapper():
    names = {"keras": keras, "np": np}
    (test,) = doctest.DocTestFinder(recurse=False).find(wrapper.WrapperModel, "WrapperModel", globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@keras.saving.register_keras_serializable("tests")
class Doubled(wrapper.WrapperModel):
    """Another method than R-Drop: it doubles the inputs in every other training step."""

    kinds_of_step = (2.0, 1.0)

    def kind_of_step(self, step):
        return self.kinds_of_step[step % 2]

    def call_in_training(self, inputs, training, kind):
        return self.model(kind * inputs, training=training)


def test_another_method(tmp_path):
    """It has steps of two kinds, evaluates the model inside, and a loaded file continues where it was saved."""
    x, y = np.random.RandomState(0).normal(size=(24, 4)).astype("float32"), np.arange(24) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def trained(model, batches):
        model.compile(keras.optimizers.SGD(0.1), loss)
        for batch in batches:
            model.train_on_batch(batch, y[:8])
        return model

    keras.utils.set_random_seed(1)
    plain = trained(mlp(rate=0.0), [2 * x[:8], x[8:16], 2 * x[16:]])
    keras.utils.set_random_seed(1)
    model = trained(Doubled(mlp(rate=0.0)), [x[:8], x[8:16], x[16:]])
    np.testing.assert_allclose(model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for other, batch in ((model, x[:8]), (again, x[:8]), (plain, x[:8])):
        other.train_on_batch(batch, y[:8])
    np.testing.assert_allclose(again.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"With steps of several kinds, `steps_per_execution` must be 1"):
        model.compile("sgd", loss, steps_per_execution=2)
    with pytest.raises(AttributeError, match=r"`model` of this Doubled is fixed"):
        model.model = plain
