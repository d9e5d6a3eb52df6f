"""Models whose rows depend on each other: their passes run one after another, or the model is refused."""

import contextlib
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

from models import mlp
from rdrop_keras import Divergence, RDropModel, inconsistency, sharing
from rdrop_keras.passes import Passes
from rdrop_keras.passes.graph import PairedGraph

N = 16
X = np.random.RandomState(0).normal(size=(N, 6)).astype("float32")
Y = np.arange(N) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
# So low that nothing is ever dropped. R-Drop's task loss is then the loss of plain training.
NEVER = 1e-7


def fit(model, x=X, y=Y, **kwargs):
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    options = {"batch_size": N, "epochs": 2, "shuffle": False, "verbose": 0}
    return model.fit(x, y, **{**options, **kwargs}).history


def functional(function, shape=(6,), rate=NEVER, **kwargs):
    """A Functional model of `function` after dropout, made of layers and operations."""
    inputs = keras.Input(shape, **kwargs)
    return keras.Model(inputs, function(layers.Dropout(rate, seed=1)(inputs)))


def dense(x):
    return layers.Dense(3)(x)


class Subclassed(keras.Model):
    def __init__(self, function, rate=NEVER):
        super().__init__()
        self.dropout, self.dense = layers.Dropout(rate, seed=1), layers.Dense(3)
        self.function = function

    def call(self, inputs, training=None):
        return self.function(self.dense(self.dropout(inputs, training=training)))


def similarities(x):
    """In-batch negatives: (N, N) logits of rows with rows."""
    return ops.matmul(x, ops.transpose(x))


def attention_over_rows(x):
    return ops.matmul(ops.softmax(similarities(x)), x)


def told_of_equal_passes():
    return pytest.warns(UserWarning, match="The passes of R-Drop did not differ")


RELATED = {
    "similarities": lambda: functional(lambda x: similarities(dense(x))),
    "attention": lambda: functional(lambda x: dense(attention_over_rows(x))),
    "centred": lambda: functional(lambda x: dense(x - ops.mean(x, axis=0))),
    "centred, axis kept": lambda: functional(lambda x: dense(x - ops.mean(x, axis=0, keepdims=True))),
    "softmax over rows": lambda: functional(lambda x: dense(ops.softmax(x, axis=0))),
    "softmax layer over rows": lambda: functional(lambda x: dense(layers.Softmax(axis=0)(x))),
    "cumulated": lambda: functional(lambda x: dense(ops.cumsum(x, axis=-2))),
    "subclassed similarities": lambda: Subclassed(similarities),
}


@pytest.mark.parametrize("name", RELATED)
def test_rows_that_relate_to_each_other(name):
    """With dropout that drops nothing R-Drop is plain training."""
    histories = []
    for wrap in (lambda model: model, RDropModel):
        keras.utils.set_random_seed(2)
        model = wrap(RELATED[name]())
        y = np.arange(N) if "similarities" in name else Y
        with (
            pytest.warns(UserWarning, match="did not differ")
            if isinstance(model, RDropModel)
            else contextlib.nullcontext()
        ):
            histories.append(fit(model, y=y))
    plain, paired = histories
    np.testing.assert_allclose(paired["loss"], plain["loss"], rtol=1e-5)
    np.testing.assert_allclose(paired["task_loss"], plain["loss"], rtol=1e-5)


def test_related_rows_differ_between_passes():
    model = RDropModel(functional(lambda x: similarities(dense(x)), rate=0.3))
    assert min(fit(model, y=np.arange(N))["consistency_loss"]) > 0
    assert inconsistency(model, X, np.arange(N), num_passes=3, batch_size=N).divergence.value > 0
    assert "relates rows of a batch to each other" in sharing(model).summary


ALONE = {
    "row by row": lambda x: dense(ops.softmax(x, axis=-1) + ops.mean(x, axis=1, keepdims=True)),
    "rows cut into parts": lambda x: dense(ops.reshape(layers.Dense(2)(ops.reshape(x, (-1, 2))), (-1, 6))),
    "a table looked up": lambda x: dense(layers.Embedding(5, 4)(ops.cast(x > 0, "int32"))[:, 0]),
    "attention": lambda x: dense(layers.Flatten()(layers.MultiHeadAttention(1, 2)(*[layers.Reshape((3, 2))(x)] * 2))),
    "normalized": lambda x: dense(layers.BatchNormalization()(x)),
}


