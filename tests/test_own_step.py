"""Training steps of one's own: what Keras's guides and papers write, moved as it is into a subclass of `RDropModel`.

The model's noise depends on row and pass alone, so that a step that changes nothing, such as SAM with a radius of 0,
has to be the step of `RDropModel` itself.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

from models import to_numpy
from rdrop_keras import KLBudget, RDropModel
from rdrop_keras.passes import tiling
from rdrop_keras.wrapper import step

BACKEND = keras.backend.backend()
X = np.random.RandomState(0).normal(size=(24, 4)).astype("float32")
Y = np.arange(24) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class NoiseOfTheRow(layers.Layer):
    """Scales rows by a factor that depends on the row and its pass alone."""

    rdrop_stochastic = True

    def call(self, inputs, training=None):
        made = step.current()
        if not training or made is None:
            return inputs
        passes = tiling.split(inputs, made.num_passes)
        return tiling.concatenate([x * (1 + 0.5 * i * ops.cos(7 * x)) for i, x in enumerate(passes)])


def inner():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((4,)), layers.Dense(16, "relu"), NoiseOfTheRow(), layers.Dense(3)])


def logs_and_weights(cls, metrics=("accuracy",), **options):
    model = cls(inner(), **{"alpha": 5.0, **options})
    model.compile(keras.optimizers.SGD(0.1), LOSS, metrics=list(metrics))
    history = model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0).history
    return model, history, [to_numpy(w) for w in model.weights]


def assert_same_weights(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# What the steps below share: a gradient on this backend, and its use. In JAX's they are functions of state.
if BACKEND == "tensorflow":
    import tensorflow as tf

    class Guide(RDropModel):
        """The step of Keras's guide, with its loop over metrics."""

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(y=y, y_pred=y_pred)
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    class Clipped(RDropModel):
        """Gradients clipped by hand."""

        norm = 1e9

        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred, sample_weight)
            gradients = tape.gradient(loss, self.trainable_variables)
            gradients, _ = tf.clip_by_global_norm(gradients, self.norm)
            self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
            return self.compute_metrics(x, y, y_pred, sample_weight)

    class SAM(RDropModel):
        """Sharpness-aware minimization; with `only`, AWP, which moves one kind of weights."""

        rho, only = 0.0, ""

        def train_step(self, data):
            x, y = data
            variables = self.trainable_variables
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            gradients = tape.gradient(loss, variables)
            scale = self.rho / (tf.linalg.global_norm(gradients) + 1e-12)
            moves = [g * scale * float(self.only in v.path) for g, v in zip(gradients, variables)]
            for variable, move in zip(variables, moves):
                variable.assign_add(move)
            with tf.GradientTape() as tape:
                y_pred = self(x, training=True)
                loss = self.compute_loss(x, y, y_pred)
            gradients = tape.gradient(loss, variables)
            for variable, move in zip(variables, moves):
                variable.assign_sub(move)
            self.optimizer.apply(gradients, variables)
            self._loss_tracker.update_state(loss)
            return self.compute_metrics(x, y, y_pred)

    class FGM(RDropModel):
        """The fast gradient method: the loss of inputs, and of inputs moved along its gradient."""

        epsilon = 0.0

        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = self.compute_loss(x, y, self(x, training=True))
            moved = x + self.epsilon * tf.sign(tape.gradient(loss, x))
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
                loss = 0.5 * (loss + self.compute_loss(moved, y, self(moved, training=True)))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    class Plain(RDropModel):
        """A loss that R-Drop does not see."""

        def train_step(self, data):
            with tf.GradientTape() as tape:
                loss = ops.mean(ops.square(self(data[0], training=True)))
            self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
            return {"loss": loss}

