"""Models from KerasHub, keras.applications and KerasCV. Each library is optional."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from models import to_numpy
from rdrop_keras import RDropModel, sharing
from test_distribution import data_parallel, mirrored

BACKEND = keras.backend.backend()
TEXTS = ["the quick brown fox", "a lazy dog", "the dog jumped over the fox", "quick", "lazy brown dog", "over a fox"]
LABELS = np.array([0, 1, 0, 1, 1, 0])
WORDS = ["the", "quick", "brown", "fox", "a", "lazy", "dog", "jumped", "over"]


@pytest.fixture(scope="module")
def hub():
    import keras_hub

    return keras_hub


def bert(hub, dropout=0.2, preprocess=True, num_classes=2):
    keras.utils.set_random_seed(4)
    tokenizer = hub.models.BertTokenizer(vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    preprocessor = hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    backbone = hub.models.BertBackbone(
        vocabulary_size=14,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=dropout,
    )
    return hub.models.BertTextClassifier(
        backbone, num_classes, preprocessor=preprocessor if preprocess else None, dropout=dropout
    )


def gpt2(hub):
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate("abcdefghijĠ")}, "ab": 12}
    tokenizer = hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=13,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=0.2,
    )
    preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    return hub.models.GPT2CausalLM(backbone, preprocessor)


def bart(hub):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary.update({letter: i + 5 for i, letter in enumerate("abcdefghijĠ")}, ab=16)
    tokenizer = hub.models.BartTokenizer(vocabulary=vocabulary, merges=["a b"])
    backbone = hub.models.BartBackbone(
        vocabulary_size=17,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=10,
        dropout=0.2,
    )
    preprocessor = hub.models.BartSeq2SeqLMPreprocessor(tokenizer, encoder_sequence_length=8, decoder_sequence_length=8)
    return hub.models.BartSeq2SeqLM(backbone, preprocessor)


CROSS_ENTROPY = losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model, **kwargs):
    model.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY, **kwargs)
    return model


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_raw_strings_as_the_task_takes_them(hub):
    data = {"x": TEXTS, "y": LABELS, "batch_size": 2, "verbose": 0}

    def train(wrap):
        model = compiled(wrap(bert(hub)), metrics=["accuracy"])
        keras.utils.set_random_seed(6)
        history = model.fit(**data, epochs=2, validation_data=(TEXTS, LABELS), class_weight={0: 1.0, 1: 3.0}).history
        return model, history

    (task, expected), (model, history) = train(lambda task: task), train(lambda task: RDropModel(task, alpha=0))
    assert history == expected
    assert model.evaluate(**data) == task.evaluate(**data)
    np.testing.assert_array_equal(model.predict(TEXTS, verbose=0), task.predict(TEXTS, verbose=0))
    assert type(model) is RDropModel
    with pytest.raises(ValueError, match="does not apply preprocessing"):
        task(TEXTS)

    model, history = train(lambda task: RDropModel(task, alpha=1.0))
    assert history.keys() == expected.keys() | {"task_loss", "consistency_loss"}
    assert all(value > 0 for value in history["consistency_loss"])
    evaluated = model.evaluate(**data, return_dict=True)
    assert evaluated.keys() == {"accuracy", "loss"}
    assert evaluated["loss"] == pytest.approx(history["val_loss"][-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_raw_strings_in_batch_methods_and_splits(hub):
    model = compiled(RDropModel(bert(hub)))
    logs = model.train_on_batch(TEXTS, LABELS, return_dict=True)
    assert logs["consistency_loss"] > 0
    assert model.test_on_batch(TEXTS, LABELS) > 0
    assert model.predict_on_batch(TEXTS).shape == (6, 2)
    history = model.fit(np.array(TEXTS), LABELS, validation_split=1 / 3, batch_size=2, verbose=0).history
    assert {"consistency_loss", "val_loss"} < history.keys()


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_datasets_of_strings(hub):
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices((TEXTS, LABELS)).batch(4)
    model = compiled(RDropModel(bert(hub)))
    history = model.fit(data, validation_data=data, verbose=0).history
    assert history["consistency_loss"][0] > 0
    assert model.predict(data, verbose=0).shape == (6, 2)


@pytest.mark.needs("keras_hub")
def test_regression_of_pairs(hub):
    """A number for two sentences. The passes are compared by their squared difference."""
    pairs, scores = (TEXTS, TEXTS[::-1]), np.linspace(0, 1, 6)
    model = RDropModel(bert(hub, num_classes=1), alpha=1.0)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    logs = model.train_on_batch(pairs, scores, return_dict=True)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + logs["consistency_loss"] / 2, rel=1e-5)
    assert logs["consistency_loss"] > 0
    expected = np.square(model.predict(pairs, verbose=0)[:, 0] - scores).mean()
    assert model.test_on_batch(pairs, scores) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
@pytest.mark.backends("tensorflow", "jax")
def test_raw_strings_on_two_devices(hub):
    with mirrored(2).scope() if BACKEND == "tensorflow" else data_parallel(2):
        model = compiled(RDropModel(bert(hub)), weighted_metrics=["accuracy"])
        history = model.fit(TEXTS, LABELS, batch_size=2, validation_data=(TEXTS, LABELS), verbose=0).history
        assert history["consistency_loss"][0] > 0
        loss = model.evaluate(TEXTS, LABELS, batch_size=2, verbose=0)[0]
    expected = ops.convert_to_numpy(CROSS_ENTROPY(LABELS, model.model(model.model.preprocessor(TEXTS))))
    assert history["val_loss"][0] == pytest.approx(loss, rel=1e-5) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_head_alone_in_float16(hub):
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled(RDropModel(bert(hub), share="pooled_dense"))
    once = [call.name.rpartition("/")[2] for call in sharing(model, "pooled_dense").calls if call.once]
    assert once[-1] == "pooled_dense" and any("transformer_layer" in name for name in once)
    history = model.fit(TEXTS, LABELS, batch_size=2, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all() and min(history["consistency_loss"]) > 0


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.needs("keras_hub")
def test_task_exported(hub, tmp_path):
    """The SavedModel takes tokens."""
    import tensorflow as tf

    model = compiled(RDropModel(bert(hub)))
    model.fit(TEXTS, LABELS, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    tokens = {name: np.array(value, "int32") for name, value in model.model.preprocessor(TEXTS).items()}
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(tokens), model.predict(TEXTS, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_preprocessed_beforehand(hub):
    preprocessor = bert(hub).preprocessor
    x = {key: np.array(value) for key, value in preprocessor(TEXTS).items()}
    model = compiled(RDropModel(bert(hub, preprocess=False)))
    assert model.fit(x, LABELS, verbose=0).history["consistency_loss"][0] > 0
    assert model.predict(x, verbose=0).shape == (6, 2)


@pytest.mark.needs("keras_hub")
def test_pretrained_configurations_without_dropout(hub):
    with pytest.raises(
        ValueError, match=r"model='bert_text_classifier.*', whose dropout layers are: .*dropout.* rate=0"
    ):
        RDropModel(bert(hub, dropout=0.0))


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
# KerasHub's tasks warn of this whenever they are loaded.
@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called as part of model loading")
def test_task_saved_and_reloaded(hub, tmp_path):
    model = compiled(RDropModel(bert(hub), alpha=0.5))
    model.fit(TEXTS, LABELS, verbose=0)
    model.save(tmp_path / "task.keras")
    again = keras.models.load_model(tmp_path / "task.keras")
    np.testing.assert_allclose(again.predict(TEXTS, verbose=0), model.predict(TEXTS, verbose=0), rtol=1e-5)
    assert again.compiled and again.alpha == 0.5
    assert again.fit(TEXTS, LABELS, verbose=0).history["consistency_loss"][0] > 0


class Halving(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that is not registered."""

    def __call__(self, step):
        return 0.01 * 0.5 ** ops.cast(step, "float32")

    def get_config(self):
        return {}