@pytest.mark.parametrize("name", ALONE)
def test_rows_on_their_own_run_together(name):
    model = RDropModel(functional(ALONE[name]))
    assert "one pass after another" not in sharing(model).summary


DRAWN_ONCE = {
    "one mask": lambda: keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, noise_shape=(1, 6)), layers.Dense(3)]),
    "nested": lambda: keras.Sequential(
        [
            keras.Input((6,)),
            keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, noise_shape=(1, 6))]),
            layers.Dense(3),
        ]
    ),
    "subclassed": lambda: WithOneMask(),
    "crop": lambda: keras.Sequential(
        [
            keras.Input((6,)),
            layers.Reshape((2, 3, 1)),
            layers.Resizing(6, 6),
            layers.RandomCrop(2, 2),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ]
    ),
}


class WithOneMask(keras.Model):
    def __init__(self, dropout=None):
        super().__init__()
        self.dropout, self.dense = dropout or layers.Dropout(0.5, noise_shape=(1, 6)), layers.Dense(3)

    def call(self, inputs, training=None):
        return self.dense(self.dropout(inputs, training=training))


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_numbers_drawn_once_a_batch_are_drawn_for_each_pass(name):
    assert min(fit(RDropModel(DRAWN_ONCE[name]()))["consistency_loss"]) > 0


# Of inputs of shape (N, 3, 2).
NOISE_SHAPES = [(1, 3, 2), (N, 1, 2), (N, 3, 2), (3, 2), (1, 2), (2,), (1,), ()]


@pytest.mark.parametrize("kind", [layers.Dropout, layers.AlphaDropout])
@pytest.mark.parametrize("noise_shape", NOISE_SHAPES)
def test_noise_of_one_shape_for_a_whole_batch(noise_shape, kind):
    """Each pass has a mask of its own, and is plain training with that mask."""
    model = keras.Sequential(
        [keras.Input((6,)), layers.Reshape((3, 2)), kind(0.5, noise_shape=noise_shape, seed=1), layers.Flatten()]
    )
    assert f"'{model.layers[1].name}' draws once for a whole batch" in sharing(model).summary
    outputs = ops.convert_to_numpy(Passes(model)(ops.ones((N, 6)), 8, True)).reshape(8, N, 6)
    assert len(np.unique(outputs.reshape(8, -1), axis=0)) > 1
    if noise_shape[:1] != (N,):
        np.testing.assert_array_equal(outputs, np.broadcast_to(outputs[:, :1], outputs.shape))


def test_noise_of_one_shape_in_a_subclassed_model():
    for noise_shape in [(N, 6), (6,)]:
        assert min(fit(RDropModel(WithOneMask(layers.Dropout(0.5, noise_shape, seed=1))))["consistency_loss"]) > 0


def test_noise_for_each_row_is_drawn_for_all_passes_together():
    for noise_shape in [None, (None, 1), [None, 6]]:
        model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, noise_shape), layers.Dense(3)])
        assert "one pass after another" not in sharing(model).summary


class GraphConvolution(layers.Layer):
    """Of features (N, F) and neighbours (N, N), as in a full batch that holds all nodes of a graph."""

    def build(self, features_shape, neighbours_shape):
        self.kernel = self.add_weight(shape=(features_shape[-1], 3))

    def call(self, features, neighbours):
        return ops.matmul(neighbours, ops.matmul(features, self.kernel))

    def compute_output_shape(self, features_shape, neighbours_shape):
        return (features_shape[0], 3)


def convolution(features, neighbours):
    return GraphConvolution()(features, neighbours)


def convolution_of_operations(features, neighbours):
    return ops.matmul(neighbours, dense(features))


def convolution_of_a_lambda(features, neighbours):
    inner = dense(features)
    return layers.Lambda(lambda x: ops.matmul(x[1], x[0]), output_shape=lambda shapes: shapes[0])([inner, neighbours])


def of_graph(layer, dropout_last=False, **kwargs):
    """A Functional model of features and neighbours."""
    features, neighbours = keras.Input((6,)), keras.Input(**kwargs)
    if dropout_last:
        outputs = layers.Dropout(NEVER)(layer(features, neighbours))
    else:
        outputs = layer(layers.Dropout(NEVER, seed=1)(features), neighbours)
    return keras.Model([features, neighbours], outputs)


