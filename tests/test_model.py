"""RDropModel behaves like the Keras model it wraps, without R-Drop outside of training."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from marks import slow
from models import Passes, gradients_of_step, mlp, to_numpy
from rdrop_keras import RDropModel

BACKEND = keras.backend.backend()
CROSS_ENTROPY = losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.RandomState(0).normal(size=(37, 4)).astype("float32")
Y = (X[:, 0] + X[:, 1] > 0).astype("int32") + (X[:, 2] > 1)


class AlternatingNoise(layers.Layer):
    """Noise that is the same in every step and differs between the rows of a batch."""

    rdrop_stochastic = True

    def call(self, inputs, training=None):
        if not training:
            return inputs
        return inputs * (1 + 0.5 * ops.sin(ops.cast(ops.arange(ops.shape(inputs)[0]), inputs.dtype)))[:, None]


def compiled(model, alpha=2.0, optimizer="sgd", loss=CROSS_ENTROPY, num_passes=2, **kwargs):
    model = RDropModel(model, alpha, num_passes=num_passes)
    model.compile(optimizer, loss, metrics=["accuracy"], **kwargs)
    return model


# Models, one for each kind that Keras has: name -> builder.


class HandsTrainingOn(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense, self.dropout, self.head = layers.Dense(8), layers.Dropout(0.3, seed=1), layers.Dense(3)

    def call(self, inputs, training=None):
        return self.head(self.dropout(self.dense(inputs), training=training))


class LeavesTrainingToKeras(HandsTrainingOn):
    def call(self, inputs, training=None):
        return self.head(self.dropout(self.dense(inputs)))


class TakesNoTraining(HandsTrainingOn):
    def call(self, inputs):
        return self.head(self.dropout(self.dense(inputs)))


def functional():
    x = keras.Input((4,))
    h = layers.Dense(8, kernel_regularizer="l2")(x)
    h = layers.BatchNormalization()(h)
    h = layers.GaussianNoise(0.1, seed=3)(layers.Dropout(0.2, seed=2)(h))
    return keras.Model(x, layers.Dense(3)(h))


def recurrent():
    return keras.Sequential(
        [
            keras.Input((4, 1)),
            layers.LSTM(5, dropout=0.2, recurrent_dropout=0.2, return_sequences=True, seed=4),
            layers.Bidirectional(layers.GRU(3, dropout=0.1, seed=5)),
            layers.Dense(3),
        ]
    )


def frozen():
    model = mlp()
    model.layers[0].trainable = False
    return model


MODELS = {
    "sequential": mlp,
    "functional": functional,
    "recurrent": recurrent,
    "frozen": frozen,
    "unbuilt": lambda: keras.Sequential([layers.Dense(8), layers.Dropout(0.3, seed=1), layers.Dense(3)]),
    "hands training on": HandsTrainingOn,
    "leaves training to Keras": LeavesTrainingToKeras,
    "takes no training": TakesNoTraining,
    "nested": lambda: keras.Sequential([keras.Input((4,)), functional(), layers.Dropout(0.1, seed=6)]),
}


@pytest.mark.parametrize(
    "name, policy",
    [("functional", "mixed_float16"), ("frozen", "float32"), ("unbuilt", "float32")]
    + [slow(name, "float32") for name in MODELS if name not in ("frozen", "unbuilt")]
    + [slow("functional", "mixed_bfloat16"), slow("unbuilt", "mixed_bfloat16"), slow("unbuilt", "mixed_float16")],
)
def test_alpha_0_is_the_bare_model_bit_for_bit(name, policy):
    x = X[..., None] if name == "recurrent" else X

    def train(wrap):
        keras.utils.set_random_seed(7)
        keras.config.set_dtype_policy(policy)
        model = wrap(MODELS[name]())
        model.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY, metrics=["accuracy"])
        history = model.fit(x, Y, epochs=2, batch_size=8, validation_split=0.2, verbose=0).history
        return (
            history,
            [to_numpy(w) for w in model.weights],
            model.evaluate(x, Y, verbose=0),
            model.predict(x, verbose=0),
        )

    bare, wrapped = train(lambda model: model), train(lambda model: RDropModel(model, alpha=0))
    assert bare[0] == wrapped[0]  # The same keys and, to the bit, the same numbers.
    for a, b in zip(bare[1], wrapped[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert bare[2] == wrapped[2]
    np.testing.assert_array_equal(bare[3], wrapped[3])


@pytest.mark.parametrize(
    "mode",
    [
        {"run_eagerly": True},
        # PyTorch's compiler emits warnings, and fails if they are errors.
        pytest.param({"jit_compile": True}, marks=pytest.mark.filterwarnings("ignore")),
        # Keras has none on PyTorch.
        pytest.param({"steps_per_execution": 3}, marks=pytest.mark.backends("tensorflow", "jax")),
        {},
    ],
    ids=str,
)
def test_modes_of_compile_agree(mode):
    def train(**mode):
        keras.utils.set_random_seed(3)
        x = keras.Input((4,))
        h = AlternatingNoise()(layers.Dense(8, activation="relu")(x))  # XLA draws other random numbers.
        model = compiled(keras.Model(x, layers.Dense(3)(h)), **mode)
        return model.fit(X[:32], Y[:32], epochs=2, batch_size=8, verbose=0, shuffle=False).history

    history = train(**mode)
    assert sorted(history) == ["accuracy", "consistency_loss", "loss", "task_loss"]
    for key, values in train(run_eagerly=True).items():
        assert history[key] == pytest.approx(values, rel=1e-4)
    consistency = np.array(history["consistency_loss"])
    assert (consistency > 0).all()
    assert history["loss"] == pytest.approx(np.array(history["task_loss"]) + 2.0 / 2 * consistency, rel=1e-5)


def trained_on(*data, **kwargs):
    keras.utils.set_random_seed(3)
    model = compiled(mlp())
    return model.fit(*data, verbose=0, shuffle=False, validation_data=(X, Y), **kwargs).history


@pytest.fixture(scope="module")
def trained_on_arrays():
    return trained_on(X, Y, batch_size=8)


def datasets():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return X[index * 8 : index * 8 + 8], Y[index * 8 : index * 8 + 8]

    def generator():
        yield from Batches()

    def tf_data():
        import tensorflow as tf

        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

    def data_loader():
        import torch

        dataset = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(Y))
        return torch.utils.data.DataLoader(dataset, batch_size=8)

    return {"PyDataset": Batches, "generator": generator, "tf.data": tf_data, "DataLoader": data_loader}


@pytest.mark.parametrize(
    "kind",
    [
        "PyDataset",
        "generator",
        pytest.param("tf.data", marks=pytest.mark.needs("tensorflow")),
        pytest.param("DataLoader", marks=pytest.mark.backends("torch")),
    ],
)
def test_datasets_are_as_arrays(kind, trained_on_arrays):
    history = trained_on(datasets()[kind]())
    for key, values in trained_on_arrays.items():
        assert history[key] == pytest.approx(values, rel=1e-5)


def test_last_batch_of_one():
    model = compiled(mlp(), num_passes=3)
    history = model.fit(X, Y, batch_size=36, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all() and (np.array(history["consistency_loss"]) > 0).all()


def test_batch_methods():
    model = compiled(mlp())
    loss, accuracy = model.train_on_batch(X, Y)  # As the model alone returns them.
    assert np.isfinite(loss) and 0 <= accuracy <= 1
    assert sorted(model.train_on_batch(X, Y, return_dict=True)) == ["accuracy", "consistency_loss", "loss", "task_loss"]
    assert sorted(model.test_on_batch(X, Y, return_dict=True)) == ["accuracy", "loss"]
    np.testing.assert_allclose(
        model.predict_on_batch(X), ops.convert_to_numpy(model.model(X, training=False)), rtol=1e-5, atol=1e-6
    )


@keras.saving.register_keras_serializable("tests")
class Spy(layers.Layer):
    """Records the number of rows and the phase of each call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def call(self, inputs, training=None):
        if isinstance(inputs.shape[0], int):  # Not while Keras infers shapes.
            self.calls.append((inputs.shape[0], bool(training)))
        return inputs


