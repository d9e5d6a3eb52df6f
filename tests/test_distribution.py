"""n replicas give the numbers of one. The replicas are logical devices of one CPU."""

import contextlib
import functools
import math
import re

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from marks import slow
from models import mlp, to_numpy
from rdrop_keras import KLBudget, RDropModel
from rdrop_keras.wrapper import random_state
from split_batches import NoiseOfTheRow, X, Y, assert_same, compiled, model, steps, whole_batches

# In each row 4 of 6 tokens are not padding, so that Keras's mean over a replica's tokens weights rows alike.
TOKENS = np.random.RandomState(2).randint(1, 9, size=(21, 6))
TOKENS[np.arange(21)[:, None], np.random.RandomState(3).rand(21, 6).argsort()[:, :2]] = 0


class DropoutOfTheRow(layers.Dropout):
    """Dropout whose mask depends on the row and the rate alone."""

    def call(self, inputs, training=False):
        if not training:
            return inputs
        kept = ops.cast(ops.cos(50 * inputs) > 2 * self.rate - 1, inputs.dtype)
        return inputs * kept / (1 - self.rate)


def masked_model():
    keras.utils.set_random_seed(2)
    tokens = keras.Input((6,), dtype="int32")
    h = NoiseOfTheRow()(layers.Embedding(9, 8, mask_zero=True)(tokens))
    return compiled(keras.Model(tokens, layers.Dense(9)(h)))


def mirrored(replicas):
    import tensorflow as tf

    # Collective operations would keep the number of the first replicas for the whole process.
    reduction = tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)], cross_device_ops=reduction)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", slow("sum")])
@pytest.mark.parametrize("replicas, weighted", [slow(1, True), (2, False), slow(2, True), slow(4, True)], ids=str)
def test_mirrored_strategy(replicas, reduction, weighted):
    with mirrored(replicas).scope():
        distributed = model(reduction)
    history, weights = steps(distributed, weighted)
    expected, expected_weights = steps(model(reduction), weighted)
    if reduction == "sum":
        # As for a plain model, Keras logs n times the mean of the replicas' sums, and counts a regularizer n times. So
        # only what is trained is compared.
        history, expected = ({"accuracy": logs["accuracy"]} for logs in (history, expected))
    assert_same((history, weights), (expected, expected_weights))


OPTIONS = [
    {"every": 2},
    {"num_passes": 3},
    {"share": "hidden"},
    {"share": "nothing"},
    {"alpha": keras.optimizers.schedules.PolynomialDecay(0.0, 6, 5.0)},
    {"alpha": KLBudget(0.01, step=0.5)},
    {"alpha": KLBudget(0.03, step=20.0, maximum=30.0)},  # α meets both of its bounds.
    {"dropout_rates": (0.1, 0.5), "noise": functools.partial(DropoutOfTheRow, 0.2)},
]
OPTION_NAMES = ["every", "num_passes", "share", "share nothing", "schedule", "budget", "bounds", "dropout_rates"]


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "name, replicas",
    [("budget", 2), slow("every", 4), slow("budget", 4)] + [slow(name, 2) for name in OPTION_NAMES if name != "budget"],
)
def test_mirrored_options(name, replicas):
    options = OPTIONS[OPTION_NAMES.index(name)]
    with mirrored(replicas).scope():
        distributed = model(**options)
    assert_same(steps(distributed, True), steps(model(**options), True))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("alpha", [4.0, slow(KLBudget(0.01, step=0.5))], ids=["fixed", "budget"])
def test_mirrored_run_eagerly(alpha):
    """There the sizes of an uneven batch are known, and count all the same."""
    expected = steps(model(alpha=alpha), True)
    with mirrored(2).scope():
        distributed = model(alpha=alpha)
    distributed.run_eagerly = True
    assert_same(steps(distributed, True), expected)


