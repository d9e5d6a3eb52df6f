"""`benchmarks/vit_cifar100.py` and `task_data.read_images`, on images made here: noise of three colours."""

import argparse
import importlib.util
import io
import zipfile

import keras
import keras_hub
import numpy as np
import pytest
from PIL import Image

import rdrop_keras
import task_data
import vit_cifar100

CLASSES = ("blue", "green", "red")
COUNTS = {"train": 40, "test": 5}  # Of each class: 36 of the 40 are trained on.
TINY = {"image_shape": (8, 8, 3), "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
RUN = ("--batch-size", 20, "--learning-rate", 5e-3, "--dropout", 0.1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(vit_cifar100, "SMALL", TINY)


def coloured(rng, colour, size=8):
    image = rng.integers(0, 160, (size, size, 3))
    image[..., 2 - CLASSES.index(colour)] += 90
    return image.astype("uint8")


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def files():
    rng = np.random.default_rng(0)
    return {
        f"{split}/{colour}/{i:02}.png": png(coloured(rng, colour))
        for split, count in COUNTS.items()
        for colour in CLASSES
        for i in range(count)
    }


@pytest.fixture
def data(tmp_path, files):
    return write(tmp_path / "images", files)


@pytest.fixture
def preset(tmp_path):
    """A folder of a preset: images of 8×8 with a scale and an offset for each channel, no dropout."""
    converter = keras_hub.layers.ViTImageConverter(
        image_size=(8, 8), scale=(1 / 50, 1 / 60, 1 / 70), offset=(-1.0, -2.0, -3.0)
    )
    task = keras_hub.models.ViTImageClassifier(
        keras_hub.models.ViTBackbone(**TINY),
        num_classes=5,
        preprocessor=keras_hub.models.ViTImageClassifierPreprocessor(image_converter=converter),
        activation="softmax",
    )
    task.save_to_preset(str(tmp_path / "preset"))
    return tmp_path / "preset"


def arguments(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["vit_cifar100.py", *map(str, flags)])
    return vit_cifar100.parse_arguments()


@pytest.fixture
def trained(monkeypatch):
    """The models that the example has trained."""
    models = []
    train = vit_cifar100.train

    def kept(*args):
        model, scores = train(*args)
        models.append(model)
        return model, scores

    monkeypatch.setattr(vit_cifar100, "train", kept)
    return models


# ## Training
@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_is_scored(run_example, trained, data, capsys):
    # Wrong labels, so that the scores of the two splits are not the same.
    rng = np.random.default_rng(1)
    write(data, {f"test/blue/wrong{i}.png": png(coloured(rng, "red")) for i in range(3)})
    flags = ("--data", data, "--preset", "none", *RUN, "--epochs", 6, "--compare", "--alpha", 0.6)
    plain, rdrop = run_example(vit_cifar100, *flags)
    for run in (plain, rdrop):
        assert run["curves"]["val_loss"][-1] < 0.7 * run["curves"]["val_loss"][0]
    assert "consistency_loss" in rdrop["curves"] and "consistency_loss" not in plain["curves"]
    printed = capsys.readouterr().out
    assert f"{data} has no validation split: 12 images of train are held out for it" in printed
    assert "Images of 8×8 in 3 classes, seen at 8: train 108, test 18, validation 12" in printed

    images, labels = task_data.read_images(data, 8)[0]["test"]
    for run, model in zip((plain, rdrop), trained):
        assert not isinstance(model, rdrop_keras.RDropModel)
        predicted = keras.ops.convert_to_numpy(model(images)).argmax(axis=-1)
        assert set(run["scores"]) == {"validation accuracy", "test accuracy"}
        assert run["scores"]["test accuracy"] == pytest.approx((predicted == labels).mean(), abs=1e-6)
        assert run["scores"]["validation accuracy"] > 0.9


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_preset_is_fine_tuned_on_augmented_images(run_example, trained, data, preset, tmp_path):
    """Images larger than those of the preset, MixUp, smoothed labels; and the SavedModel takes bytes."""
    import tensorflow as tf

    flags = ("--preset", preset, "--image-size", 12, "--mixup", 0.2, "--label-smoothing", 0.1)
    export = tmp_path / "served"
    (run,) = run_example(vit_cifar100, "--data", data, *RUN, *flags, "--epochs", 4, "--export", export)
    assert run["curves"]["val_loss"][-1] < run["curves"]["val_loss"][0]
    (model,) = trained
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 3), "uint8")
    expected = keras.ops.convert_to_numpy(model(images))
    served = tf.saved_model.load(str(export))
    np.testing.assert_allclose(served.serve(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_imagenet_is_streamed(run_example, monkeypatch):
    import tensorflow_datasets as tfds

    flags = ("--dataset", "imagenet2012", "--preset", "none", "--train-rows", 8, "--batch-size", 4, "--epochs", 1)
    with tfds.testing.mock_data(num_examples=10):
        (run,) = run_example(vit_cifar100, *flags)
    assert np.isfinite(run["curves"]["val_loss"][0])
    assert set(run["scores"]) == {"validation accuracy", "test accuracy"}


# ## The data
def test_default_data_is_of_tensorflow_datasets(monkeypatch):
    import tensorflow_datasets as tfds

    args = arguments(monkeypatch, "--train-rows", 5)
    assert (args.dataset, args.preset) == ("cifar100", "vit_base_patch16_224_imagenet")
    assert args.preset in keras_hub.models.ViTImageClassifier.presets
    with tfds.testing.mock_data(num_examples=8):
        data = vit_cifar100.load_data(args)
        rows = list(tfds.as_numpy(tfds.load("cifar100", split="test")))
    assert {split: vit_cifar100.sizes(part) for split, part in data.items()} == {
        "train": (5, 32, 100),
        "validation": (8, 32, 100),
        "test": (8, 32, 100),
    }
    images, labels = data["test"]
    assert images.dtype == "uint8"
    np.testing.assert_array_equal(images, [row["image"] for row in rows])
    np.testing.assert_array_equal(labels, np.eye(100)[[row["label"] for row in rows]])


def test_streamed_images_are_cropped_to_the_middle_and_resized(monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 3), "uint8")
    read = []

    def load(name, split, shuffle_files):
        read.append((name, split, shuffle_files))
        return tf.data.Dataset.from_tensors({"image": pixels, "label": np.int64(7)}).repeat(6)

    monkeypatch.setattr(tfds, "load", load)
    args = arguments(monkeypatch, "--dataset", "imagenet2012", "--image-size", 4)
    data = vit_cifar100.load_data(args)
    assert read == [
        ("imagenet2012", "train[:99%]", True),
        ("imagenet2012", "train[99%:]", False),
        ("imagenet2012", "validation", False),
    ]
    assert all(vit_cifar100.sizes(split) == (6, 4, 1000) for split in data.values())
    image, label = next(iter(data["train"]))
    np.testing.assert_array_equal(image, pixels[:, 2:6])
    assert image.dtype == tf.uint8 and int(np.argmax(label)) == 7 and float(np.sum(label)) == 1

    args.train_rows = 5
    assert vit_cifar100.sizes(vit_cifar100.load_data(args)["train"]) == (5, 4, 1000)
    assert read[3] == ("imagenet2012", "train[:99%]", False)
    args.batch_size = 2
    (batches,) = vit_cifar100.training_batches(args, vit_cifar100.load_data(args)["train"])
    assert [images.shape for images, _ in batches] == [(2, 4, 4, 3), (2, 4, 4, 3)]
    (batches,) = vit_cifar100.evaluation_batches(args, data["test"])
    assert sum(len(images) for images, _ in batches) == 6


def test_dataset_that_cannot_be_loaded(monkeypatch):
    import tensorflow_datasets as tfds

    def load(*args, **kwargs):
        raise AssertionError("Manual directory does not exist")

    monkeypatch.setattr(tfds, "load", load)
    args = arguments(monkeypatch, "--dataset", "imagenet2012", "--image-size", 4)
    with pytest.raises(AssertionError) as error:
        vit_cifar100.load_data(args)
    assert error.value.__notes__ == ["imagenet2012 could not be loaded. --data reads local files in its place."]


def test_share_of_each_class_is_held_out():
    labels = np.repeat([0, 1, 2], [50, 20, 4])
    rows, held_out = vit_cifar100.split_rows(labels, 0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate([rows, held_out])), np.arange(74))
    np.testing.assert_array_equal(np.bincount(labels[held_out]), [5, 2, 1])
    assert set(labels[rows[:20]]) == {0, 1, 2}  # Mixed, so that --train-rows has all classes.
    again, _ = vit_cifar100.split_rows(labels, 0.1)
    np.testing.assert_array_equal(rows, again)
    rows, held_out = vit_cifar100.split_rows(labels, 0)
    assert (len(rows), len(held_out)) == (74, 0)