elif BACKEND == "torch":
    import torch

    class Guide(RDropModel):
        def train_step(self, data):
            x, y = data
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
            loss.backward()
            trainable_weights = list(self.trainable_weights)
            gradients = [v.value.grad for v in trainable_weights]
            with torch.no_grad():
                self.optimizer.apply(gradients, trainable_weights)
            for metric in self.metrics:
                if metric.name == "loss":
                    metric.update_state(loss)
                else:
                    metric.update_state(y, y_pred)
            return {m.name: m.result() for m in self.metrics}

    class Clipped(RDropModel):
        norm = 1e9

        def train_step(self, data):
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            self.zero_grad()
            y_pred = self(x, training=True)
            self.compute_loss(x, y, y_pred, sample_weight).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters(), self.norm)
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
            return self.compute_metrics(x, y, y_pred, sample_weight)

    class SAM(RDropModel):
        rho, only = 0.0, ""

        def train_step(self, data):
            x, y = data
            self.zero_grad()
            self.compute_loss(x, y, self(x, training=True)).backward()
            values = [v.value for v in self.trainable_weights]
            norm = torch.stack([value.grad.norm() for value in values]).norm() + 1e-12
            moves = [
                value.grad * self.rho / norm * float(self.only in v.path)
                for v, value in zip(self.trainable_weights, values)
            ]
            with torch.no_grad():
                for value, move in zip(values, moves):
                    value.add_(move)
            self.zero_grad()
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred)
            loss.backward()
            with torch.no_grad():
                for value, move in zip(values, moves):
                    value.sub_(move)
                self.optimizer.apply([value.grad for value in values], self.trainable_weights)
            self._loss_tracker.update_state(loss)
            return self.compute_metrics(x, y, y_pred)

    class FGM(RDropModel):
        epsilon = 0.0

        def train_step(self, data):
            x, y = data
            x = x.clone().requires_grad_(True)
            self.zero_grad()
            loss = self.compute_loss(x, y, self(x, training=True))
            (gradient,) = torch.autograd.grad(loss, x)
            moved = (x + self.epsilon * gradient.sign()).detach()
            x = x.detach()
            loss = self.compute_loss(x, y, self(x, training=True))
            loss = 0.5 * (loss + self.compute_loss(moved, y, self(moved, training=True)))
            loss.backward()
            with torch.no_grad():
                self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
            return {"loss": loss}

    class Plain(RDropModel):
        def train_step(self, data):
            loss = ops.mean(ops.square(self(data[0], training=True)))
            loss.backward()
            return {"loss": loss}

