"""Several processes train like one, by `MultiWorkerMirroredStrategy` or by `keras.distribution` on JAX."""

import keras
import numpy as np
import pytest

import split_batches
from cluster import Cluster
from rdrop_keras import KLBudget

pytestmark = pytest.mark.slow


def assert_same(result, expected):
    split_batches.assert_same((result["history"], [np.array(w, "float32") for w in result["weights"]]), expected)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "workers, replicas, options",
    [(2, 1, {}), (3, 1, {"every": 2}), (2, 2, {"budget": {"target": 0.01, "step": 0.5}})],
    ids=["2 workers", "3 workers, every", "2 workers of 2 replicas, budget"],
)
def test_multi_worker(workers, replicas, options, tmp_path):
    import tensorflow as tf

    rows, size = (18, 6) if workers == 3 else (16, 8)
    with Cluster(
        "tensorflow", workers, "train", tmp_path, replicas=replicas, model=options, rows=rows, batch_size=size
    ) as cluster:
        results = cluster.results()
    options = {"alpha": KLBudget(**options["budget"])} if "budget" in options else options
    model = split_batches.model(**options)
    best = keras.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True)
    x, y = split_batches.X[:rows], split_batches.Y[:rows]
    expected = split_batches.steps(model, True, x, y, batch_size=size, callbacks=[best])
    for result in results:
        assert_same(result, expected)
        assert result["evaluation"] == pytest.approx(model.evaluate(x, y, verbose=0, return_dict=True), rel=1e-5)
        np.testing.assert_allclose(result["predictions"], model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
        assert result["weights"] == results[0]["weights"]
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(x), results[0]["predictions"], rtol=1e-4, atol=1e-5)
    # What the chief wrote is a checkpoint like any other.
    custom = {"NoiseOfTheRow": split_batches.NoiseOfTheRow}
    reloaded = keras.models.load_model(tmp_path / "chief.keras", custom_objects=custom)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert reloaded.evaluate(x, y, verbose=0, return_dict=True) == pytest.approx(expected, rel=1e-5)


@pytest.mark.backends("tensorflow")
def test_multi_worker_with_an_uneven_last_batch(tmp_path):
    """The means of all processes count alike, as in Keras, and all processes agree."""
    with Cluster("tensorflow", 2, "train", tmp_path, rows=21, batch_size=8) as cluster:
        first, second = cluster.results()
    assert first == second
    (expected, _) = split_batches.steps(split_batches.model(), True)
    assert first["history"]["loss"][0] == pytest.approx(expected["loss"][0], rel=1e-5)
    assert first["history"]["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-2)


@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    "processes, devices, model_parallel", [(2, 1, False), (2, 2, True)], ids=["data parallel", "model parallel"]
)
def test_processes_of_jax(processes, devices, model_parallel, tmp_path):
    with Cluster(
        "jax", processes, "train_with_jax", tmp_path, replicas=devices, model_parallel=model_parallel
    ) as cluster:
        results = cluster.results()
    expected = split_batches.whole_batches(split_batches.model())
    for result in results:
        assert result["devices"] == processes * devices
        assert_same(result, expected)