def test_validation_split_is_used_if_there_is_one(monkeypatch, tmp_path, files):
    files |= {name.replace("test/", "valid/"): content for name, content in files.items() if name.startswith("test/")}
    folder = write(tmp_path / "images", files)
    args = arguments(monkeypatch, "--data", folder, "--image-size", 8, "--train-rows", 30)
    data = vit_cifar100.load_data(args)
    assert {split: vit_cifar100.sizes(part)[0] for split, part in data.items()} == {
        "train": 30,
        "validation": 15,
        "test": 15,
    }
    np.testing.assert_array_equal(data["validation"][0], data["test"][0])


# ## Augmentation
@pytest.mark.backends("tensorflow", "jax")
def test_mixup_mixes_images_and_labels_alike(monkeypatch):
    import tensorflow as tf

    args = arguments(monkeypatch, "--mixup", 1.0, "--batch-size", 8)
    labels = np.eye(2, dtype="float32")[np.arange(20) % 2]
    images = np.broadcast_to(labels[:, 1, None, None, None] * 200, (20, 4, 4, 3)).astype("uint8")
    (batches,) = vit_cifar100.training_batches(args, (images, labels))
    batches = list(batches)
    assert [images.shape for images, _ in batches] == [(8, 4, 4, 3)] * 2
    images, labels = (np.concatenate(parts) for parts in zip(*batches))
    assert batches[0][0].dtype == tf.uint8 and ((labels > 0.01) & (labels < 0.99)).any()
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    # Rounded to whole bytes.
    np.testing.assert_allclose(images, np.broadcast_to(labels[:, 1, None, None, None] * 200, images.shape), atol=0.51)