@pytest.mark.parametrize("num_passes", [2, 3])
def test_one_call_a_step_and_no_second_pass_at_inference(num_passes):
    spy = Spy()
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(3)(spy(layers.Dropout(0.3)(x))))
    model = compiled(model, num_passes=num_passes, run_eagerly=True)
    model.fit(X[:8], Y[:8], batch_size=4, verbose=0)
    tiled = 4 * num_passes
    assert spy.calls[-2:] == [(tiled, True)] * 2 and (4, True) not in spy.calls
    spy.calls.clear()
    model.evaluate(X[:8], Y[:8], batch_size=4, verbose=0)
    model.predict(X[:8], batch_size=4, verbose=0)
    model(X[:4])
    assert set(spy.calls) == {(4, False)}
    assert len(spy.calls) <= 6  # Two batches each, one call, and Keras's calls to infer shapes.


def test_validation_is_that_of_the_wrapped_model():
    model = compiled(mlp(rate=0.5))
    history = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
    assert sorted(k for k in history if k.startswith("val_")) == ["val_accuracy", "val_loss"]
    model.model.compile(loss=CROSS_ENTROPY)
    assert history["val_loss"][0] == pytest.approx(model.model.evaluate(X, Y, verbose=0), rel=1e-5)
    assert model.evaluate(X, Y, verbose=0, return_dict=True).keys() == {"accuracy", "loss"}
    assert model.metrics[-1].name == "rdrop"  # It has the two more that training reports.


