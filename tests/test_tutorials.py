"""`examples/glue.py` and `examples/vit_cifar100.py`, on data made here."""

import importlib.util
import pathlib
import shutil
import sys

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import rdrop_keras

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
COLOURS = ("blue", "green", "red")


def load(name):
    """The tutorial as a new module, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # By its name TensorFlow looks up the source of functions.
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def glue(monkeypatch):
    module = load("glue")
    small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "dropout": 0.1}
    constants = {"SMALL": small, "BATCH_SIZE": 16, "SEQUENCE_LENGTH": 12, "SMALL_LEARNING_RATE": 1e-2}
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def vit(monkeypatch):
    module = load("vit_cifar100")
    small = {"patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    constants = {"SMALL": small, "BATCH_SIZE": 16, "SMALL_IMAGE_SIZE": 8, "SMALL_LEARNING_RATE": 1e-2}
    for name, value in constants.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a tutorial's `main()` with flags, as on a command line."""

    def run(module, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags)])
        try:
            module.main()
        finally:
            if keras.backend.backend() == "jax":
                keras.distribution.set_distribution(None)

    return run


def write_tables(folder, label, rows, texts):
    folder.mkdir()
    for split, count in (("train", rows), ("dev", 20)):
        rng = np.random.default_rng(count)
        lines = ["\t".join([label, *texts])]
        for _ in range(count):
            good = rng.integers(2)
            words = [f"a {rng.choice(GOOD if good else BAD)} film" for _ in texts]
            lines.append("\t".join([str(good), *words]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 7)):
        for channel, colour in enumerate(reversed(COLOURS)):
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 160, (8, 8, 3))
                pixels[..., channel] += 90
                Image.fromarray(pixels.astype("uint8")).save(folder / f"{i}.png")
    return tmp_path / "images"


def printed_score(text, name):
    return float(text.split(f"{name}: ")[1].split()[0])


# ## GLUE
@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_glue_learns_pairs_and_exports(glue, run, tmp_path, monkeypatch, capsys):
    data = write_tables(tmp_path / "tables", "label", 160, ["sentence1", "sentence2"])
    run(glue, "--task", "rte", "--small", "--data", data, "--epochs", 4)
    text = capsys.readouterr().out
    assert "consistency_loss" in text
    assert printed_score(text, "rte accuracy") > 0.9
    written = {path.name for path in (tmp_path / "runs" / "rte").iterdir()}
    assert written == {"logs", "served" if keras.backend.backend() == "tensorflow" else "classifier.keras"}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_glue_regresses(glue, run, tmp_path, capsys):
    data = write_tables(tmp_path / "tables", "score", 32, ["sentence1", "sentence2"])
    run(glue, "--task", "stsb", "--small", "--data", data, "--epochs", 1, "--output", tmp_path / "other")
    text = capsys.readouterr().out
    assert all(-1 <= printed_score(text, f"stsb {name}") <= 1 for name in ("Pearson", "Spearman"))
    assert (tmp_path / "other" / "stsb" / "served").is_dir()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("task", ["cola", "mnli", "qqp", "stsb"])
def test_glue_reads_tensorflow_datasets(glue, task):
    with tfds.testing.mock_data(num_examples=6):
        splits = glue.load_data(task)
    assert len(splits) == 2
    for texts, labels in splits:
        assert len(texts) == (1 if task == "cola" else 2)
        assert all(len(column) == 6 and isinstance(column[0], str) for column in texts)
        assert labels.dtype == ("float32" if task == "stsb" else "int32")


def test_glue_evaluates_all_rows_once(glue):
    labels = np.arange(20, dtype="int32")
    batches = list(glue.make_batches(([str(i) for i in labels],), labels, training=False))
    weights = np.concatenate([weight for _, _, weight in batches])
    assert [len(y) for _, y, _ in batches] == [16, 16]
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in batches])[:20], labels)
    np.testing.assert_allclose(weights, [1.6] * 20 + [0] * 12, rtol=1e-6)


def test_glue_training_batches_are_shuffled_anew_in_each_epoch(glue):
    labels = np.arange(40, dtype="int32")
    batches = glue.make_batches(([str(i) for i in labels],), labels, training=True)
    first, second = ([np.array(y) for _, y in batches] for _ in range(2))
    assert [len(y) for y in first] == [16, 16]
    assert not np.array_equal(first, second)
    for (texts,), y in batches:
        assert [int(text) for text in np.array(texts)] == list(np.array(y))


def test_glue_scores(glue):
    labels, outputs = np.array([0, 1, 1, 0, 1]), np.eye(2)[[0, 1, 0, 1, 1]]
    assert glue.score("mrpc", labels, outputs) == pytest.approx({"accuracy": 3 / 5, "F1": 2 / 3})
    assert glue.score("rte", labels, outputs) == pytest.approx({"accuracy": 3 / 5})
    assert glue.score("cola", labels, outputs) == pytest.approx({"Matthews": 1 / 6})
    scores, outputs = np.array([0.0, 1.0, 3.0, 5.0]), np.array([[0.5], [0.1], [2.0], [9.0]])
    pearson = np.corrcoef(scores, outputs[:, 0])[0, 1]
    assert glue.score("stsb", scores, outputs) == pytest.approx({"Pearson": pearson, "Spearman": 0.8})


