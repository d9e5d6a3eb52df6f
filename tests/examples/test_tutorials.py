"""Each tutorial runs whole: it trains, scores, saves and loads again."""

import re

import numpy as np
import pytest

pytestmark = pytest.mark.slow

SMALL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
kerashub = pytest.mark.needs("keras_hub", "tensorflow", "tensorflow_datasets")
on_two_backends = pytest.mark.backends("tensorflow", "jax")


def byte_pairs(texts, size=300, special_tokens=()):
    """Vocabulary and merges, learned from `texts`."""
    import json

    import tokenizers

    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, size, special_tokens=list(special_tokens), show_progress=False)
    pieces = json.loads(trainer.to_str())["model"]
    return pieces["vocab"], [" ".join(pair) for pair in pieces["merges"]]


@pytest.mark.needs("matplotlib", "sklearn")
@pytest.mark.backends("tensorflow", "torch")  # JAX compiles the shifts for minutes.
def test_quickstart(run_page, tmp_path):
    epochs = {"plain": 2, "plain, as long": 2, "R-Drop": 2}
    page, printed = run_page("quickstart", EPOCHS=epochs, NUM_SEEDS=2, PASSES_AN_EPOCH=2)
    rows = re.findall(r"^(plain|plain, as long|R-Drop) +2 +[\d.]+ +0\.\d+ ± [\d.]+ +\d\.\d+ ± [\d.]+$", printed, re.M)
    assert rows == list(epochs)
    assert (tmp_path / "quickstart.png").stat().st_size > 10_000
    assert "consistency_loss" not in page.histories["plain"][0].history


# KerasTuner uses names that Python deprecates.
@pytest.mark.filterwarnings("ignore:(currentThread|getName|setDaemon):DeprecationWarning")
@pytest.mark.needs("keras_tuner", "sklearn")
def test_tune_alpha(run_page):
    """Warnings are errors here, that of Keras about an optimizer's variables too."""
    _, printed = run_page("tune_alpha", TRIALS=2, EPOCHS=2, STARTS=(0.5,))
    rows = re.findall(r"^ +\d\.\d +0\.\d +0\.5 +(\d\.\d{4})$", printed, re.MULTILINE)
    assert len(rows) == 2 and rows == sorted(rows)
    assert re.search(r"on the test split: loss \d\.\d{4}, accuracy 0\.\d{4}", printed)


@kerashub
@on_two_backends
def test_glue(run_page, prepare, preset):
    import keras_hub

    rng = np.random.default_rng(0)
    words = np.array([["bad", "poor", "awful"], ["good", "fine", "great"]])

    def columns(rows):
        labels = rng.integers(2, size=rows)
        texts = {name: [f"a {word} film" for word in words[labels, rng.integers(3, size=rows)]] for name in names}
        return {**texts, "label": labels, "idx": np.arange(rows, dtype="int32")}

    names = ("sentence1", "sentence2")
    prepare("glue/mrpc", {"train": 160, "validation": 32, "test": 8}, columns)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", *words.flat]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=True)
    backbone = keras_hub.models.BertBackbone(len(vocabulary), **SMALL, dropout=0.1, max_sequence_length=12)
    constants = {"EPOCHS": 4, "BATCH_SIZE": 16, "LEARNING_RATE": 1e-2, "SEQUENCE_LENGTH": 12}
    page, printed = run_page("glue", PRESET=preset(backbone, tokenizer), **constants)
    assert page.accuracy > 0.9 and f"Accuracy {page.accuracy:.3f} and F1 " in printed
    assert "consistency_loss" in printed
    by_model, by_loaded = re.search(r"Class by the model: (\d), by the loaded one: (\d)\n", printed).groups()
    assert by_model == by_loaded