else:
    import jax

    class Guide(RDropModel):
        def loss_and_updates(self, trainable_variables, non_trainable_variables, x, y, training=False):
            y_pred, non_trainable_variables = self.stateless_call(
                trainable_variables, non_trainable_variables, x, training=training
            )
            loss = self.compute_loss(x, y, y_pred)
            return loss, (y_pred, non_trainable_variables)

        def train_step(self, state, data):
            trainable_variables, non_trainable_variables, optimizer_variables, metrics_variables = state
            x, y = data
            grad_fn = jax.value_and_grad(self.loss_and_updates, has_aux=True)
            (loss, (y_pred, non_trainable_variables)), grads = grad_fn(
                trainable_variables, non_trainable_variables, x, y, training=True
            )
            trainable_variables, optimizer_variables = self.optimizer.stateless_apply(
                optimizer_variables, grads, trainable_variables
            )
            new_metrics_vars = []
            logs = {}
            for metric in self.metrics:
                start = len(new_metrics_vars)
                this_metric_vars = metrics_variables[start : start + len(metric.variables)]
                if metric.name == "loss":
                    this_metric_vars = metric.stateless_update_state(this_metric_vars, loss)
                else:
                    this_metric_vars = metric.stateless_update_state(this_metric_vars, y, y_pred)
                logs[metric.name] = metric.stateless_result(this_metric_vars)
                new_metrics_vars += this_metric_vars
            return logs, (trainable_variables, non_trainable_variables, optimizer_variables, new_metrics_vars)

    class OnJAX(RDropModel):
        """A step from the gradient of the loss, a function of the weights."""

        def train_step(self, state, data):
            trainable, others, optimizer_variables, metrics = state
            x, y, _ = keras.utils.unpack_x_y_sample_weight(data)

            def loss_of(trainable, x):
                outputs, new = self.stateless_call(trainable, others, x, training=True)
                return self.compute_loss(x, y, outputs), new

            (loss, others), gradients = self.gradients(jax.value_and_grad(loss_of, has_aux=True), trainable, x)
            trainable, optimizer_variables = self.optimizer.stateless_apply(optimizer_variables, gradients, trainable)
            return {"loss": loss}, (trainable, others, optimizer_variables, metrics)

    class Clipped(OnJAX):
        norm = 1e9

        def gradients(self, gradient_of, trainable, x):
            result, gradients = gradient_of(trainable, x)
            norm = jax.numpy.sqrt(sum((g**2).sum() for g in gradients))
            return result, [g * jax.numpy.minimum(1, self.norm / norm) for g in gradients]

    class SAM(OnJAX):
        rho, only = 0.0, ""

        def gradients(self, gradient_of, trainable, x):
            _, gradients = gradient_of(trainable, x)
            scale = self.rho / (jax.numpy.sqrt(sum((g**2).sum() for g in gradients)) + 1e-12)
            moved = [
                w + g * scale * float(self.only in v.path)
                for w, g, v in zip(trainable, gradients, self.trainable_variables)
            ]
            return gradient_of(moved, x)

    class FGM(OnJAX):
        epsilon = 0.0

        def gradients(self, gradient_of, trainable, x):
            towards = jax.grad(lambda x: gradient_of(trainable, x)[0][0])(x)
            (loss, new), first = gradient_of(trainable, x)
            (other, _), second = gradient_of(trainable, x + self.epsilon * jax.numpy.sign(towards))
            return (0.5 * (loss + other), new), [0.5 * (a + b) for a, b in zip(first, second)]

    class Plain(OnJAX):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(ops.square(y_pred)) if training else super().compute_loss(x, y, y_pred, sample_weight)

        def gradients(self, gradient_of, trainable, x):
            return gradient_of(trainable, x)


class AWP(SAM):
    """Adversarial weight perturbation, of kernels alone."""

    only = "kernel"


@pytest.mark.parametrize("cls", [Guide, Clipped, SAM, AWP, FGM])
def test_a_step_that_changes_nothing_is_that_of_rdrop(cls):
    _, expected_logs, expected = logs_and_weights(RDropModel)
    model, logs, weights = logs_and_weights(cls)
    assert_same_weights(weights, expected)
    if cls is Guide:
        assert set(logs) == set(expected_logs)
        # The guide's loop counts each batch once, whatever its rows.
        for name in logs:
            np.testing.assert_allclose(logs[name], expected_logs[name], rtol=1e-4)
    validation = dict(zip(model.metrics_names, model.evaluate(X, Y, verbose=0)))
    assert set(validation) == {"loss", "compile_metrics"}


@pytest.mark.parametrize(
    "cls, setting", [(Clipped, {"norm": 0.1}), (SAM, {"rho": 0.5}), (AWP, {"rho": 0.5}), (FGM, {"epsilon": 0.2})]
)
def test_a_step_that_changes_something(cls, setting):
    _, _, expected = logs_and_weights(RDropModel)
    changed = type(cls.__name__, (cls,), setting)
    _, _, weights = logs_and_weights(changed)
    assert all(np.isfinite(w).all() for w in weights)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(weights, expected))
    _, _, plain = logs_and_weights(changed, alpha=0)
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(weights, plain))


def test_alpha_and_the_count_of_steps_move():
    def schedule(number):
        return ops.cast(number, "float32")

    for cls in (Guide, SAM):
        for alpha in (schedule, KLBudget(0.05, step=0.5)):
            expected_model, expected_logs, expected = logs_and_weights(RDropModel, alpha=alpha, every=2)
            model, logs, weights = logs_and_weights(cls, alpha=alpha, every=2)
            assert model._num_steps == expected_model._num_steps == 6
            assert_same_weights(weights, expected)
            alphas = [float(ops.convert_to_numpy(each._alpha.current())) for each in (model, expected_model)]
            np.testing.assert_allclose(*alphas, rtol=1e-4)
            if cls is Guide:
                np.testing.assert_allclose(logs["alpha"], expected_logs["alpha"], rtol=1e-4)