@pytest.mark.backends("tensorflow")
def test_rand_augment_changes_images_alone(monkeypatch):
    args = arguments(monkeypatch, "--rand-augment", "--batch-size", 16)
    assert args.rand_augment == vit_cifar100.RAND_AUGMENT_FACTOR
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), "uint8")
    labels = np.eye(16, dtype="float32")
    (batches,) = vit_cifar100.training_batches(args, (images, labels))
    first, second = list(batches) + list(batches)
    for augmented, mixed in (first, second):
        np.testing.assert_array_equal(np.sort(np.argmax(mixed, axis=1)), np.arange(16))
        assert (np.asarray(augmented) != images[np.argmax(mixed, axis=1)]).any()
    order = [np.argsort(np.argmax(mixed, axis=1)) for _, mixed in (first, second)]
    assert (np.asarray(first[0])[order[0]] != np.asarray(second[0])[order[1]]).any()  # Anew in each epoch.


def test_arrays_stay_arrays_without_augmentation(monkeypatch):
    args = arguments(monkeypatch, "--batch-size", 8)
    images, labels = np.zeros((20, 4, 4, 3), "uint8"), np.eye(20)
    got = vit_cifar100.training_batches(args, (images, labels))
    assert [type(array) for array in got] == [np.ndarray] * 2 and [len(array) for array in got] == [16, 16]


# ## The model
def model_arguments(preset, size):
    return argparse.Namespace(preset=str(preset), image_size=size, dropout=0.1)


