"""The tutorials without `--small` and `--data`, on prepared data and presets in folders made here.

tensorflow-datasets reads its own format under its own names, and KerasHub loads presets that it has saved. So each line
that a user with a network runs is run, and only the download is not.
"""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.backends("tensorflow"),  # On JAX the tests of each tutorial train and save.
    pytest.mark.needs("keras_hub", "tensorflow", "tensorflow_datasets"),
]

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
RNG = np.random.default_rng(0)


def sentences(rows, words=6):
    return [" ".join(RNG.choice(WORDS, size=words)) for _ in range(rows)]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Writes columns as the prepared data of a dataset, and makes the folder tensorflow-datasets' default one."""
    folder = tmp_path / "tensorflow_datasets"
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))

    def prepare(name, splits, columns):
        builder = tfds.builder(name, data_dir=folder)
        assert set(columns(2)) == set(builder.info.features)
        tfds.dataset_builders.store_as_tfds_dataset(
            name=builder.name,
            config=builder.builder_config and builder.builder_config.name,
            version=str(builder.version),
            data_dir=folder,
            features=builder.info.features,
            split_datasets={split: tf.data.Dataset.from_tensor_slices(columns(rows)) for split, rows in splits.items()},
        )

    return prepare


@pytest.fixture
def preset(tmp_path):
    """Saves parts of a KerasHub task as a preset. Returns its folder."""

    def preset(*parts):
        for part in parts:
            part.save_to_preset(tmp_path / "preset")
        return str(tmp_path / "preset")

    return preset


def test_glue(load, run, tmp_path, prepare, preset):
    glue = load("glue")

    def columns(rows):
        texts = {"sentence1": sentences(rows), "sentence2": sentences(rows)}
        return {**texts, "label": np.arange(rows) % 2, "idx": np.arange(rows, dtype="int32")}

    prepare("glue/rte", {"train": 32, "validation": 8, "test": 8}, columns)
    small = glue.build_classifier("rte", (sentences(8),))
    glue.PRESET = preset(small.backbone, small.preprocessor.tokenizer)
    printed = run(glue, "--task", "rte", "--epochs", 1)
    assert "rte accuracy: " in printed and "consistency_loss" in printed
    assert {path.name for path in (tmp_path / "runs" / "rte").iterdir()} == {"logs", "served"}


def test_vit_cifar100(load, run, prepare, preset):
    vit = load("vit_cifar100")
    vit.IMAGE_SIZE = vit.SMALL_IMAGE_SIZE

    def columns(rows):
        images = RNG.integers(0, 255, (rows, 32, 32, 3)).astype("uint8")
        labels = np.arange(rows) % 100
        return {"id": [f"image{i}" for i in range(rows)], "image": images, "label": labels, "coarse_label": labels % 20}

    prepare("cifar100", {"train": 40, "test": 8}, columns)
    vit.PRESET = preset(vit.build_classifier(10, 0.1, small=True))
    printed = run(vit, "--epochs", 1)
    assert "Test accuracy: " in printed and "to the loaded one." in printed and "consistency_loss" in printed


def test_translation(load, run, difference, tmp_path, prepare):
    translation = load("translation")
    translation.MODEL = translation.SMALL
    translation.VOCABULARY_SIZE = translation.SMALL_VOCABULARY_SIZE
    prepare(
        translation.DATASET,
        {"train": 16, "validation": 8, "test": 8},
        lambda rows: {"pt": sentences(rows), "en": sentences(rows)},
    )
    printed = run(translation, "--epochs", 1)
    assert "BLEU of 8 test sentences: " in printed and "consistency_loss" in printed
    assert difference(printed) < 1e-4
    assert list(tmp_path.glob("runs/translation/logs/train/events*"))


def test_language_model(load, run, difference, tmp_path, prepare, preset):
    language_model = load("language_model")
    language_model.ARTICLES = {"train": 8, "validation": 4, "test": 4}

    def columns(rows):
        marks = "\n_START_ARTICLE_\nNumbers\n_START_PARAGRAPH_\n"
        names = [f"Q{i}" for i in range(rows)]
        return {"text": [marks + text for text in sentences(rows, 32)], "wikidata_id": names, "version_id": names}

    prepare(language_model.DATASET, {"train": 12, "validation": 6, "test": 6}, columns)
    small = language_model.build_model(sentences(8))
    tokenizer = small.preprocessor.tokenizer
    assert tokenizer.end_token_id != tokenizer.pad_token_id  # Or every text that is generated ends at once.
    language_model.PRESET = preset(small.backbone, tokenizer)
    printed = run(language_model, "--epochs", 1)
    assert "Perplexity a token of " in printed and language_model.PROMPT in printed
    assert difference(printed) < 1e-4
    assert list(tmp_path.glob("runs/language_model/logs/train/events*"))


def test_summarization(load, run, difference, tmp_path, prepare, preset):
    summarization = load("summarization")
    summarization.DOCUMENT_LENGTH = summarization.SMALL_DOCUMENT_LENGTH
    summarization.SUMMARY_LENGTH = summarization.SMALL_SUMMARY_LENGTH

    def columns(rows):
        names = [f"story{i}" for i in range(rows)]
        return {"article": sentences(rows, 12), "highlights": sentences(rows), "id": names, "publisher": names}

    prepare(summarization.DATASET, {"train": 16, "validation": 8, "test": 8}, columns)
    small = summarization.build_model(sentences(8))
    summarization.PRESET = preset(small.backbone, small.preprocessor.tokenizer)
    printed = run(summarization, "--epochs", 1)
    assert "rougeLsum of 8 test rows: " in printed and "consistency_loss" in printed
    assert difference(printed) < 1e-4
    assert list(tmp_path.glob("runs/summarization/logs/train/events*"))