class OfGraph(keras.Model):
    def __init__(self):
        super().__init__()
        self.dropout, self.convolution = layers.Dropout(NEVER, seed=1), GraphConvolution()

    def call(self, inputs, training=None):
        features, neighbours = inputs
        return self.convolution(self.dropout(features, training=training), neighbours)


GRAPHS = {
    "declared shape": lambda: of_graph(convolution, shape=(N,)),
    "declared shape, sizes unknown": lambda: of_graph(convolution, shape=(None,)),
    "declared shape, fixed batch": lambda: of_graph(convolution, batch_shape=(N, N)),
    "operations": lambda: of_graph(convolution_of_operations, shape=(N,)),
    "operations, sizes unknown": lambda: of_graph(convolution_of_operations, shape=(None,)),
    "lambda": lambda: of_graph(convolution_of_a_lambda, shape=(N,)),
    "lambda, sizes unknown": lambda: of_graph(convolution_of_a_lambda, shape=(None,)),
    "before dropout": lambda: of_graph(convolution_of_operations, True, shape=(None,)),
    "subclassed": OfGraph,
}


@pytest.mark.parametrize("share", ["deterministic", "nothing"])
@pytest.mark.parametrize("name", GRAPHS)
def test_full_batch_of_a_graph(name, share):
    """With dropout that drops nothing R-Drop is plain training."""
    neighbours = np.eye(N, dtype="float32") + np.random.RandomState(1).uniform(size=(N, N)).astype("float32")
    histories = []
    for wrap in (lambda model: model, lambda model: RDropModel(model, share=share)):
        keras.utils.set_random_seed(2)
        model = wrap(GRAPHS[name]())
        wrapped = isinstance(model, RDropModel)
        with pytest.warns(UserWarning, match="did not differ") if wrapped else contextlib.nullcontext():
            histories.append(fit(model, [X, neighbours]))
    np.testing.assert_allclose(histories[1]["task_loss"], histories[0]["loss"], rtol=1e-5)


@pytest.mark.backends("tensorflow")
def test_full_batch_of_a_graph_of_unknown_size():
    import tensorflow as tf

    signature = ((tf.TensorSpec((None, 6)), tf.TensorSpec((None, None))), tf.TensorSpec((None,), "int64"))
    batches = tf.data.Dataset.from_generator(lambda: iter([((X, np.eye(N)), Y)]), output_signature=signature)
    model = RDropModel(OfGraph())
    with told_of_equal_passes():
        model.compile("sgd", LOSS)
        model.fit(batches, verbose=0)
    assert "relates rows of a batch to each other" in model._passes.graph.summary()


class Messages(layers.Layer):
    """Adds to each node of a graph what edges, `(E, 2)` numbers of rows, bring from others."""

    def call(self, nodes, edges):
        return nodes + ops.segment_sum(ops.take(nodes, edges[:, 0], axis=0), edges[:, 1], ops.shape(nodes)[0])

    def compute_output_shape(self, nodes_shape, edges_shape):
        return nodes_shape


class OfEdges(keras.Model):
    def __init__(self):
        super().__init__()
        self.dropout, self.messages, self.dense = layers.Dropout(NEVER, seed=1), Messages(), layers.Dense(3)

    def call(self, inputs, training=None):
        nodes, edges = inputs
        return self.dense(self.messages(self.dropout(nodes, training=training), edges))


def of_edges():
    nodes, edges = keras.Input((6,)), keras.Input((2,), dtype="int32")
    return keras.Model([nodes, edges], layers.Dense(3)(Messages()(layers.Dropout(NEVER, seed=1)(nodes), edges)))