@pytest.mark.needs("keras_hub")
@pytest.mark.filterwarnings("ignore:`compile\\(\\)` was not called as part of model loading")
def test_task_trained_by_a_schedule_of_ones_own(hub, tmp_path):
    """Keras loads the task without what it was compiled with."""
    model = RDropModel(bert(hub), alpha=0.5)
    model.compile(keras.optimizers.Adam(Halving()), CROSS_ENTROPY)
    model.train_on_batch(TEXTS, LABELS)
    model.save(tmp_path / "task.keras")
    with pytest.warns(UserWarning, match=r"(?s)RDropModel is loaded without its optimizer.*compile it.*Halving"):
        again = keras.models.load_model(tmp_path / "task.keras")
    np.testing.assert_allclose(again.predict(TEXTS, verbose=0), model.predict(TEXTS, verbose=0), rtol=1e-5)
    again = keras.models.load_model(tmp_path / "task.keras", custom_objects={"Halving": Halving})
    assert float(ops.convert_to_numpy(again.optimizer.learning_rate)) == pytest.approx(0.005)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
@pytest.mark.parametrize("build", [pytest.param(gpt2, id="CausalLM"), pytest.param(bart, id="Seq2SeqLM")])
def test_language_models_train_and_generate(hub, build):
    task = build(hub)
    raw = (
        {"encoder_text": ["a b c", "d e"], "decoder_text": ["c b", "e d f"]} if build is bart else ["abcd", "d e f gh"]
    )
    model = compiled(RDropModel(task, alpha=5.0), weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()])
    history = model.fit(raw, batch_size=2, epochs=2, verbose=0).history
    assert all(value > 0 for value in history["consistency_loss"])
    # The compiled loss of the preprocessed batch, in which padding has weight 0.
    x, y, weights = task.preprocessor(raw)
    expected = ops.convert_to_numpy(CROSS_ENTROPY(y, model.model(x, training=False), weights))
    assert model.evaluate(raw, batch_size=2, verbose=0)[0] == pytest.approx(float(expected), rel=1e-4)
    generated = model.model.generate(["a b c", "d"], max_length=8)
    assert all(isinstance(text, str) for text in generated)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_images(hub):
    backbone = hub.models.ViTBackbone(
        image_shape=(16, 16, 3), patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, dropout_rate=0.1
    )
    model = compiled(RDropModel(hub.models.ViTImageClassifier(backbone, 3)))
    assert "patching" in next(call.name for call in sharing(model).calls if call.once)
    images = np.random.uniform(0, 255, size=(6, 16, 16, 3)).astype("uint8")
    history = model.fit(images, np.arange(6) % 3, batch_size=3, verbose=0).history
    assert history["consistency_loss"][0] > 0
    assert model.predict(images, verbose=0).shape == (6, 3)


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_transformer_layers(hub):
    source, target = (
        keras.Input((None,), dtype="int32", name="source"),
        keras.Input((None,), dtype="int32", name="target"),
    )
    embedding = hub.layers.TokenAndPositionEmbedding(20, 12, 8, mask_zero=True)
    memory = hub.layers.TransformerEncoder(16, 2, dropout=0.1)(embedding(source))
    h = hub.layers.TransformerDecoder(16, 2, dropout=0.1)(embedding(target), memory)
    model = compiled(RDropModel(keras.Model({"source": source, "target": target}, layers.Dense(20)(h)), alpha=5.0))
    tokens = np.random.randint(1, 20, size=(8, 9))
    tokens[:, 6:] = 0
    x = {"source": tokens, "target": tokens}
    history = model.fit(x, tokens, batch_size=4, epochs=3, verbose=0).history
    assert history["task_loss"][-1] < history["task_loss"][0] and history["consistency_loss"][0] > 0
    # Padding is masked in both terms, so more padding does not change the loss.
    longer = np.pad(tokens, [(0, 0), (0, 3)])
    assert model.evaluate({"source": longer, "target": longer}, longer, verbose=0) == pytest.approx(
        model.evaluate(x, tokens, verbose=0), rel=1e-4
    )