def test_preset_keeps_weights_and_scale_and_gets_dropout(preset):
    args = model_arguments(preset, 8)
    pretrained = vit_cifar100.load_preset(args.preset)
    task = vit_cifar100.build_task(pretrained, args, num_classes=3)
    assert (pretrained.backbone.dropout_rate, pretrained.backbone.attention_dropout) == (0.0, 0.0)
    assert (task.backbone.dropout_rate, task.backbone.attention_dropout, task.dropout) == (0.1, 0.1, 0.1)

    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), "uint8")
    scaled = images / np.array([50, 60, 70]) - np.array([1, 2, 3])
    tokens = keras.ops.convert_to_numpy(pretrained.backbone(scaled.astype("float32")))
    kernel, bias = (keras.ops.convert_to_numpy(weight) for weight in task.output_dense.weights)
    classifier = vit_cifar100.build_classifier(task, stored_size=8)
    logits = keras.ops.convert_to_numpy(classifier(images))
    np.testing.assert_allclose(logits, tokens[:, 0] @ kernel + bias, rtol=1e-4, atol=1e-5)

    passes = [keras.ops.convert_to_numpy(classifier(images, training=True)) for _ in range(2)]
    assert np.abs(passes[0] - passes[1]).max() > 1e-3
    rdrop_keras.RDropModel(classifier, alpha=0.6)  # Raises without dropout.


def test_stored_images_are_resized_as_the_preset_does(preset):
    args = model_arguments(preset, 8)
    pretrained = vit_cifar100.load_preset(args.preset)
    task = vit_cifar100.build_task(pretrained, args, num_classes=3)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), "uint8")
    expected = task(keras.ops.convert_to_tensor(pretrained.preprocessor(images.astype("float32"))))
    got, expected = map(keras.ops.convert_to_numpy, (vit_cifar100.build_classifier(task, 5)(images), expected))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_preset_at_another_image_size(preset):
    pretrained = vit_cifar100.load_preset(str(preset))
    task = vit_cifar100.build_task(pretrained, model_arguments(preset, 16), num_classes=3)
    assert task.backbone.image_shape == (16, 16, 3)
    different = [
        old.path
        for old, new in zip(pretrained.backbone.weights, task.backbone.weights)
        if old.shape != new.shape or not np.array_equal(old.numpy(), new.numpy())
    ]
    assert len(different) == 1 and different[0].endswith("position_embedding/embeddings")


def test_positions_are_interpolated():
    """Along each axis by `np.interp` between the centres of the patches, which stays constant beyond the outermost."""
    rng = np.random.default_rng(0)
    positions = rng.normal(size=(1 + 2 * 3, 4)).astype("float32")
    got = vit_cifar100.resize_positions(positions, (2, 3), (4, 6))
    np.testing.assert_array_equal(got[0], positions[0])

    def resized(values, size):
        centres = (np.arange(size) + 0.5) * len(values) / size - 0.5
        return np.interp(centres, np.arange(len(values)), values)

    grid = positions[1:].reshape(2, 3, 4)
    grid = np.apply_along_axis(resized, 0, grid, 4)
    grid = np.apply_along_axis(resized, 1, grid, 6)
    np.testing.assert_allclose(got[1:], grid.reshape(24, 4), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vit_cifar100.resize_positions(positions, (2, 3), (2, 3)), positions, atol=1e-6)


def test_only_what_follows_dropout_runs_twice():
    args = model_arguments("none", 8)
    keras.utils.clear_session()
    task = vit_cifar100.build_task(vit_cifar100.load_preset("none"), args, num_classes=3)
    shared = str(rdrop_keras.sharing(vit_cifar100.build_classifier(task, stored_size=4)))
    (once,) = [line for line in shared.splitlines() if " once " in line and "deterministic" in line and "…" in line]
    assert once.startswith("rescaling … ") and "vit_patching_and_embedding" in once