@pytest.mark.parametrize("share", ["deterministic", "nothing"])
@pytest.mark.parametrize("make", [of_edges, OfEdges])
def test_inputs_of_several_numbers_of_rows(make, share):
    edges = np.random.RandomState(1).randint(0, N, size=(40, 2)).astype("int32")
    losses = []
    for wrap in (lambda model: model, lambda model: RDropModel(model, share=share)):
        keras.utils.set_random_seed(2)
        model = wrap(make())
        model.compile(keras.optimizers.SGD(0.1), LOSS)
        for _ in range(2):
            logs = model.train_on_batch([X, edges], Y, return_dict=True)
        losses.append(logs["task_loss" if isinstance(model, RDropModel) else "loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert re.search(r"the inputs of '\w+' have \[16, 40\] rows", model._passes.graph.summary())


class Pairs(layers.Layer):
    """Takes sequences of even lengths alone."""

    def call(self, x):
        return ops.sum(ops.reshape(x, (ops.shape(x)[0], -1, 2, 2)), axis=2)

    def compute_output_shape(self, shape):
        return (shape[0], None, 2)


def test_axes_of_unknown_size_that_are_not_the_batch():
    """Several unknown axes are no sign of rows that relate to each other."""
    inputs = [keras.Input((None, 2)), keras.Input((None, 2))]
    h = layers.Dropout(0.3)(inputs[0])
    h = layers.Lambda(lambda x: ops.softmax(x, axis=1), output_shape=lambda shape: shape)(h)
    h = ops.matmul(ops.softmax(ops.matmul(h, ops.swapaxes(inputs[1], 1, 2))), inputs[1]) + h
    model = keras.Model(inputs, layers.Dense(3)(ops.max(h, axis=1)))
    assert "one pass after another" not in sharing(model).summary
    h = Pairs()(layers.Dropout(0.3)(inputs[0]))
    assert "one pass after another" not in sharing(keras.Model(inputs[0], ops.max(h, axis=1))).summary


class Centred(layers.Layer):
    """Nothing about its shapes shows that it mixes rows."""

    rdrop_mixes_rows = True

    def call(self, x):
        return x - ops.mean(x, axis=0)

    def compute_output_shape(self, shape):
        return shape


def declared(layer):
    layer.rdrop_mixes_rows = True
    return layer


MIXING = {
    "class": lambda: functional(lambda x: dense(Centred()(x))),
    "layer": lambda: functional(lambda x: declared(dense_layer())(x)),
    "model": lambda: declared(functional(dense)),
    "nested model": lambda: functional(declared(functional(dense))),
    "inside a layer": lambda: functional(layers.TimeDistributed(Centred()), shape=(2, 3)),
    "subclassed model": lambda: declared(Subclassed(lambda x: x)),
    "in a subclassed model": lambda: WithOneMask(Centred()),
}


def dense_layer():
    return layers.Dense(3)


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_declare_that_they_mix_rows(name):
    model = MIXING[name]()
    model(ops.ones((N, 6) if name != "inside a layer" else (N, 2, 3)))
    graph = PairedGraph(model, "deterministic")
    assert re.fullmatch(r"'\w+' declares rdrop_mixes_rows", graph.separate)
    assert graph.summary().endswith(f"the others run for one pass after another: {graph.separate}")


def test_mixed_rows_are_plain_training():
    histories = []
    for wrap in (lambda model: model, RDropModel):
        keras.utils.set_random_seed(2)
        model = wrap(functional(lambda x: dense(Centred()(x))))
        with told_of_equal_passes() if isinstance(model, RDropModel) else contextlib.nullcontext():
            histories.append(fit(model))
    np.testing.assert_allclose(histories[1]["task_loss"], histories[0]["loss"], rtol=1e-5)


class WeightNoise(layers.Layer):
    """Noise on the weights, the same for all rows. Nothing about the layer shows it."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 3))
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs, training=None):
        noise = keras.random.normal(self.kernel.shape, seed=self.seed) if training else 0.0
        return ops.matmul(inputs, self.kernel + noise)


def test_one_draw_for_all_rows_that_is_declared():
    for model in (declared(WeightNoise()), WeightNoise()):
        model = keras.Sequential([keras.Input((6,)), model])
        if "rdrop_mixes_rows" not in vars(model.layers[0]):
            declared(model)
        assert min(fit(RDropModel(model))["consistency_loss"]) > 0


def test_equal_passes_are_told_once():
    model = RDropModel(keras.Sequential([keras.Input((6,)), WeightNoise()]))
    with told_of_equal_passes():
        assert fit(model)["consistency_loss"] == pytest.approx([0, 0], abs=1e-12)
    model.fit(X, Y, batch_size=N, verbose=0)  # Warnings are errors here.
    # An epoch without a step of R-Drop gives no warning.
    model = RDropModel(mlp(6), every=3)
    assert fit(model, epochs=4)["consistency_loss"][1:3] == pytest.approx([float("nan")] * 2, nan_ok=True)


def test_rates_changed_after_compile():
    """As in curriculum dropout, a layer is deterministic when the model is compiled and random when it trains."""
    early = layers.Dropout(0.5, seed=1)
    early.rate = 0.0
    model = RDropModel(keras.Sequential([keras.Input((6,)), early, layers.Dense(3), layers.Dropout(NEVER)]))
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    assert sharing(model).calls[0].once
    early.rate = 0.9
    assert model.fit(X, Y, batch_size=N, verbose=0).history["consistency_loss"][0] > 0


class WithMean(keras.Model):
    def __init__(self):
        super().__init__()
        self.dropout, self.dense = layers.Dropout(0.3, seed=1), layers.Dense(3)

    def call(self, inputs, training=None):
        outputs = self.dense(self.dropout(inputs, training=training))
        return {"classes": outputs, "a_mean": ops.mean(outputs)}


@pytest.mark.parametrize("make", [lambda: functional(lambda x: outputs_and_mean(dense(x)), rate=0.3), WithMean])
def test_output_without_a_batch_and_without_a_loss(make):
    model = RDropModel(make())
    model.compile("sgd", {"classes": LOSS, "a_mean": None}, metrics={"classes": ["accuracy"]})
    history = model.fit(X, {"classes": Y, "a_mean": Y}, batch_size=N, epochs=2, verbose=0).history
    assert min(history["consistency_loss"]) > 0
    assert 0 <= history["classes_accuracy"][0] <= 1
    assert ops.shape(model.predict_on_batch(X)["a_mean"]) == ()


def outputs_and_mean(outputs):
    return {"classes": outputs, "a_mean": ops.mean(outputs)}


@pytest.mark.backends("tensorflow", "torch")  # On JAX Keras's losses do not take scalars.
def test_output_without_a_batch_and_with_a_loss():
    model = RDropModel(functional(lambda x: ops.mean(dense(x)), rate=0.3), divergence="mse")
    model.compile("sgd", "mse", jit_compile=False)
    with pytest.raises(ValueError, match=r"the batch on axis 0 of every output with a loss.*shape \(\) for 2 passes"):
        model.train_on_batch(X, np.ones(1))


def recurrent(before):
    inputs = keras.Input(batch_shape=(8, 3, 2))
    recurrent, dropout = layers.LSTM(4, stateful=True, name="recurrent"), layers.Dropout(NEVER)
    hidden = dropout(recurrent(inputs)) if before else recurrent(dropout(inputs))
    return keras.Model(inputs, layers.Dense(3)(hidden))


@pytest.mark.backends("jax", "tensorflow")  # On PyTorch Keras 3.15 cannot train a stateful LSTM.
def test_recurrent_states_before_dropout():
    histories = []
    for wrap in (lambda model: model, RDropModel):
        keras.utils.set_random_seed(2)
        model = wrap(recurrent(before=True))
        with (
            pytest.warns(UserWarning, match="did not differ")
            if isinstance(model, RDropModel)
            else contextlib.nullcontext()
        ):
            histories.append(fit(model, X.reshape(N, 3, 2), batch_size=8))
    np.testing.assert_allclose(histories[1]["task_loss"], histories[0]["loss"], rtol=1e-5)


def test_recurrent_states_after_dropout():
    with pytest.raises(ValueError, match=r"`stateful=True` keeps a state for each row.*Received: 'recurrent' \(LSTM\)"):
        RDropModel(recurrent(before=False))


@pytest.mark.parametrize(
    "make",
    [
        lambda: functional(lambda x: dense(ops.reshape(x, (8, 6))), rate=0.3, batch_size=8),
        lambda: Subclassed(lambda x: ops.reshape(x, (8, 3)), rate=0.3),
    ],
    ids=["functional", "subclassed"],
)
def test_fixed_batch_size_in_an_operation(make):
    assert min(fit(RDropModel(make()), batch_size=8)["consistency_loss"]) > 0


def test_axis_that_the_outputs_do_not_have():
    for axis in (5, -2):
        model = RDropModel(mlp(6), divergence=Divergence("kl", axis=axis))
        with pytest.raises(ValueError, match=rf"`axis` must be one of an output's axes behind.*Received: axis={axis}"):
            fit(model)


def test_rates_of_numpy():
    for rates in (np.array([0.25, 0.5]), (np.float64(0.25), np.float32(0.5))):
        assert RDropModel(mlp(6), dropout_rates=rates).dropout_rates == (0.25, 0.5)


def test_steps_per_execution_set_after_compile():
    model = RDropModel(mlp(6), every=2)
    model.compile("sgd", LOSS)
    model.steps_per_execution = 2
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be 1"):
        model.fit(np.tile(X, (2, 1)), np.tile(Y, 2), batch_size=N, verbose=0)
