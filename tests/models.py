"""Models whose outputs in each pass are chosen by the test, so that an oracle can compute with them."""

import keras
import numpy as np
from keras import ops


@keras.saving.register_keras_serializable("tests")
class Passes(keras.layers.Layer):
    """Returns its weights, `(m, N, …)`: in training those of all passes one after another, else those of the first.

    A gradient step on it shows the gradient of the objective with respect to every output of every pass.
    """

    rdrop_stochastic = True

    def __init__(self, values, activation=None, dtype=None, **kwargs):
        super().__init__(dtype=dtype, **kwargs)
        self.values = np.array(values, "float32")
        self.activation = keras.activations.get(activation)
        self.supports_masking = True

    def build(self, input_shape):
        self.w = self.add_weight(shape=self.values.shape, initializer=lambda shape, dtype: ops.cast(self.values, dtype))
        self.built = True

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor((None, *self.values.shape[2:]), dtype=self.compute_dtype)

    def call(self, inputs, training=None):
        w = ops.cast(self.w, self.compute_dtype)
        outputs = ops.reshape(w, (-1, *self.values.shape[2:])) if training else w[0]
        rows = ops.shape(inputs)[0]
        if not isinstance(rows, int) or rows <= outputs.shape[0]:
            return self.activation(outputs[:rows])
        # Symbolically at another batch size: as many rows as the inputs have.
        return self.activation(ops.repeat(outputs[:1], rows, axis=0))


def gradients_of_step(model, *args, **kwargs):
    """`(logs, gradients)` of one training step. The gradients are computed back from the change of the weights."""
    rate = 1e4  # Large, so that float32 keeps the digits of the gradient in the difference.
    model.optimizer.learning_rate = rate
    before = [to_numpy(v) for v in model.trainable_variables]
    logs = model.train_on_batch(*args, return_dict=True, **kwargs)
    after = [to_numpy(v) for v in model.trainable_variables]
    return logs, [(b.astype("float64") - a) / rate for b, a in zip(before, after)]


def logs_of_step(model, x, y):
    """The logs of one training step alone. Keras 3.14 averages over calls of `train_on_batch`."""
    model.reset_metrics()
    return model.train_on_batch(x, y, return_dict=True)


def to_numpy(variable):
    return np.array(ops.convert_to_numpy(variable.value))


def mlp(inputs=4, outputs=3, rate=0.3, activation=None, seed=1, **layers):
    """A classifier with dropout."""
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            keras.layers.Dense(8, activation="relu", **layers),
            keras.layers.Dropout(rate, seed=seed),
            keras.layers.Dense(outputs, activation=activation),
        ]
    )
