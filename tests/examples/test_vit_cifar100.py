"""`examples/vit_cifar100.py`, on images made here."""

import shutil

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import rdrop_keras

pytestmark = pytest.mark.needs("keras_hub", "tensorflow", "tensorflow_datasets")

COLOURS = ("blue", "green", "red")


@pytest.fixture
def vit(load):
    return load("vit_cifar100")


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


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_exports(vit, run, images, tmp_path):
    text = run(vit, "--small", "--data", images, "--epochs", 6, "--dropout", 0.2)
    assert "consistency_loss" in text
    assert printed_score(text, "Test accuracy") > 0.8
    model, loaded = text.rpartition("The first two images are ")[2].split(" to the model, and\n")
    assert loaded.startswith(f"{model} to the loaded one.")
    served = "served" if keras.backend.backend() == "tensorflow" else "classifier.keras"
    assert {path.name for path in (tmp_path / "runs" / "vit").iterdir()} == {"logs", served}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_reads_a_zip_under_a_strategy(vit, run, images, tmp_path, monkeypatch):
    tf = vit.tf
    shutil.make_archive(str(tmp_path / "images"), "zip", images)
    one = tf.distribute.ReductionToOneDevice()
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one)
    monkeypatch.setitem(vit.STRATEGIES, "mirrored", lambda: strategy)
    text = run(vit, "--small", "--data", tmp_path / "images.zip", "--epochs", 1, "--strategy", "mirrored")
    assert 0 <= printed_score(text, "Test accuracy") <= 1


@pytest.mark.backends("tensorflow")
def test_reads_tensorflow_datasets(vit):
    with tfds.testing.mock_data(num_examples=20):
        train, validation, test, names = vit.load_data(32)
    assert len(names) == 100
    assert all(len(split) == 20 for split in (train, validation, test))
    images, labels = next(iter(vit.make_batches(train, training=True)))
    assert (images.shape, labels.shape) == ((16, 32, 32, 3), (16,))


@pytest.mark.backends("tensorflow", "jax")
def test_has_dropout_and_scales_images(vit):
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
def test_flags_that_are_wrong(vit, run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(vit, *flags)
    assert message in capsys.readouterr().err


def test_data_that_are_wrong(vit, images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"images such as train/cat/1.jpg. Received: .*nowhere, which has no"):
        vit.load_data(8, tmp_path / "nowhere")
    (images / "test").rename(images / "valid")
    with pytest.raises(FileNotFoundError, match="which has no folder test"):
        vit.load_data(8, images)