@pytest.mark.slow
def test_applications():
    keras.utils.set_random_seed(0)
    backbone = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, include_top=False, pooling="avg")
    x = keras.Input((32, 32, 3))
    model = keras.Model(x, layers.Dense(3)(layers.Dropout(0.2)(backbone(x))))
    model = compiled(RDropModel(model))
    images = np.random.uniform(-1, 1, size=(8, 32, 32, 3)).astype("float32")
    before = [to_numpy(w) for w in backbone.non_trainable_weights]
    history = model.fit(images, np.arange(8) % 3, batch_size=4, verbose=0).history
    assert history["consistency_loss"][0] > 0
    assert any((to_numpy(w) != b).any() for w, b in zip(backbone.non_trainable_weights, before))


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.needs("keras_cv")
@pytest.mark.filterwarnings("ignore")  # KerasCV 0.9 predates Keras 3.15 and warns of it in many ways.
def test_keras_cv():
    import keras_cv as cv

    backbone = cv.models.DenseNetBackbone(stackwise_num_repeats=[1, 1], include_rescaling=True, input_shape=(32, 32, 3))
    x = keras.Input((32, 32, 3))
    h = layers.GlobalAveragePooling2D()(backbone(x))
    model = compiled(RDropModel(keras.Model(x, layers.Dense(3)(cv.layers.DropPath(0.3)(h)))))
    images = np.random.uniform(0, 255, size=(6, 32, 32, 3)).astype("float32")
    history = model.fit(images, np.arange(6) % 3, batch_size=3, verbose=0).history
    assert history["consistency_loss"][0] > 0