def test_glue_with_five_classes_of_ones_own(glue, tmp_path, monkeypatch):
    monkeypatch.setitem(glue.TASKS, "mine", (["text"], 5))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("label\ttext\n" + "".join(f"{i}\tclass {i}\n" for i in range(5)))
    (texts, labels), _ = glue.load_data("mine", tmp_path)
    assert glue.build_classifier("mine", texts).output.shape == (None, 5)
    ((column,), y) = next(iter(glue.make_batches(texts, labels, training=True)))
    assert len(column) == len(y) == 5


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--task", "wnli"), "invalid choice: 'wnli'"),
        (("--task", "rte", "--alpha", "-1"), "--alpha must be a number ≥ 0. Received: -1.0"),
        (("--task", "rte", "--alpha", "nan"), "--alpha must be a number ≥ 0. Received: nan"),
    ],
    ids=["task", "negative", "nan"],
)
def test_glue_flags_that_are_wrong(glue, run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(glue, *flags)
    assert message in capsys.readouterr().err


def test_glue_data_that_are_wrong(glue, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data must be a folder with one of train.tsv, train.tsv.gz. Rec"):
        glue.load_data("rte", tmp_path / "nowhere")
    data = write_tables(tmp_path / "tables", "label", 4, ["sentence"])
    with pytest.raises(ValueError, match=r"train.tsv must have columns sentence1, sentence2, label. Received: \['lab"):
        glue.load_data("rte", data)
    (data / "train.tsv").write_text("label\tsentence\n2\ta\n")
    with pytest.raises(ValueError, match="Labels of cola must be classes from 0 to 1, in the train split"):
        glue.load_data("cola", data)


# ## ViT
@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_vit_learns_and_exports(vit, run, images, tmp_path, capsys):
    run(vit, "--small", "--data", images, "--epochs", 6, "--dropout", 0.2)
    text = capsys.readouterr().out
    assert "consistency_loss" in text
    assert printed_score(text, "Test accuracy") > 0.8
    model, loaded = text.rpartition("The first two images are ")[2].split(" to the model, and\n")
    assert loaded.startswith(f"{model} to the loaded one.")
    served = "served" if keras.backend.backend() == "tensorflow" else "classifier.keras"
    assert {path.name for path in (tmp_path / "runs" / "vit").iterdir()} == {"logs", served}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_vit_reads_a_zip_under_a_strategy(vit, run, images, tmp_path, monkeypatch, capsys):
    tf = vit.tf
    shutil.make_archive(str(tmp_path / "images"), "zip", images)
    one = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one)
    monkeypatch.setitem(vit.STRATEGIES, "mirrored", lambda: strategy)
    run(vit, "--small", "--data", tmp_path / "images.zip", "--epochs", 1, "--strategy", "mirrored")
    assert 0 <= printed_score(capsys.readouterr().out, "Test accuracy") <= 1


@pytest.mark.backends("tensorflow")
def test_vit_reads_tensorflow_datasets(vit):
    with tfds.testing.mock_data(num_examples=20):
        train, validation, test, names = vit.load_data(32)
    assert len(names) == 100
    assert all(len(split) == 20 for split in (train, validation, test))
    images, labels = next(iter(vit.make_batches(train, training=True)))
    assert (images.shape, labels.shape) == ((16, 32, 32, 3), (16,))


@pytest.mark.backends("tensorflow", "jax")
def test_vit_has_dropout_and_scales_images(vit):
    classifier = vit.build_classifier(3, 0.25, small=True)
    rates = {layer.rate for layer in rdrop_keras.stochastic_layers(classifier)}
    assert rates == {0.25}
    assert classifier.output.shape == (None, 3)
    pixels = np.array([0.0, 127.5, 255.0], "float32")[:, None, None, None] * np.ones((1, 8, 8, 3), "float32")
    scaled = keras.ops.convert_to_numpy(classifier.preprocessor(pixels))
    np.testing.assert_allclose(scaled[:, 0, 0, 0], [-1, 0, 1], atol=1e-6)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--alpha", "-1"), "--alpha must be a number ≥ 0. Received: -1.0"),
        (("--dropout", "0"), "--dropout must be > 0 and < 1: R-Drop compares passes that it changes. Received: 0.0"),
    ],
    ids=["alpha", "dropout"],
)
def test_vit_flags_that_are_wrong(vit, run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(vit, *flags)
    assert message in capsys.readouterr().err


def test_vit_data_that_are_wrong(vit, images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images such as train/cat/1.jpg. Received: .*nowhere, which has no"):
        vit.load_data(8, tmp_path / "nowhere")
    (images / "test").rename(images / "valid")
    with pytest.raises(FileNotFoundError, match="which has no folder test"):
        vit.load_data(8, images)
