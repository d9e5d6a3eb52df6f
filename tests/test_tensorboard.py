"""What TensorBoard shows of a run, read back from its event files."""

import keras
import numpy as np
import pytest

import rdrop_keras
from marks import slow
from models import mlp

pytestmark = pytest.mark.needs("tensorboard", "tensorflow")

X = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def curves(folder):
    """`{tag: [value of each epoch]}`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["tensors"]
    return {tag: [tensor_util.make_ndarray(event.tensor_proto).item() for event in events.Tensors(tag)] for tag in tags}


@pytest.mark.parametrize("alpha", [slow(2.0, id="fixed"), pytest.param(rdrop_keras.KLBudget(0.1), id="budget")])
def test_tensorboard_shows_what_rdrop_logs(tmp_path, alpha):
    model = rdrop_keras.RDropModel(mlp(), alpha)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callbacks = [rdrop_keras.InconsistencyMonitor(X, Y, num_passes=2), keras.callbacks.TensorBoard(tmp_path)]
    history = model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=callbacks, verbose=0).history
    found = curves(tmp_path / "train")
    names = {"loss", "task_loss", "consistency_loss", "gap", "submodel_loss", "divergence", "agreement"}
    for name in names | ({"alpha"} if isinstance(alpha, rdrop_keras.KLBudget) else set()):
        np.testing.assert_allclose(found[f"epoch_{name}"], history[name], rtol=1e-6, err_msg=name)
    assert ("epoch_alpha" in found) == isinstance(alpha, rdrop_keras.KLBudget)
    np.testing.assert_allclose(curves(tmp_path / "validation")["epoch_loss"], history["val_loss"], rtol=1e-6)