def two_outputs(reductions):
    keras.utils.set_random_seed(2)
    x = keras.Input((4,))
    h = NoiseOfTheRow()(layers.Dense(8, activation="tanh")(x))
    inner = keras.Model(x, {"a": layers.Dense(3, name="a")(h), "b": layers.Dense(3, name="b")(h)})
    wrapped = RDropModel(inner, KLBudget(0.05, step=0.5))
    of_output = [losses.SparseCategoricalCrossentropy(from_logits=True, reduction=each) for each in reductions]
    wrapped.compile(keras.optimizers.SGD(0.1), dict(zip("ab", of_output)), loss_weights={"a": 0.5, "b": 2.0})
    return wrapped


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "reductions",
    [("sum", "sum_over_batch_size"), slow(("sum", "sum")), slow(("mean_with_sample_weight", "sum"))],
    ids="-".join,
)
def test_mirrored_budget_of_sums(reductions):
    """α moves by the consistency loss of the whole batch, whatever of it are sums over rows."""
    y = {"a": Y, "b": Y}
    with mirrored(2).scope():
        distributed = two_outputs(reductions)
    single = two_outputs(reductions)
    runs = [
        each.fit(X, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history["alpha"]
        for each in (distributed, single)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][0] != runs[0][1]
    for a, b in zip(distributed.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # The gradients are sums over rows.


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("replicas", [2, slow(4)])
def test_mirrored_masks(replicas):
    with mirrored(replicas).scope():
        distributed = masked_model()
    assert_same(steps(distributed, x=TOKENS, y=TOKENS), steps(masked_model(), x=TOKENS, y=TOKENS))


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]


def batches_of(kind):
    """The same three batches, the last of 5 rows, in the kinds that `fit` takes."""
    import tensorflow as tf

    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
    return {
        "dataset": lambda strategy: dataset,
        "distributed dataset": lambda strategy: strategy.experimental_distribute_dataset(dataset),
        "generator": lambda strategy: ((X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)),
        "PyDataset": lambda strategy: Batches(),
        "uneven first": lambda strategy: tf.data.Dataset.from_tensor_slices((X[:5], Y[:5])).batch(5),
    }[kind]


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "kind", ["dataset", slow("distributed dataset"), slow("generator"), slow("PyDataset"), "uneven first"]
)
def test_mirrored_kinds_of_data(kind):
    import tensorflow as tf

    data = batches_of(kind)
    strategy = mirrored(2)
    with strategy.scope():
        distributed = model()
    logs = distributed.fit(data(strategy), shuffle=False, verbose=0).history
    single = model()
    expected = single.fit(data(tf.distribute.get_strategy()), shuffle=False, verbose=0).history
    weights, expected_weights = ([to_numpy(w) for w in m.weights] for m in (distributed, single))
    assert_same((logs, weights), (expected, expected_weights))


def dropout_only(seed=3):
    """Its outputs show its masks: on an input of ones they are 0 where dropped and 2 where kept."""
    x = keras.Input((50,))
    return keras.Model(x, layers.Dropout(0.5, seed=seed)(layers.Dense(50, kernel_initializer="identity")(x)))


class Recording(losses.Loss):
    """Mean squared error that records the outputs of all replicas and steps."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def call(self, y_true, y_pred):
        import tensorflow as tf

        def keep(replica, outputs):
            self.seen.append((int(replica), outputs))

        context = tf.distribute.get_replica_context()
        if context is not None:  # There is none in Keras's symbolic build.
            tf.numpy_function(keep, [context.replica_id_in_sync_group, y_pred], [])
        return ops.mean((y_true - y_pred) ** 2, axis=-1)


@pytest.mark.backends("tensorflow")
def test_mirrored_replicas_draw_masks_of_their_own():
    ones = np.ones((16, 50), "float32")
    seen = []
    with mirrored(4).scope():
        distributed = RDropModel(dropout_only(), alpha=1.0, divergence="mse")
        distributed.compile(keras.optimizers.SGD(0.0), Recording(seen))
    history = distributed.fit(ones, ones, batch_size=8, epochs=2, verbose=0).history
    seen.sort(key=lambda replica_and_outputs: replica_and_outputs[0])
    masks = np.concatenate([outputs for _, outputs in seen])
    assert len(seen) == 4 * 4 * 2 and {replica for replica, _ in seen} == {0, 1, 2, 3}
    # 64 rows, no two the same. Half of all 3200 values are dropped, with standard deviation 0.009.
    assert len(np.unique(masks, axis=0)) == len(masks) == 64
    assert np.mean(masks == 0) == pytest.approx(0.5, abs=0.04)
    # Masks of two replicas agree as often as by chance.
    by_replica = masks.reshape(4, -1) == 0
    for i in range(4):
        for j in range(i):
            assert np.mean(by_replica[i] == by_replica[j]) == pytest.approx(0.5, abs=0.06)
    # E (2b − 2b')² = 2 for independent fair b and b'.
    assert np.mean(history["consistency_loss"]) == pytest.approx(2.0, abs=0.15)
    # After a step the generators are as on one device: the same number of draws and the seed of the layer.
    (state,) = random_state.states(distributed.model)
    assert [list(map(int, part.numpy())) for part in state.value.values] == [[3, 4]] * 4


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("mode", [{}, slow({"steps_per_execution": 2})], ids=str)
def test_mirrored_dropout_and_batch_normalization(mode):
    with mirrored(2).scope():
        x = keras.Input((4,))
        h = layers.Dropout(0.3)(layers.BatchNormalization()(x))
        distributed = RDropModel(keras.Model(x, layers.Dense(3)(h)), alpha=2.0)
        distributed.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True), **mode)
    history = distributed.fit(X[:14], Y[:14], batch_size=6, epochs=4, verbose=0, validation_data=(X, Y)).history
    assert all(value > 0 for value in history["consistency_loss"])
    assert history["loss"] == pytest.approx(
        np.array(history["task_loss"]) + np.array(history["consistency_loss"]), rel=1e-5
    )
    assert history["val_loss"][-1] < history["val_loss"][0]


class NormalizedDropout(layers.Layer):
    """Dropout before and after a normalization in which replicas wait for each other."""

    def __init__(self, synchronized, **kwargs):
        super().__init__(**kwargs)
        self.normalization = layers.BatchNormalization(synchronized=synchronized)
        self.dropouts = [layers.Dropout(0.5), layers.Dropout(0.5)]

    def build(self, input_shape):
        self.normalization.build(input_shape)

    def call(self, inputs, training=None):
        x = self.normalization(self.dropouts[0](inputs, training=training), training=training)
        return self.dropouts[1](x, training=training)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("replicas", [slow(1), 2])
def test_dropout_rates_where_replicas_wait(replicas, synchronized):
    """A replica that waits inside a layer would continue at the rate of another's pass, so that is refused."""
    with mirrored(replicas).scope():
        x = keras.Input((4,))
        inner = keras.Model(x, layers.Dense(3)(NormalizedDropout(synchronized, name="block")(x)))
        distributed = RDropModel(inner, dropout_rates=(0.0, 0.3))
        distributed.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    if synchronized and replicas > 1:
        with pytest.raises(
            ValueError, match=r"`dropout_rates` cannot act on a layer.*Received: 'block' with 'batch_norm"
        ):
            distributed.fit(X, Y, batch_size=8, verbose=0)
    else:
        assert np.isfinite(distributed.fit(X, Y, batch_size=8, verbose=0).history["loss"]).all()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("inside", ["model", "wrapper"])