# ## Errors
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--label-smoothing", -0.1), "--label-smoothing must be ≥ 0 and < 1. Received: -0.1"),
        (("--mixup", 0), "--mixup must be > 0 and ≤ 1. Received: 0.0"),
        (("--rand-augment", 2), "--rand-augment must be > 0 and ≤ 1. Received: 2.0"),
        (("--image-size", 0), "--image-size must be ≥ 1. Received: 0"),
        (("--image-size", 10), "--image-size must be a multiple of the 4 of a patch. Received: 10"),
        (("--dataset", "mnist"), "invalid choice: 'mnist'"),
        (("--preset", "vit_tiny"), "Received: vit_tiny, which KerasHub cannot load: "),
        (("--preset", "vit_tiny"), "none, the folder of a preset of a ViT, or one of vit_base_patch16_224_imagenet, "),
        (("--batch-size", 512), "--batch-size must be ≤ the 108 rows to train on. Received: 512"),
        (("--batch-size", 512, "--mixup", 0.2), "--batch-size must be ≤ the 108 rows to train on. Received: 512"),
    ],
)
def test_bad_flags(run_example, data, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_example(vit_cifar100, "--data", data, "--preset", "none", *flags)
    assert message in capsys.readouterr().err


def test_batch_larger_than_the_stream(monkeypatch, capsys):
    import tensorflow as tf

    args = arguments(monkeypatch, "--batch-size", 4)
    row = np.zeros((8, 8, 3), "uint8"), np.zeros(3, "float32")
    with pytest.raises(SystemExit):
        vit_cifar100.training_batches(args, tf.data.Dataset.from_tensors(row).repeat(3))
    assert "--batch-size must be ≤ the 3 rows to train on. Received: 4" in capsys.readouterr().err


def test_preset_without_converter(tmp_path, capsys):
    task = keras_hub.models.ViTImageClassifier(keras_hub.models.ViTBackbone(**TINY), num_classes=2)
    task.save_to_preset(str(tmp_path / "preset"))
    with pytest.raises(SystemExit):
        vit_cifar100.load_preset(str(tmp_path / "preset"))
    assert "has no image converter, which tells how images are scaled" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "without --data, tensorflow-datasets is needed: pip install tensorflow tensorflow-datasets"),
        (("--data", "x", "--mixup", 0.2), "--mixup needs TensorFlow, for tf.data: pip install tensorflow"),
        (("--data", "x", "--rand-augment"), "--rand-augment needs TensorFlow, for tf.data: pip install tensorflow"),
    ],
)
def test_without_tensorflow(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        arguments(monkeypatch, *flags)
    assert message in capsys.readouterr().err


def test_class_of_one_image_cannot_be_held_out(monkeypatch, tmp_path, capsys):
    image = png(np.zeros((8, 8, 3), "uint8"))
    folder = write(tmp_path / "images", {"train/a/1.png": image, "train/a/2.png": image, "train/b/1.png": image})
    with pytest.raises(SystemExit):
        vit_cifar100.load_data(arguments(monkeypatch, "--data", folder, "--image-size", 8))
    assert "expected at least two train images of each class" in capsys.readouterr().err


# ## `task_data.read_images`
def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_images_of_a_folder_and_a_zip_are_the_same(tmp_path, files):
    rng = np.random.default_rng(0)
    files |= {"train/.DS_Store": b"", "train/red/notes.txt": b"", "other/red/1.png": b"", "README.txt": b""}
    of_folder, classes = task_data.read_images(write(tmp_path / "images", files), 32)
    of_zip, _ = task_data.read_images(zipped(tmp_path / "images.zip", files), 32)
    assert tuple(classes) == CLASSES
    for splits in (of_folder, of_zip):
        assert {split: images.shape for split, (images, _) in splits.items()} == {
            "train": (120, 8, 8, 3),
            "test": (15, 8, 8, 3),
        }
        for split, count in COUNTS.items():
            if split == "train":
                rng = np.random.default_rng(0)
            images, labels = splits[split]
            np.testing.assert_array_equal(images, [coloured(rng, colour) for colour in CLASSES for _ in range(count)])
            np.testing.assert_array_equal(labels, np.repeat([0, 1, 2], count))
            assert (images.dtype, labels.dtype) == ("uint8", "int32")


def test_images_become_squares_of_one_size(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.integers(0, 256, (6, 10, 3), "uint8")
    grey = rng.integers(0, 256, (6, 6), "uint8")
    plain = np.full((4, 4, 3), 77, "uint8")
    folder = write(
        tmp_path, {"train/a/wide.png": png(wide), "train/b/grey.PNG": png(grey), "train/b/small.png": png(plain)}
    )
    images, _ = task_data.read_images(folder, 32)[0]["train"]
    np.testing.assert_array_equal(images[0], wide[:, 2:8])  # The middle of it.
    np.testing.assert_array_equal(images[1], np.repeat(grey[..., None], 3, axis=-1))
    np.testing.assert_array_equal(images[2], np.full((6, 6, 3), 77))  # Enlarged.
    images, _ = task_data.read_images(folder, 3)[0]["train"]
    assert images.shape == (3, 3, 3, 3)


def test_jpeg(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 100, "uint8")).save(tmp_path / "1.jpg")
    content = (tmp_path / "1.jpg").read_bytes()
    folder = write(tmp_path / "images", {"train/a/1.JPG": content, "train/b/1.jpeg": content})
    images, _ = task_data.read_images(folder, 8)[0]["train"]
    np.testing.assert_allclose(images, 100, atol=2)


GOOD = png(np.random.default_rng(0).integers(0, 256, (4, 4, 3), "uint8"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    "files, message",
    [
        ({"test/a/1.png": GOOD}, "has no train split: expected images such as train/cat/1.jpg"),
        (
            {"train/a/1.png": GOOD, "valid/a/1.png": GOOD, "dev/a/1.png": GOOD},
            "has several validation splits: valid, dev",
        ),
        ({"train/a/1.png": GOOD}, "must have images of at least two classes. Received: a"),
        ({"train/1.png": GOOD}, "must have images of at least two classes. Received: none"),
        ({"train/a/1.png": GOOD, "train/b/1.txt": GOOD}, "has no train image of class b: expected files that end in"),
        (
            {"train/a/1.png": GOOD, "train/b/1.png": GOOD, "test/a/1.png": GOOD},
            "has no test image of class b: expected files that end in .jpeg, .jpg, .png",
        ),
        (
            {"train/a/1.png": GOOD, "train/b/1.png": GOOD, "test/c/1.png": GOOD},
            "has no train image of class c: expected files that end in",
        ),
        ({"train/a/1.png": GOOD, "train/b/1.png": b"text"}, "/train/b/1.png cannot be read as an image: "),
        ({"train/a/1.png": GOOD, "train/b/1.png": GOOD[:-40]}, "/train/b/1.png cannot be read as an image: "),
    ],
    ids=["no train", "twice", "one class", "no class", "empty", "missing", "unknown", "not an image", "cut short"],
)
def test_bad_images(tmp_path, capsys, kind, files, message):
    path = write(tmp_path / "x", files) if kind == "folder" else zipped(tmp_path / "x.zip", files)
    with pytest.raises(SystemExit):
        task_data.read_images(path, 8)
    assert message in capsys.readouterr().err


def test_bad_paths(tmp_path, capsys):
    (tmp_path / "text.zip").write_text("text")
    for path in (tmp_path / "nothing", tmp_path / "text.zip"):
        with pytest.raises(SystemExit):
            task_data.read_images(path, 8)
        assert f"--data must be a folder or a zip of images. Received: {path}" in capsys.readouterr().err


def test_damaged_zip(tmp_path, capsys):
    path = zipped(tmp_path / "x.zip", {"train/a/1.png": GOOD, "train/b/1.png": GOOD})
    content = path.read_bytes()
    i = content.index(GOOD)
    path.write_bytes(content[: i + 10] + bytes([content[i + 10] ^ 1]) + content[i + 11 :])
    with pytest.raises(SystemExit):
        task_data.read_images(path, 8)
    assert "train/a/1.png cannot be read as an image: Bad CRC-32" in capsys.readouterr().err


def test_without_pillow(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        task_data.read_images(tmp_path, 8)
    assert "images are read by Pillow: pip install pillow" in capsys.readouterr().err