def test_progress_bar(capsys):
    compiled(mlp()).fit(X, Y, verbose=2)
    shown = capsys.readouterr().out
    assert all(f"{name}: " in shown for name in ("accuracy", "consistency_loss", "task_loss", " loss"))


def test_called_directly_it_is_the_wrapped_model():
    model = compiled(mlp(rate=0.5))
    plain = ops.convert_to_numpy(model.model(X))
    np.testing.assert_allclose(ops.convert_to_numpy(model(X)), plain, rtol=1e-6)
    assert model(X, training=True).shape == (37, 3)  # Dropout on, still one pass.
    assert not np.allclose(ops.convert_to_numpy(model(X, training=True)), plain)
    outputs = model(keras.Input((4,)))
    assert outputs.shape == (None, 3)


def test_gradient_accumulation():
    passes = np.random.normal(size=(2, 3, 5)).astype("float32")
    x, y = np.zeros((3, 1)), np.array([0, 2, 1])

    def model_with(optimizer):
        inputs = keras.Input((1,))
        model = RDropModel(keras.Model(inputs, Passes(passes)(inputs)))
        model.compile(optimizer, CROSS_ENTROPY)
        return model

    _, (once,) = gradients_of_step(model_with(keras.optimizers.SGD()), x, y)
    model = model_with(keras.optimizers.SGD(1e4, gradient_accumulation_steps=2))
    model.train_on_batch(x, y)
    np.testing.assert_array_equal(to_numpy(model.trainable_variables[0]), passes)
    model.train_on_batch(x, y)  # The mean of two equal gradients.
    np.testing.assert_allclose((passes - to_numpy(model.trainable_variables[0])) / 1e4, once, rtol=1e-4, atol=1e-7)


def test_float16_scales_the_loss():
    keras.config.set_dtype_policy("mixed_float16")
    inner = mlp()
    keras.config.set_dtype_policy("float32")  # The model's policy decides, not the one in force when it is wrapped.
    model = compiled(inner, optimizer="adam")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = [to_numpy(w) for w in model.trainable_variables]
    history = model.fit(X, Y, epochs=3, verbose=0).history
    assert np.isfinite(history["loss"]).all() and history["consistency_loss"][-1] > 0
    assert any((to_numpy(w) != b).any() for w, b in zip(model.trainable_variables, before))


def test_inputs_are_cast_by_the_model_alone():
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((4,))  # float32, as the first layer needs it: float16 ends at 65,504.
    h = layers.Dropout(0.1)(layers.Rescaling(1e-6, dtype="float32")(x))
    model = compiled(keras.Model(x, layers.Dense(3)(h)))
    np.testing.assert_array_equal(model.predict(1e6 * X, verbose=0), model.model.predict(1e6 * X, verbose=0))
    assert np.isfinite(model.fit(1e6 * X, Y, verbose=0).history["task_loss"]).all()