def test_scopes_must_agree(inside):
    scope = mirrored(2).scope()
    with scope if inside == "model" else contextlib.nullcontext():
        inner = mlp()
    scope = mirrored(2).scope() if inside == "wrapper" else contextlib.nullcontext()
    with scope, pytest.raises(ValueError, match=r"under the same `strategy.scope\(\)`.*made under (Mirrored|no )"):
        RDropModel(inner)


@contextlib.contextmanager
def distributed_by(distribution):
    keras.distribution.set_distribution(distribution)
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


def data_parallel(devices):
    return distributed_by(keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:devices]))


@pytest.mark.backends("jax")
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_data_parallel(devices, reduction):
    expected = whole_batches(model(reduction))
    with data_parallel(devices):
        distributed = model(reduction)
        assert len(distributed.weights[0].value.sharding.device_set) == devices
        assert_same(whole_batches(distributed), expected)


@pytest.mark.backends("jax")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_data_parallel_options(options):
    expected = whole_batches(model(**options))
    with data_parallel(8):
        assert_same(whole_batches(model(**options)), expected)


@pytest.mark.backends("jax")
def test_data_parallel_masks():
    """There is one program over the whole batch, so its mean over tokens is that of one device."""
    tokens = TOKENS[:16].copy()
    tokens[3:6, 1:] = 0
    expected = steps(masked_model(), x=tokens, y=tokens)
    with data_parallel(4):
        assert_same(steps(masked_model(), x=tokens, y=tokens), expected)


@pytest.mark.backends("jax")
def test_data_parallel_dropout():
    with data_parallel(4):
        distributed = RDropModel(mlp(), alpha=2.0)
        distributed.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
        data = X[:16], Y[:16]
        history = distributed.fit(*data, batch_size=8, epochs=4, verbose=0, validation_data=data).history
    assert all(value > 0 for value in history["consistency_loss"])
    assert history["val_loss"][-1] < history["val_loss"][0]


