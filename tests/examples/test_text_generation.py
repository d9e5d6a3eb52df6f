"""`examples/translation.py`, `language_model.py` and `summarization.py`, on small data made here."""

import functools
import gzip
import re

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.needs("keras_hub", "tensorflow", "tensorflow_datasets")

NAMES = ("translation", "language_model", "summarization")
WORDS = {"one": "eins", "two": "zwei", "three": "drei", "four": "vier", "five": "sechs", "six": "acht"}


@pytest.fixture
def run_small(load, run):
    def run_small(name, *flags):
        return run(load(name), "--small", "--data", "data", *flags)

    return run_small


@pytest.fixture
def data(tmp_path):
    """Makes the folder `data` of a tutorial, with `rows` rows for training and half as many in the other splits."""

    def data(name, rows=16):
        rng = np.random.default_rng(0)
        folder = tmp_path / "data"
        folder.mkdir()
        columns = {"translation": "en\tde\n", "summarization": "id\tdocument\tsummary\n", "language_model": ""}[name]
        for split, size in (("train", rows), ("valid", rows // 2), ("test", rows // 2)):
            content = columns
            for row in range(size):
                words = rng.choice(list(WORDS), size=8)
                renamed = " ".join(WORDS[word] for word in words[:4])
                cells = {"translation": [renamed], "summarization": [renamed], "language_model": []}[name]
                cells = [" ".join(words), *cells]
                content += "\t".join([str(row), *cells] if name == "summarization" else cells) + "\n"
            ending = "txt" if name == "language_model" else "tsv"
            (folder / f"{split}.{ending}.gz").write_bytes(gzip.compress(content.encode()))
        return folder

    return data


# On TensorFlow `test_defaults.py` trains and exports.
@pytest.mark.slow
@pytest.mark.backends("jax")
@pytest.mark.parametrize(
    "name, score, saved",
    [
        ("translation", "BLEU of 8 test sentences: ", "translator"),
        ("language_model", "Perplexity a token of 8 test rows: ", "language_model"),
        ("summarization", "rougeLsum of 8 test rows: ", "summarizer"),
    ],
)
def test_trains_scores_and_saves(run_small, data, difference, name, score, saved):
    folder = data(name)
    printed = run_small(name, "--epochs", "2")
    assert "Epoch 2/2" in printed and "consistency_loss" in printed and "val_loss" in printed
    assert float(re.search(re.escape(score) + r"(\S+)\n", printed)[1]) >= 0
    output = folder.parent / "runs" / name
    assert list(output.glob("logs/train/events*"))
    assert (output / f"{saved}.keras").exists()
    assert difference(printed) < 1e-4


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_translation_on_two_devices(run_small, data, difference, monkeypatch):
    import tensorflow as tf

    data("translation")
    # By default strategies use collective operations, which must all have the same number of devices in one process.
    one = tf.distribute.ReductionToOneDevice()
    mirrored = functools.partial(tf.distribute.MirroredStrategy, ["CPU:0", "CPU:1"], cross_device_ops=one)
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", mirrored)
    printed = run_small("translation", "--epochs", "1", "--strategy", "mirrored")
    assert "BLEU of 8 test sentences: " in printed and difference(printed) < 1e-4


@pytest.mark.slow
@pytest.mark.backends("jax")
def test_translation_learns(load, data):
    tutorial = load("translation")
    keras.utils.set_random_seed(0)
    splits = tutorial.load_data(data("translation", rows=64))
    train = tutorial.make_batches(*splits["train"], shuffle=True)
    model = tutorial.rdrop_keras.RDropModel(
        tutorial.build_model(splits["train"][0] + splits["train"][1], small=True),
        alpha=1.0,
        divergence=tutorial.rdrop_keras.Divergence("kl", from_logits=True),
    )
    tutorial.LEARNING_RATE = 1e-2
    tutorial.compile_model(model, 10 * len(train))
    losses = model.fit(train, epochs=10, verbose=0).history["task_loss"]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_shuffled_anew_in_each_epoch(load, data, name):
    tutorial = load(name)
    split = tutorial.load_data(data(name, rows=64))["train"]
    batches = tutorial.make_batches(*split, True) if name == "translation" else tutorial.make_batches(split, True)

    def epoch():
        batches_of_texts = [batch["encoder_text"] if isinstance(batch, dict) else batch for batch in batches]
        return [text.decode() for batch in batches_of_texts for text in batch.numpy()]

    first, second = epoch(), epoch()
    assert first != second and sorted(first) == sorted(second)
    assert len(first) == 64


def test_smoothed_loss_is_that_of_smoothed_labels(load):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 3, 5))
    labels = rng.integers(5, size=(2, 3))
    weights = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    loss = load("translation").SmoothedCrossentropy(reduction="mean_with_sample_weight")
    one_hot = 0.9 * np.eye(5)[labels] + 0.1 / 5
    log_probs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = (-(one_hot * log_probs).sum(axis=-1) * weights).sum() / weights.sum()
    received = loss(labels, logits.astype("float32"), sample_weight=weights)
    assert float(received) == pytest.approx(expected, rel=1e-5)