def test_alpha_0_is_the_step_itself():
    plain = inner()
    plain.compile(keras.optimizers.SGD(0.1), LOSS)
    plain.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    _, _, weights = logs_and_weights(Guide, alpha=0)
    assert_same_weights(weights, [to_numpy(w) for w in plain.weights])


def test_a_function_that_is_assigned_is_a_step_of_rdrop():
    _, _, expected = logs_and_weights(RDropModel)
    model = RDropModel(inner(), alpha=5.0)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    calls = []

    def train_step(*args):
        calls.append(step.current().num_passes)
        return keras.Model.train_step(model, *args)

    model.train_step = train_step
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    assert set(calls) == {2}
    assert_same_weights([to_numpy(w) for w in model.weights], expected)


def test_a_loss_that_rdrop_does_not_see_is_an_error():
    with pytest.raises(RuntimeError, match=r"must take its loss from `self.compute_loss.*all 2 passes.*without R-Drop"):
        logs_and_weights(Plain)
    logs_and_weights(Plain, alpha=0)


def test_rows_of_all_passes_are_told():
    class OwnLoss(RDropModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(keras.losses.mean_squared_error(ops.one_hot(y, 3), y_pred))

    with pytest.raises(
        ValueError, match=r"before its `compute_loss`.*rows of all 2 passes.*goes to `compile`.*Received"
    ):
        logs_and_weights(OwnLoss)


def test_a_loss_that_adds_to_that_of_rdrop():
    class Added(RDropModel):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return super().compute_loss(x, y, y_pred, sample_weight, training) + 1.0

    _, expected, weights = logs_and_weights(RDropModel)
    _, logs, same = logs_and_weights(Added)
    np.testing.assert_allclose(logs["loss"], np.array(expected["loss"]) + 1, rtol=1e-5)
    assert_same_weights(same, weights)


def test_training_step_needs_a_compiled_loss():
    model = RDropModel(inner())
    message = r"`training_step` needs the compiled loss of this RDropModel: `compile"
    with pytest.raises(RuntimeError, match=message), model.training_step():
        pass


def test_outputs_of_the_model_inside_are_an_error():
    model = RDropModel(inner())
    model.compile("sgd", LOSS)
    message = r"must come from `self\(x, training=True\)`, which makes all passes"
    with pytest.raises(ValueError, match=message), model.training_step():
        model.compute_loss(X, Y, model.model(X, training=True))


def test_inference_in_a_step_is_that_of_the_model():
    """AdaMatch and virtual adversarial training call the model both ways."""
    model = RDropModel(inner())
    model.compile("sgd", LOSS)
    with model.training_step():
        clean, passes = model(X, training=False), model(X, training=True)
        model.compute_loss(X, ops.convert_to_tensor(Y), passes)
    np.testing.assert_allclose(ops.convert_to_numpy(clean), model.model.predict(X, verbose=0), rtol=1e-6)
    assert clean.shape == (24, 3) and passes.shape == (48, 3)


def test_a_call_that_leaves_dropout_off_is_an_error():
    model = RDropModel(inner())
    model.compile("sgd", LOSS)
    with (
        pytest.raises(ValueError, match=r"in training mode, `self\(x, training=True\)`.* Received: training=None"),
        model.training_step(),
    ):
        model(X)


def test_the_step_of_a_mixin_is_a_step_of_rdrop():
    written = {**vars(Guide), "train_step": Guide.train_step.__wrapped__}
    mixin = type("Mixin", (), {name: value for name, value in written.items() if not name.startswith("__")})
    _, history, weights = logs_and_weights(type("Mixed", (mixin, RDropModel), {}))
    _, expected, expected_weights = logs_and_weights(Guide)
    assert min(history["consistency_loss"]) > 0
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same_weights(weights, expected_weights)
