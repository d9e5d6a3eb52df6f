"""`benchmarks/translation.py`, on sentences made here: words are renamed and their order is turned round."""

import gzip

import keras
import keras_hub
import numpy as np
import pytest

import translation

WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "sechs", "six": "acht"}
SIZES = {"train": 256, "validation": 32, "test": 32}
SMALL = ("--preset", "none", "--vocabulary-size", 60, "--max-length", 12, "--batch-size", 32, "--learning-rate", 5e-3)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for split, size in SIZES.items():
        lines = ["en\tde"]
        for _ in range(size):
            words = rng.choice(list(WORDS), size=5)
            lines.append(f"{' '.join(words)}\t{' '.join(WORDS[word] for word in words[::-1])}")
        (folder / f"{split}.tsv.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    return folder


def small_translator(seed=0):
    keras.utils.set_random_seed(seed)
    return translation.Translator(50, 8, num_layers=2, hidden_dim=16, intermediate_dim=32, num_heads=2, dropout=0.1)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_is_scored(run_example, data, capsys):
    flags = ("--data", data, *SMALL, "--epochs", 12, "--compare", "--alpha", 1, "--dropout", 0.1)
    plain, rdrop = run_example(translation, *flags)
    for run in (plain, rdrop):
        assert run["curves"]["val_loss"][-1] < 0.7 * run["curves"]["val_loss"][0]
        assert set(run["scores"]) == {"validation BLEU", "test BLEU"}
    assert max(run["scores"]["test BLEU"] for run in (plain, rdrop)) > 20
    assert "consistency_loss" in rdrop["curves"] and "consistency_loss" not in plain["curves"]
    assert (data.parent / "translation.png").stat().st_size > 10_000
    assert "R-Drop (alpha=1)" in capsys.readouterr().out


def test_cached_decoding_agrees_with_the_model():
    """Greedy decoding step by step, each with the whole model and no cache, gives the same tokens."""
    translator = small_translator()
    source = np.random.default_rng(0).integers(4, 50, (5, 8))
    source[2:, 5:] = translation.PAD
    prompt = np.zeros((5, 8), "int32")
    prompt[:, 0] = translation.START
    translator.compile(sampler=keras_hub.samplers.GreedySampler())
    generated = translator.generate({"source": source, "target": prompt}, stop_token_ids=(translation.END,))
    expected = prompt.copy()
    for i in range(1, 8):
        logits = keras.ops.convert_to_numpy(translator({"source": source, "target": expected}))
        following = logits[:, i - 1].argmax(axis=-1)
        ended = (expected == translation.END).any(axis=1)
        expected[:, i] = np.where(ended, translation.PAD, following)
    ended = (expected == translation.END).any(axis=1)
    np.testing.assert_array_equal(generated[~ended], expected[~ended])
    for ours, theirs in zip(generated[ended], expected[ended]):
        end = list(theirs).index(translation.END)
        np.testing.assert_array_equal(ours[: end + 1], theirs[: end + 1])


def test_beams_find_what_is_at_least_as_likely():
    """Over all translations of two words, a beam as wide as the vocabulary finds the best mean log-probability."""
    translator = small_translator(seed=1)
    source = np.random.default_rng(1).integers(4, 50, (3, 8))
    prompt = np.zeros((3, 3), "int32")
    prompt[:, 0] = translation.START
    translator.compile(sampler=translation.BeamSampler(50, translation.PAD))
    generated = translator.generate({"source": source, "target": prompt}, stop_token_ids=(translation.END,))

    def log_probs(target):
        padded = np.zeros((len(target), 8), "int32")
        padded[:, : target.shape[1]] = target
        inputs = {"source": np.repeat(source[row : row + 1], len(target), axis=0), "target": padded}
        logits = keras.ops.convert_to_numpy(translator(inputs)).astype("float64")
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    for row in range(3):
        first = log_probs(prompt[row : row + 1])[0, 0]
        second = log_probs(np.array([[translation.START, word] for word in range(50)]))[:, 1]
        totals = first[:, None] + second
        lengths = np.full((50, 50), 2.0)
        lengths[:, translation.PAD] -= 1
        lengths[translation.PAD] -= 1
        # An ended translation goes on with padding for nothing.
        totals[translation.END] = np.where(np.arange(50) == translation.PAD, first[translation.END], -np.inf)
        best = np.unravel_index(np.argmax(totals / np.maximum(lengths, 1)), totals.shape)
        assert tuple(generated[row, 1:]) == best


def test_loss_is_that_of_smoothed_labels():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 3, 5))
    labels = rng.integers(5, size=(2, 3))
    weights = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss = translation.SmoothedCrossentropy()(labels, logits.astype("float32"), sample_weight=weights)
    one_hot = 0.9 * np.eye(5)[labels] + 0.1 / 5
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = (-(one_hot * log_probs).sum(axis=-1) * weights).sum() / weights.sum()
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_model_is_saved_and_loaded(tmp_path):
    translator = small_translator()
    translator.save(tmp_path / "translator.keras")
    loaded = keras.models.load_model(tmp_path / "translator.keras")
    x = {"source": np.ones((2, 8), "int32"), "target": np.ones((2, 8), "int32")}
    np.testing.assert_allclose(loaded.predict(x, verbose=0), translator.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


def test_default_data_is_of_tensorflow_datasets(monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr("sys.argv", ["translation.py", "--train-rows", "5"])
    with tfds.testing.mock_data(num_examples=8):
        pairs, languages = translation.load_data(translation.parse_arguments())
    assert languages == ("pt", "en")
    assert {split: (len(a), len(b)) for split, (a, b) in pairs.items()} == {
        "train": (5, 5),
        "validation": (8, 8),
        "test": (8, 8),
    }
    assert all(isinstance(text, str) for text in pairs["train"][0])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--source", "fr"), "--source and --target must be two of the languages en, de. Received: fr and de"),
        (("--source", "de"), "Received: de and de"),
        (("--vocabulary-size", "5000"), "--vocabulary-size 5000 does not fit the training text"),
        (("--beams", "0"), "--beams must be ≥ 1. Received: 0"),
        (("--preset", "large"), "invalid choice: 'large'"),
        (("--batch-size", "512"), "--batch-size must be ≤ the 256 rows to train on. Received: 512"),
    ],
    ids=["language", "same language", "vocabulary", "beams", "preset", "batch"],
)
def test_bad_flags(run_example, data, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_example(translation, "--data", data, *SMALL, *flags)
    assert message in capsys.readouterr().err