@kerashub
@on_two_backends
def test_vit_cifar100(run_page, prepare, preset):
    import keras_hub

    rng = np.random.default_rng(0)

    def columns(rows):
        images = rng.integers(0, 255, (rows, 32, 32, 3)).astype("uint8")
        labels = np.arange(rows) % 100
        return {"id": [f"image{i}" for i in range(rows)], "image": images, "label": labels, "coarse_label": labels % 20}

    prepare("cifar100", {"train": 80, "test": 8}, columns)
    converter = keras_hub.layers.ViTImageConverter(image_size=(8, 8), scale=1 / 127.5, offset=-1.0)
    backbone = keras_hub.models.ViTBackbone(
        (8, 8, 3), patch_size=4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    small = keras_hub.models.ViTImageClassifier(
        backbone, 10, keras_hub.models.ViTImageClassifierPreprocessor(converter)
    )
    _, printed = run_page("vit_cifar100", PRESET=preset(small), EPOCHS=1, BATCH_SIZE=8)
    assert "72 images to train on" in printed and "8 test images: loss " in printed and "consistency_loss" in printed
    by_model, by_loaded = re.findall(r"to the (?:loaded )?model: +(.*)\n", printed)
    assert by_model == by_loaded


def run_translation(run_page, prepare, sentences, **constants):
    prepare(
        "ted_hrlr_translate/pt_to_en",
        {"train": 64, "validation": 8, "test": 8},
        lambda rows: {name: sentences(rows // 2, 1) + sentences(rows - rows // 2, 8) for name in ("pt", "en")},
    )
    constants = {"EPOCHS": 1, "BATCH_SIZE": 8, "VOCABULARY_SIZE": 300, "MAX_LENGTH": 16, **constants}
    return run_page("translation", MODEL={**SMALL, "dropout": 0.1}, **constants)


@kerashub
@on_two_backends
def test_translation(run_page, prepare, sentences):
    page, printed = run_translation(run_page, prepare, sentences, EPOCHS=2)
    assert "BLEU of 8 test sentences: " in printed and "consistency_loss" in printed
    assert f"The loaded model: {page.translations[0]}\n" in printed
    lengths = [inputs["decoder_token_ids"].shape[1] for inputs, _, _ in page.train]
    assert set(lengths) == {8, 16}
    assert page.history.history["loss"][1] < page.history.history["loss"][0]


@kerashub
@pytest.mark.backends("tensorflow")
def test_translation_on_two_devices(run_page, prepare, sentences, monkeypatch):
    import tensorflow as tf

    # By default strategies use collective operations, which must all have the same number of devices in one process.
    mirrored, one = tf.distribute.MirroredStrategy, tf.distribute.ReductionToOneDevice()
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: mirrored(["CPU:0", "CPU:1"], cross_device_ops=one))
    devices = tf.config.list_logical_devices
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind=None: devices("CPU" if kind == "GPU" else kind))
    page, printed = run_translation(run_page, prepare, sentences)
    assert page.strategy.num_replicas_in_sync == 2
    assert "BLEU of 8 test sentences: " in printed and "consistency_loss" in printed


@kerashub
@on_two_backends
def test_language_model(run_page, prepare, preset, sentences):
    import keras_hub

    def columns(rows):
        marks = "\n_START_ARTICLE_\nNumbers\n_START_PARAGRAPH_\n"
        names = [f"Q{i}" for i in range(rows)]
        return {"text": [marks + text for text in sentences(rows, 32)], "wikidata_id": names, "version_id": names}

    prepare("wiki40b/en", {"train": 12, "validation": 6, "test": 6}, columns)
    vocabulary, merges = byte_pairs(sentences(8))
    # Last, as in GPT-2's own vocabulary: generation would take a padding's 0 for the end.
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges)
    backbone = keras_hub.models.GPT2Backbone(len(vocabulary), **SMALL, dropout=0.1, max_sequence_length=24)
    constants = {"EPOCHS": 1, "BATCH_SIZE": 8, "WORDS": 8, "SEQUENCE_LENGTH": 24, "PROMPT": "one"}
    constants["SPLITS"] = ["train[:8]", "validation[:4]", "test[:4]"]
    page, printed = run_page("language_model", PRESET=preset(backbone, tokenizer), **constants)
    assert re.search(r"Perplexity of a token of the test articles: \d+\.\d\d\n", printed)
    assert "_START_" not in next(page.train.unbatch().as_numpy_iterator()).decode()
    assert f"The loaded model: {page.PROMPT}" in printed and "consistency_loss" in printed


@kerashub
@pytest.mark.backends("tensorflow")  # Its model is that of the translation, which JAX compiles for as long.
def test_summarization(run_page, prepare, preset, sentences):
    import keras_hub

    def columns(rows):
        names = [f"story{i}" for i in range(rows)]
        return {"article": sentences(rows, 12), "highlights": sentences(rows), "id": names, "publisher": names}

    prepare("cnn_dailymail", {"train": 16, "validation": 8, "test": 8}, columns)
    special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = keras_hub.models.BartTokenizer(*byte_pairs(sentences(8), special_tokens=special_tokens))
    backbone = keras_hub.models.BartBackbone(tokenizer.vocabulary_size(), **SMALL, dropout=0.1, max_sequence_length=16)
    constants = {"EPOCHS": 1, "BATCH_SIZE": 8}
    source = {"DOCUMENT_LENGTH, SUMMARY_LENGTH": (16, 12)}
    page, printed = run_page("summarization", PRESET=preset(backbone, tokenizer), **constants, **source)
    assert re.search(r"^8 test rows: rouge1 [\d.]+, rouge2 [\d.]+, rougeLsum [\d.]+$", printed, re.MULTILINE)
    assert f"The loaded model: {page.summaries[0]}\n" in printed and "consistency_loss" in printed