def test_batch_normalization_sees_the_statistics_of_the_batch():
    def moving(wrap):
        keras.utils.set_random_seed(1)
        norm = layers.BatchNormalization(momentum=0.0)
        x = keras.Input((4,))
        model = wrap(keras.Model(x, layers.Dense(3)(layers.Dropout(0.5)(norm(layers.Dense(5)(x))))))
        model.compile("sgd", CROSS_ENTROPY)
        model.train_on_batch(X, Y)
        return [to_numpy(w) for w in norm.non_trainable_variables]

    for plain, paired in zip(moving(lambda m: m), moving(RDropModel)):
        np.testing.assert_allclose(paired, plain, rtol=1e-5, atol=1e-6)


def test_frozen_layers_stay_and_regularizers_act():
    model = compiled(frozen())
    kernel = to_numpy(model.model.layers[0].kernel)
    model.fit(X, Y, verbose=0)
    np.testing.assert_array_equal(to_numpy(model.model.layers[0].kernel), kernel)
    assert len(model.trainable_variables) == 2


@pytest.mark.parametrize(
    "name", ["unbuilt", slow("recurrent"), "hands training on", "leaves training to Keras", "nested"]
)
def test_every_kind_of_model_trains(name):
    x = X[..., None] if name == "recurrent" else X
    model = compiled(MODELS[name](), optimizer=keras.optimizers.Adam(0.02))
    history = model.fit(x, Y, epochs=8, batch_size=8, verbose=0).history
    assert history["task_loss"][-1] < history["task_loss"][0]
    assert all(value > 0 for value in history["consistency_loss"])


@pytest.mark.backends("tensorflow")
def test_sparse_inputs():
    import tensorflow as tf

    model = compiled(mlp())
    dense = tf.constant(np.where(X > 0.5, X, 0))
    data = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(dense), Y)).batch(8)
    history = model.fit(data, verbose=0).history
    assert np.isfinite(history["loss"]).all() and history["consistency_loss"][0] > 0


def test_optional_inputs_stay_none():
    class Optional(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def call(self, inputs, training=None):
            assert inputs["extra"] is None
            return self.inner(inputs["x"], training=training)

    model = compiled(Optional())
    assert np.isfinite(model.train_on_batch({"x": X, "extra": None}, Y, return_dict=True)["loss"])


# Callbacks


def test_callbacks(tmp_path):
    model = compiled(mlp())
    callbacks = [
        keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=10.0, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("consistency_loss", mode="min", patience=1, min_delta=10.0),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"), monitor="val_loss"),
        keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: logs["task_loss"]),
    ]
    history = model.fit(X, Y, validation_data=(X, Y), epochs=5, callbacks=callbacks, verbose=0)
    assert len(history.history["loss"]) == 2  # Stopped.
    assert (tmp_path / "log.csv").read_text().startswith("epoch,accuracy,consistency_loss")
    again = keras.models.load_model(tmp_path / "2.keras")
    assert again.evaluate(X, Y, verbose=0)[0] == pytest.approx(history.history["val_loss"][1], rel=1e-5)


@pytest.mark.needs("tensorflow")
def test_tensor_board(tmp_path):
    model = compiled(mlp())
    model.fit(X, Y, validation_data=(X, Y), verbose=0, callbacks=[keras.callbacks.TensorBoard(str(tmp_path))])
    assert list(tmp_path.glob("train/*")) and list(tmp_path.glob("validation/*"))


def test_nan_in_the_data_terminates():
    model = compiled(keras.Sequential([keras.Input((4,)), layers.Dropout(0.1), layers.Dense(3)]))
    x = np.where(np.arange(37)[:, None] == 5, np.nan, X)
    history = model.fit(x, Y, epochs=50, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert len(history.history["loss"]) == 1 and np.isnan(history.history["loss"][0])


def test_learning_still_works_after_an_interruption():
    model = compiled(mlp(), run_eagerly=True)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, verbose=0, callbacks=[Stop()])
    assert model.evaluate(X, Y, verbose=0, return_dict=True).keys() == {"accuracy", "loss"}
    assert model(X).shape == (37, 3)
    assert np.isfinite(model.fit(X, Y, verbose=0).history["loss"][0])