def test_rouge(load):
    scores = load("summarization").rouge(["a b c", "d"], ["a b", "e"])
    # In the first row words have precision 1 and recall 2/3, pairs precision 1 and recall 1/2. The second row has 0.
    assert scores == pytest.approx({"rouge1": 40.0, "rouge2": 100 / 3, "rougeLsum": 40.0})


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("name", NAMES)
def test_default_data_is_of_tensorflow_datasets(load, name):
    tutorial = load(name)
    with tutorial.tfds.testing.mock_data(num_examples=60):
        splits = tutorial.load_data(rows=10)
        assert set(splits) == {"train", "validation", "test"}
        if name == "translation":
            (source, *_), (target, *_) = splits["train"]
            assert len(splits["train"][0]) == 10 and isinstance(source, str) and isinstance(target, str)
        elif name == "language_model":
            assert len(splits["train"]) == 10 and all(isinstance(row, str) for row in splits["train"])
        else:
            rows = list(splits["train"].as_numpy_iterator())
            assert len(rows) == 10 and set(rows[0]) == {"encoder_text", "decoder_text"}


def test_articles_lose_their_marks(load, monkeypatch):
    tutorial = load("language_model")
    text = "\n_START_ARTICLE_\nA Film\n_START_PARAGRAPH_\nIt is one._NEWLINE_It is old."
    monkeypatch.setattr(tutorial.tfds, "load", lambda name, split: [{"text": text.encode()}])
    monkeypatch.setattr(tutorial.tfds, "as_numpy", lambda rows: rows)
    assert tutorial.read_articles("test").split() == ["A", "Film", "It", "is", "one.", "It", "is", "old."]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [["--alpha", "-1"], ["--alpha", "nan"], ["--epochs", "0"]])
def test_bad_flags(run_small, capsys, name, flags):
    with pytest.raises(SystemExit):
        run_small(name, *flags)
    assert "--alpha must be a number ≥ 0, and --epochs ≥ 1. Received: " in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_missing_folder(run_small, name):
    with pytest.raises(FileNotFoundError, match=r"--data must be a folder with one of train\.t.*Received: data"):
        run_small(name)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("translation", "en\tde\tfr\n", r"train\.tsv, line 1: there must be two columns, separated by a tab. Received"),
        ("translation", "en\tde\na\tb\nc\n", r"train\.tsv, line 3: there must be two columns"),
        ("translation", "en\tde\n", "The train split must have at least 8 rows. Received: 0"),
        ("translation", "en\tde\na\tb\n", r"The train split must have at least 8 rows. Received: 1"),
        ("summarization", "text\tsummary\n", r"must have columns document, summary. Received: \['text', 'summary'\]"),
        ("summarization", "document\tsummary\na\n", r"train\.tsv, line 2: there must be 2 columns, as in line 1"),
        (
            "summarization",
            "document\tsummary\na\tb\n",
            r"The train split must have at least 8 rows. Received: 1",
        ),
        (
            "language_model",
            "a b c",
            r"The train split must have text.* BATCH_SIZE=8 rows of 8 words.* Received: 1 rows",
        ),
    ],
)
def test_bad_data(run_small, tmp_path, name, content, message):
    (tmp_path / "data").mkdir()
    for split in ("train", "validation", "test"):
        ending = "txt" if name == "language_model" else "tsv"
        (tmp_path / "data" / f"{split}.{ending}").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run_small(name)
