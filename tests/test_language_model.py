"""`benchmarks/language_model.py`, on lines made here: each counts on from a number drawn at random."""

import contextlib
import gzip
import math
import types

import keras
import keras_hub
import numpy as np
import pytest

import experiment
import language_model
import rdrop_keras

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
SIZES = {"train": 512, "valid": 50, "test": 30}
SMALL = ("--preset", "none", "--block-length", 16, "--batch-size", 16, "--learning-rate", 5e-3)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, size in SIZES.items():
        lines = [" ".join(NUMBERS[(first + i) % 8] for i in range(5)) for first in rng.integers(8, size=size)]
        (folder / f"{split}.txt.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    return folder


def small_model(cutoffs=(), seed=0):
    keras.utils.set_random_seed(seed)
    return language_model.LanguageModel(50, 8, 2, 16, 32, 2, dropout=0.1, cutoffs=cutoffs)


def log_softmax(logits):
    logits = np.asarray(logits, "float64")
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def perplexity(model, stream, block_length):
    """Block by block, with nothing filled up but what the model's input asks for."""
    said_of = []
    read = [language_model.END, *stream[:-1]]
    for first in range(0, len(stream), block_length):
        words = read[first : first + block_length]
        block = np.full((1, block_length), 7 % model.config["vocabulary_size"])
        block[0, : len(words)] = words
        log_probs = log_softmax(keras.ops.convert_to_numpy(model(block)))[0]
        said_of += [log_probs[i, word] for i, word in enumerate(stream[first : first + block_length])]
    assert len(said_of) == len(stream)
    return math.exp(-np.mean(said_of))


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_is_scored(run_example, data, capsys, monkeypatch):
    build, models = language_model.build_language_model, []

    def build_and_keep(args, vocabulary_size):
        models.append((args, build(args, vocabulary_size)))
        return models[-1][1]

    monkeypatch.setattr(language_model, "build_language_model", build_and_keep)
    size = {"num_layers": 1, "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2}
    monkeypatch.setitem(language_model.PRESETS, "none", size)
    flags = ("--data", data, *SMALL, "--epochs", 10, "--compare", "--generate", 5)
    plain, rdrop = run_example(language_model, *flags)
    for run in (plain, rdrop):
        assert run["curves"]["val_loss"][-1] < 0.8 * run["curves"]["val_loss"][0]
        assert set(run["scores"]) == {"validation perplexity", "test perplexity"}
        # Of each line of six words with its end the first is one of eight, and the others can be known.
        assert 0.9 * 8 ** (1 / 6) < run["scores"]["validation perplexity"] < 2.5
    assert "consistency_loss" in rdrop["curves"] and "consistency_loss" not in plain["curves"]
    assert (data.parent / "language_model.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "Words, of 10 different ones: train 3,072, validation 300, test 180" in out
    said = out.split("  -> ")[-1].split("\n")[0].split()
    assert len(said) == 5 and set(said) <= {*NUMBERS, "<eos>", "<unk>"}

    args, trained = models[-1]
    model = build(args, 10)
    model.set_weights(trained.get_weights())
    texts = language_model.load_data(args)
    vocabulary = language_model.build_vocabulary(texts["train"], args.vocabulary_size)
    for split in ("validation", "test"):
        expected = perplexity(model, language_model.encode(texts[split], vocabulary), 16)
        assert rdrop["scores"][f"{split} perplexity"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_adaptive_model_learns():
    model = rdrop_keras.RDropModel(experiment.trainable(small_model((10, 30))), alpha=1.0)
    language_model.compile_model(model, 5e-3)
    x, y, weights = language_model.cut(np.arange(1000) % 50, 8)
    logs = model.fit(x, y, sample_weight=weights, batch_size=25, epochs=8, verbose=0).history
    assert logs["loss"][-1] < 0.7 * logs["loss"][0]
    assert all(value > 0 for value in logs["consistency_loss"])


@pytest.mark.parametrize("batch_size", [1, 4], ids="batches of {}".format)
def test_score_is_the_perplexity_of_all_words(batch_size):
    model = small_model()
    stream = np.random.default_rng(0).integers(50, size=45)
    args = types.SimpleNamespace(block_length=8, batch_size=batch_size)
    run = types.SimpleNamespace(scope=contextlib.nullcontext, verbose=0)
    scores = language_model.score(run, model, {"validation": stream}, args)
    assert scores == {"validation perplexity": pytest.approx(perplexity(model, stream, 8), rel=1e-5)}


def test_perplexity_does_not_overflow():
    assert language_model.perplexity(math.log(50.0)) == pytest.approx(50.0)
    assert language_model.perplexity(1e4) == math.inf
    assert math.isnan(language_model.perplexity(math.nan))


def test_loss_is_that_of_the_words_that_weigh():
    model = small_model()
    language_model.compile_model(model, 1e-3)
    x, y, weights = language_model.cut(np.random.default_rng(0).integers(50, size=21), 8)
    logits = model.predict(x, verbose=0)
    nll = -np.take_along_axis(log_softmax(logits), y[..., None], axis=-1)[..., 0]
    assert float(model.loss(y, logits, sample_weight=weights)) == pytest.approx(nll.ravel()[:21].mean(), rel=1e-5)


def test_blocks():
    x, y, weights = language_model.cut(np.array([5, 6, 7, 8, 9]), 2)
    np.testing.assert_array_equal(x, [[1, 5], [6, 7], [8, 9]])
    np.testing.assert_array_equal(y, [[5, 6], [7, 8], [9, 1]])
    np.testing.assert_array_equal(weights, [[1, 1], [1, 1], [1, 0]])
    x, y, weights = language_model.cut(np.array([5, 6, 7, 8]), 2, multiple=3)
    np.testing.assert_array_equal(x, [[1, 5], [6, 7], [8, 1]])
    np.testing.assert_array_equal(weights, [[1, 1], [1, 1], [0, 0]])


def test_vocabulary_and_words():
    lines = ["b <unk> b a", "", " a c b "]
    assert language_model.build_vocabulary(lines, 100) == ["<unk>", "<eos>", "b", "a", "c"]
    vocabulary = language_model.build_vocabulary(lines, 4)
    assert vocabulary == ["<unk>", "<eos>", "b", "a"]
    np.testing.assert_array_equal(language_model.encode(lines, vocabulary), [2, 0, 2, 3, 1, 1, 3, 0, 2, 1])


class TestAdaptiveEmbedding:
    CUTOFFS = (4, 9)
    BANDS = ((0, 4), (4, 9), (9, 20))

    def layer(self, **kwargs):
        layer = language_model.AdaptiveEmbedding(20, 32, self.CUTOFFS, **kwargs)
        layer.build((None, 8))
        return layer, [keras.ops.convert_to_numpy(weight).astype("float64") for weight in layer.weights]

    def test_weights(self):
        shapes = [weight.shape for weight in self.layer()[1]]
        assert sorted(shapes) == sorted([(4, 32), (32, 32), (5, 8), (8, 32), (11, 2), (2, 32), (32, 2)])

    def test_embeddings(self):
        layer, weights = self.layer()
        tables, projections = weights[0:6:2], weights[1:6:2]
        words = np.arange(20).reshape(4, 5)
        expected = np.concatenate([table @ projection for table, projection in zip(tables, projections)])
        np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(words)), expected.reshape(4, 5, 32), atol=1e-5)

    def test_log_probabilities(self):
        """Of each word by the formula, word by word."""
        layer, weights = self.layer()
        tables, projections, clusters = weights[0:6:2], weights[1:6:2], weights[6]
        hidden = np.random.default_rng(0).normal(size=(3, 32))
        log_probs = keras.ops.convert_to_numpy(layer(hidden.astype("float32"), reverse=True))
        for row, h in enumerate(hidden):
            head = log_softmax([*(tables[0] @ projections[0] @ h), *(h @ clusters)])
            for word in range(20):
                (band,) = (i for i, (first, end) in enumerate(self.BANDS) if first <= word < end)
                if band == 0:
                    expected = head[word]
                else:
                    in_band = log_softmax([np.dot(vector, projections[band] @ h) for vector in tables[band]])
                    expected = head[3 + band] + in_band[word - self.BANDS[band][0]]
                assert log_probs[row, word] == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
    def test_probabilities_sum_to_one(self, dtype):
        layer, _ = self.layer(dtype=dtype)
        hidden = 10 * np.random.default_rng(0).normal(size=(2, 3, 32)).astype("float32")
        log_probs = layer(hidden, reverse=True)
        assert keras.backend.standardize_dtype(log_probs.dtype) == "float32"
        sums = np.exp(keras.ops.convert_to_numpy(log_probs).astype("float64")).sum(axis=-1)
        np.testing.assert_allclose(sums, np.ones((2, 3)), atol=1e-5)

    def test_rdrop_runs_the_embeddings_once(self):
        calls = rdrop_keras.sharing(experiment.trainable(small_model(self.CUTOFFS))).calls
        embedding, softmax = (call for call in calls if call.kind == "AdaptiveEmbedding")
        assert embedding.once and not softmax.once


@pytest.mark.parametrize("cutoffs", [(), (10, 30)], ids=["softmax", "adaptive"])
def test_cached_decoding_agrees_with_the_model(cutoffs):
    """Greedy decoding step by step, each with the whole model and no cache, gives the same words."""
    rng = np.random.default_rng(0)
    model = small_model(cutoffs)
    for weight in model.weights:
        if len(weight.shape) > 1:
            weight.assign(rng.normal(size=weight.shape))  # As initialized it says one word again and again.
    words = rng.integers(50, size=(3, 8))
    known = np.arange(8) < np.array([[2], [3], [5]])
    model.compile(sampler=keras_hub.samplers.GreedySampler())
    inputs = {"words": np.where(known, words, 1).astype("int32"), "known": known}
    generated = model.generate(inputs, stop_token_ids=None)
    expected = inputs["words"].copy()
    for i in range(1, 8):
        following = keras.ops.convert_to_numpy(model(expected))[:, i - 1].argmax(axis=-1)
        expected[:, i] = np.where(known[:, i], expected[:, i], following)
    np.testing.assert_array_equal(generated, expected)
    assert len(np.unique(expected[~known])) > 2


@pytest.mark.parametrize("cutoffs", [(), (10, 30)], ids=["softmax", "adaptive"])
def test_model_is_saved_and_loaded(tmp_path, cutoffs):
    model = small_model(cutoffs)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x = np.ones((2, 8), "int32")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_articles_become_lines():
    article = (
        "\n_START_ARTICLE_\nAgnes (cow)\n_START_PARAGRAPH_\nAgnes gave 3.5 litres._NEWLINE_She's old.\n"
        "_START_SECTION_\nEarly life\n_START_PARAGRAPH_\nBorn élan."
    )
    assert language_model.article_lines(article) == [
        "= Agnes ( cow ) =",
        "Agnes gave 3 . 5 litres .",
        "She ' s old .",
        "= = Early life = =",
        "Born élan .",
    ]


def test_default_data_is_of_tensorflow_datasets(monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr("sys.argv", ["language_model.py", "--train-rows", "5"])
    monkeypatch.setattr(language_model, "SCORED_ARTICLES", 3)
    read, load, splits = [], tfds.load, []
    monkeypatch.setattr(language_model, "article_lines", lambda text: [read.append(text) or text])
    # Mocked data are of one size, whatever slice is asked for.
    monkeypatch.setattr(tfds, "load", lambda name, split: splits.append((name, split)) or load(name, split=split))
    with tfds.testing.mock_data(num_examples=8):
        texts = language_model.load_data(language_model.parse_arguments())
    assert {split: len(lines) for split, lines in texts.items()} == {"train": 5, "validation": 8, "test": 8}
    assert len(read) == 21 and all(isinstance(text, str) for text in read)
    assert splits[1:] == [("wiki40b/en", "validation[:3]"), ("wiki40b/en", "test[:3]")]


def test_defaults_are_those_of_the_preset(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["language_model.py", *flags])
        args = language_model.parse_arguments()
        return args.vocabulary_size, args.block_length, args.cutoffs

    assert parse() == (100_000, 512, (20_000, 60_000))
    assert parse("--preset", "none") == (10_000, 64, ())
    assert parse("--preset", "none", "--adaptive") == (10_000, 64, (2_000, 6_000))
    assert parse("--adaptive", "7", "9", "--vocabulary-size", "30") == (30, 512, (7, 9))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--preset", "large"), "invalid choice: 'large'"),
        (("--vocabulary-size", "2"), "--vocabulary-size must be ≥ 3. Received: 2"),
        (("--block-length", "0"), "--block-length must be ≥ 1. Received: 0"),
        (("--generate", "-1"), "--generate must be ≥ 0. Received: -1"),
        (("--generate", "7"), "--generate must be ≤ 6, --block-length less 10. Received: 7"),
        (("--adaptive", "6", "4"), "--adaptive must be 1 to 3 increasing numbers ≥ 1. Received: 6 4"),
        (("--adaptive", "0"), "Received: 0"),
        (("--adaptive", "1", "2", "3", "4"), "--adaptive must be 1 to 3 increasing numbers ≥ 1. Received: 1 2 3 4"),
        (
            ("--adaptive", "4", "10"),
            "--adaptive must have cutoffs below the 10 words of the vocabulary. Received: 4 10",
        ),
        (("--batch-size", "512"), "--batch-size must be ≤ the 192 rows to train on. Received: 512"),
        (("--data", "nowhere"), "--data must be a folder that exists. Received: nowhere"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else "",
)
def test_bad_flags(run_example, data, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_example(language_model, "--data", data, *SMALL, *flags)
    assert message in capsys.readouterr().err


def test_lines_without_words(run_example, data, capsys):
    (data / "train.txt.gz").unlink()
    (data / "train.txt").write_text("\n \none two\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run_example(language_model, "--data", data, *SMALL, "--train-rows", 2)
    assert "--train-rows must take in a line with words. Received: 2" in capsys.readouterr().err