# Errors


@pytest.mark.parametrize("model", ["mlp", layers.Dense(3), None, lambda x: x])
def test_model_must_be_a_model(model):
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: model=.*\(\w+\)"):
        RDropModel(model)


def test_wrapping_twice():
    once = RDropModel(mlp(), name="once")
    for model in (once, keras.Sequential([keras.Input((4,)), once, layers.Dropout(0.1)])):
        with pytest.raises(ValueError, match=r"is or holds an RDropModel: use .* its `.model`. Received: 'once'"):
            RDropModel(model)


@pytest.mark.parametrize("alpha", [-1, -0.5, float("nan"), float("inf")])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"`alpha` must be a finite number ≥ 0. Received: alpha=.* \((int|float)\)"):
        RDropModel(mlp(), alpha=alpha)


@pytest.mark.parametrize("alpha", [True, "5", None, [1.0]])
def test_alpha_of_another_type(alpha):
    with pytest.raises(
        TypeError,
        match=r"`alpha` must be a number ≥ 0, a LearningRateSchedule, a KL.*alpha=.* \((bool|str|NoneType|list)\)",
    ):
        RDropModel(mlp(), alpha=alpha)


def test_num_passes():
    for value in (1, 0, -2):
        with pytest.raises(ValueError, match=rf"`num_passes` must be an integer ≥ 2. Received: num_passes={value}"):
            RDropModel(mlp(), num_passes=value)
    for value in (2.0, "2", True):
        with pytest.raises(TypeError, match=r"`num_passes` must be an integer ≥ 2"):
            RDropModel(mlp(), num_passes=value)


def test_divergence():
    choices = r"'auto', 'bernoulli_kl', 'js', 'kl', 'mse'"
    for value in ("KL", {"out": "euclid"}, ["l2"]):
        with pytest.raises(ValueError, match=rf"`divergence` must be one of {choices}, a rdrop_keras.Divergence or a"):
            RDropModel(mlp(), divergence=value)
    for value in (None, 3, {"out": 1.0}):
        with pytest.raises(TypeError, match=rf"`divergence` must be one of {choices}"):
            RDropModel(mlp(), divergence=value)


def two_headed():
    x = keras.Input((4,))
    h = layers.Dropout(0.1)(x)
    return keras.Model(x, {"one": layers.Dense(3, name="one")(h), "two": layers.Dense(1, name="two")(h)})


def own_loss(y_true, y_pred):
    return ops.mean(ops.square(y_pred), axis=-1)


def test_loss_that_does_not_tell_the_divergence():
    model = RDropModel(two_headed())
    with pytest.raises(ValueError, match=r"cannot read a divergence off the loss of output 'two': own_loss. Say what"):
        model.compile("sgd", {"one": CROSS_ENTROPY, "two": own_loss})
    assert not model.compiled
    with pytest.raises(ValueError, match=r"the loss of .*: Hinge"):
        RDropModel(mlp()).compile("sgd", losses.Hinge())


def test_divergences_that_do_not_match_the_outputs():
    with pytest.raises(
        ValueError, match=r"keys of `divergence` must be names of outputs: 'one', 'two'. Received: 'three'"
    ):
        RDropModel(two_headed(), divergence={"one": "kl", "three": "mse"}).compile("sgd", {"one": "mse", "two": "mse"})
    with pytest.raises(ValueError, match=r"one entry for each of the 2 outputs.*Received: 3 entries"):
        RDropModel(two_headed(), divergence=["mse"] * 3).compile("sgd", {"one": "mse", "two": "mse"})
    model = RDropModel(two_headed(), divergence={"one": "mse"})
    model.compile("sgd", {"one": "mse", "two": "mse"})
    with pytest.raises(ValueError, match=r"an entry for every output with a loss. Received: none for output 'two'"):
        model.fit(X, {"one": np.zeros((37, 3)), "two": np.zeros((37, 1))}, verbose=0)


@pytest.mark.parametrize("loss", [None, {"one": None, "two": None}])
def test_no_loss(loss):
    with pytest.raises(ValueError, match=r"R-Drop needs a compiled `loss`"):
        RDropModel(two_headed()).compile("sgd", loss)