@pytest.mark.backends("jax")
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 2), (1, 8), (2, 4)])
@pytest.mark.parametrize("options", [{}, {"share": "nothing"}, {"num_passes": 3}], ids=["m=2", "share nothing", "m=3"])
def test_model_parallel(shape, options):
    expected = whole_batches(model(**options))
    mesh = keras.distribution.DeviceMesh(
        shape, ("batch", "model"), keras.distribution.list_devices()[: shape[0] * shape[1]]
    )
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["hidden/kernel"] = (None, "model")
    layouts["hidden/bias"] = ("model",)
    with distributed_by(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")):
        distributed = model(**options)
        kernel = next(weight for weight in distributed.weights if weight.path == "hidden/kernel")
        assert kernel.value.addressable_shards[0].data.shape == (4, 8 // shape[1])
        assert_same(whole_batches(distributed), expected)


class Asked(keras.distribution.LayoutMap):
    """Records the paths that it was asked for."""

    def __init__(self, mesh):
        super().__init__(mesh)
        self.paths = set()

    def __getitem__(self, path):
        self.paths.add(path)
        return super().__getitem__(path)


@pytest.mark.backends("jax")
def test_layouts_of_outputs_apply_to_the_paired_graph():
    mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), keras.distribution.list_devices()[:4])
    asked = {}
    for alpha in (0.0, 1.0):
        layouts = Asked(mesh)
        layouts["hidden/output"] = ("batch", "model")
        with distributed_by(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")):
            inner_x = keras.Input((8,))
            h = layers.Dense(8, name="hidden")(layers.Dropout(0.2, name="drop")(inner_x))
            inner = keras.Model(inner_x, layers.Dense(8, name="next")(h), name="inner")
            x = keras.Input((4,))
            outer = keras.Model(x, layers.Dense(3, name="head")(inner(layers.Dense(8, name="first")(x))), name="outer")
            wrapped = compiled(outer, alpha)
            wrapped.fit(X[:8], Y[:8], batch_size=8, verbose=0)
            layouts.paths.clear()
            wrapped.make_train_function(force=True)
            wrapped.fit(X[:8], Y[:8], batch_size=8, verbose=0)  # Traces only the step, since all else is built.
        asked[alpha] = {path for path in layouts.paths if path.endswith("/output")} - {f"{wrapped.name}/output"}
    assert {"first/output", "drop/output", "hidden/output", "next/output", "head/output"} <= asked[0.0]
    # The passes go through a nested Functional model layer by layer. Its output is that of its last layer.
    assert asked[0.0] - asked[1.0] == {"inner/output"} and asked[1.0] <= asked[0.0]


SIZES = {"f32": 4, "s32": 4, "u32": 4, "s64": 8, "pred": 1, "bf16": 2}


def collectives(model, x, y):
    """`{kind: bytes}` that the devices exchange in a step, from the compiled program."""
    import jax
    from keras.src.backend.jax.trainer import _distribute_data

    model.fit(x, y, batch_size=len(x), verbose=0)
    state = model._get_jax_state(
        trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
    )
    step = jax.jit(model.train_step, out_shardings=(None, model._get_state_sharding_spec()))
    program = step.lower(state, _distribute_data((x, y))).compile().as_text()
    exchanged = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast|send|recv"
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        sizes = [
            SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        ]
        exchanged[kind] = exchanged.get(kind, 0) + sum(sizes)
    return exchanged


def attention():
    keras.utils.set_random_seed(2)
    x = keras.Input((4,))
    h = layers.Reshape((6, 8))(layers.Dense(48)(x))
    h = layers.Dropout(0.1)(layers.MultiHeadAttention(2, 4, dropout=0.1)(h, h)) + h
    return keras.Model(x, layers.Dense(3)(layers.Flatten()(layers.LayerNormalization()(h))))


@pytest.mark.backends("jax")
@pytest.mark.parametrize("options", [{}, {"share": "nothing"}, {"num_passes": 4}], ids=str)
def test_data_parallel_adds_no_communication(options):
    x, y = np.tile(X[:8], (2, 1)), np.tile(Y[:8], 2)
    with data_parallel(4):
        plain = collectives(compiled(attention(), alpha=0.0), x, y)
        paired = collectives(compiled(attention(), **options), x, y)
    assert plain["all-reduce"] > 4 * attention().count_params()  # Gradients and logs.
    # Beyond plain training, only the consistency loss, a float32 scalar. The task loss of all passes is one scalar too.
    assert paired.pop("all-reduce") - plain.pop("all-reduce") == 4
    assert paired == plain == {}


def mirrored_reductions(alpha, **options):
    """Bytes of every reduction over replicas in a step, as the strategy traces them."""
    import tensorflow as tf

    traced = []

    class Recording(tf.distribute.ReductionToOneDevice):
        def reduce_implementation(self, reduce_op, value, *args, **kwargs):
            traced.append(value.values[0])
            return super().reduce_implementation(reduce_op, value, *args, **kwargs)

        def batch_reduce_implementation(self, reduce_op, values, *args, **kwargs):
            traced.extend(value.values[0] for value, _ in values)
            return super().batch_reduce_implementation(reduce_op, values, *args, **kwargs)

    devices = [f"CPU:{i}" for i in range(2)]
    with tf.distribute.MirroredStrategy(devices, cross_device_ops=Recording()).scope():
        distributed = compiled(attention(), alpha, **options)
    distributed.fit(X, Y, batch_size=8, verbose=0, epochs=1)
    return sum(tensor.dtype.size * math.prod(tensor.shape) for tensor in traced if tf.is_symbolic_tensor(tensor))


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "options", [{}, {"share": "nothing"}, {"num_passes": 3}, {"dropout_rates": (0.1, 0.3)}], ids=str
)
def test_mirrored_strategy_adds_no_communication(options):
    plain = mirrored_reductions(0.0)
    assert plain >= 4 * attention().count_params()
    assert mirrored_reductions(1.0, **options) == plain