def test_one_loss_for_a_nested_output():
    class Nested(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = two_headed()

        def call(self, inputs, training=None):
            return {"both": self.inner(inputs, training=training)}

    model = RDropModel(Nested(), divergence="mse")
    model.compile("sgd", {"both": lambda y_true, y_pred: ops.mean(y_pred["one"] - y_true["one"])})
    y = {"both": {"one": np.zeros((37, 3), "float32"), "two": np.zeros((37, 1), "float32")}}
    with pytest.raises(ValueError, match=r"a loss for each output tensor. Received: one loss for the nested output"):
        model.fit(X, y, verbose=0)


def test_no_stochastic_layer():
    with pytest.raises(ValueError, match=r"R-Drop needs a layer that is random in training.*dropout layers are: none"):
        RDropModel(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    x = keras.Input((4, 2))
    h = layers.LSTM(3, recurrent_dropout=0.0, name="lstm")(layers.Dropout(0.0, name="drop")(x))
    with pytest.raises(ValueError, match=r"`alpha=0`.*drop rate=0.0, .*lstm_cell.* dropout=0.0 recurrent_dropout=0.0"):
        RDropModel(keras.Model(x, h))
    RDropModel(keras.Model(x, h), alpha=0)

    class Late(keras.Model):
        def build(self, input_shape):
            self.dropout, self.dense = layers.Dropout(0.0, name="late"), layers.Dense(3)
            self.dense.build(input_shape)

        def call(self, inputs, training=None):
            return self.dense(self.dropout(inputs, training=training))

    model = compiled(Late())
    with pytest.raises(ValueError, match=r"dropout layers are: .*late rate=0.0"):
        model.fit(X, Y, verbose=0)


def test_dropout_that_keras_keeps_off():
    model = compiled(TakesNoTraining())
    with pytest.raises(ValueError, match=r"`TakesNoTraining.call` has no `training` argument"):
        model.fit(X, Y, verbose=0)


def test_overridden_steps():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(y_pred)

    x = keras.Input((4,))
    with pytest.raises(
        ValueError, match=r"`Own` overrides `compute_loss`, which an RDropModel around it would pass by"
    ):
        RDropModel(Own(x, layers.Dropout(0.1)(x)))


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
def test_no_targets(metrics):
    model = RDropModel(mlp())
    model.compile("sgd", CROSS_ENTROPY, metrics=metrics)
    with pytest.raises(ValueError, match=r"The compiled loss needs targets: `fit\(x, y\)`.*Received: no `y`"):
        model.fit(X, verbose=0)


def test_auto_of_keras_hub():
    for arguments in (("auto", "auto"), ("adam", "auto"), ("auto", CROSS_ENTROPY)):
        with pytest.raises(ValueError, match=r"'auto' is for KerasHub's tasks.*`compile\(keras.optimizers.Adam"):
            RDropModel(mlp()).compile(*arguments)


class Halves(layers.Layer):
    """Random to R-Drop, and the same for a row whatever the batch: it differs between the halves of the rows alone."""

    rdrop_stochastic = True

    def call(self, inputs, training=None):
        if not training:
            return inputs
        rows = ops.shape(inputs)[0]
        second = ops.cast(ops.arange(rows) >= rows // 2, inputs.dtype)[:, None]
        return inputs * (1 + 0.5 * ops.sin(3 * inputs) * (1 - 2 * second))


@pytest.mark.parametrize("num_steps", [1, 3])
def test_half_the_rows_twice(num_steps):
    """R-Drop in the memory of plain training: half the rows, and gradients gathered over two steps."""
    weights = []
    for batch_size, steps in ((8, None), (4, 2)):
        keras.utils.set_random_seed(3)
        inner = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), Halves(), layers.Dense(3)])
        model = RDropModel(inner, 3.0)
        optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=steps)
        model.compile(optimizer, CROSS_ENTROPY)
        x, y = np.tile(X[:8], (num_steps, 1)), np.tile(Y[:8], num_steps)
        model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0)
        weights.append(model.get_weights())
    for full, halves in zip(*weights):
        np.testing.assert_allclose(full, halves, rtol=1e-5, atol=1e-6)
