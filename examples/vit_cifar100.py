"""Fine-tuning a vision Transformer on CIFAR-100 with R-Drop.

A pretrained ViT-B/16 of KerasHub is fine-tuned on the 100 classes of CIFAR-100 with R-Drop, as in section 3.5 of the
paper, then tested, exported and loaded again. ViTs are published without dropout, which R-Drop needs. Giving dropout to
a model that has none is one line, and R-Drop is another:

    classifier = rdrop_keras.with_dropout(classifier, 0.1)
    model = rdrop_keras.RDropModel(classifier, alpha=0.6)

To install what it needs, in a copy of the repository, and to run it (on every backend `tf.data` needs TensorFlow):

    python -m pip install ".[tensorflow,tasks]"
    python examples/vit_cifar100.py
    python examples/vit_cifar100.py --small --data PATH

The second command downloads data with tensorflow-datasets and weights with KerasHub, and wants a GPU. The third needs
neither: it trains a small ViT from scratch, on a folder or a zip of images of yours.
"""

import argparse
import pathlib
import shutil
import tempfile

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

import rdrop_keras

PRESET = "vit_base_patch16_224_imagenet"  # Any ViT of KerasHub.
IMAGE_SIZE = 224  # That of the preset.
ALPHA = 0.6
DROPOUT = 0.1
EPOCHS = 10
BATCH_SIZE = 128  # Of all devices together.
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
SHUFFLE_ROWS = 10_000
SEED = 0

# The model of `--small`.
SMALL = {"patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192}
SMALL_IMAGE_SIZE = 32
SMALL_LEARNING_RATE = 1e-3


# ## The data
#
# CIFAR-100 has 50,000 images to train on, of which we keep a tenth for validation, and 10,000 to test with.
#
# To train on five classes of your own, give `--data` a folder, or a zip of it, with the images in `train/CLASS/` and
# `test/CLASS/`: five folders named after the classes in each. Nothing else has to change. Images of any size are
# cropped to squares, and resized as they are read.
def load_data(image_size, path=None):
    """The training, validation and test splits, as datasets of images and labels, and the names of the classes."""
    if path is None:
        splits = ["train[:90%]", "train[90%:]", "test"]
        (train, validation, test), info = tfds.load("cifar100", split=splits, as_supervised=True, with_info=True)
        return train.shuffle(SHUFFLE_ROWS, seed=SEED), validation, test, info.features["label"].names

    folder = pathlib.Path(path)
    if folder.suffix == ".zip":
        folder = pathlib.Path(tempfile.mkdtemp())
        shutil.unpack_archive(path, folder)
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(
                f"--data must be a folder or a zip with images such as {split}/cat/1.jpg. Received: {path}, "
                f"which has no folder {split}."
            )
    options = {"image_size": (image_size, image_size), "crop_to_aspect_ratio": True, "batch_size": None, "seed": SEED}
    train, validation = keras.utils.image_dataset_from_directory(
        folder / "train", validation_split=0.1, subset="both", **options
    )
    names = train.class_names
    test = keras.utils.image_dataset_from_directory(folder / "test", class_names=names, shuffle=False, **options)
    return train, validation, test, names


# ## Batches
#
# The batches hold images as they are, with values from 0 to 255. The KerasHub task resizes and scales them while it
# trains. It never shuffles what it is given, so the data are shuffled above. Images are augmented here and not in the
# model, so that the two passes of R-Drop see the same image and differ by dropout alone.
#
# All batches are full, so that several devices can split them evenly. Training leaves out the images that remain.
# Evaluation fills its last batch with images of weight 0.
def make_batches(rows, training):
    num_rows = len(rows)
    rows = rows.map(lambda image, label: (tf.cast(image, "float32"), label))  # Bytes would be rounded when resized.
    if training:
        rows = rows.map(lambda image, label: (tf.image.random_flip_left_right(image), label))
        rows = rows.batch(min(BATCH_SIZE, num_rows), drop_remainder=True)
    else:
        missing = -num_rows % BATCH_SIZE
        weights = np.array([1 + missing / num_rows] * num_rows + [0] * missing, "float32")  # Their mean is 1.
        rows = tf.data.Dataset.zip(rows.repeat(), tf.data.Dataset.from_tensor_slices(weights))
        rows = rows.map(lambda row, weight: (*row, weight)).batch(BATCH_SIZE)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA  # Not by files.
    return rows.with_options(options).prefetch(tf.data.AUTOTUNE)


# ## The classifier
#
# This is the KerasHub task with a new head for the classes of the data. Its dropout rates are 0: without `with_dropout`
# `RDropModel` would raise an error, since its two passes would be equal. The new task has the same weights.
def build_classifier(num_classes, dropout, small=False):
    """A `keras_hub.models.ViTImageClassifier`: that of `PRESET`, or a small one from scratch."""
    if small:
        size = (SMALL_IMAGE_SIZE, SMALL_IMAGE_SIZE)
        converter = keras_hub.layers.ViTImageConverter(image_size=size, scale=1 / 127.5, offset=-1.0)
        preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(converter)
        backbone = keras_hub.models.ViTBackbone((*size, 3), **SMALL)
        classifier = keras_hub.models.ViTImageClassifier(backbone, num_classes, preprocessor)
    else:
        classifier = keras_hub.models.ImageClassifier.from_preset(PRESET, num_classes=num_classes, activation=None)
    return rdrop_keras.with_dropout(classifier, dropout)


# ## R-Drop
#
# We wrap the task, and compile the wrapper as we would compile the task. The loss tells R-Drop that the classifier
# returns logits, and that it is to compare its two passes by the KL divergence between their classes.
def build_model(classifier, alpha, num_steps, learning_rate):
    model = rdrop_keras.RDropModel(classifier, alpha=alpha)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps, warmup_target=learning_rate, warmup_steps=num_steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY, clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
    )
    return model


# ## Training on one device or several
#
# On TensorFlow the model is made in the scope of a strategy; several workers, which find each other by the variable
# `TF_CONFIG`, all run this program. On JAX one line, before the model is made, lets all devices share each batch.
#
# `BackupAndRestore` keeps the state of training: after an interruption the same command goes on. Of several workers the
# first writes, to a place where all can read. `tensorboard --logdir runs` shows the curves.
STRATEGIES = {
    "none": tf.distribute.get_strategy,
    "mirrored": tf.distribute.MirroredStrategy,
    "multiworker": tf.distribute.MultiWorkerMirroredStrategy,
    "tpu": lambda: tf.distribute.TPUStrategy(tf.distribute.cluster_resolver.TPUClusterResolver.connect()),
}


def main():
    parser = argparse.ArgumentParser(description="Fine-tunes a vision Transformer on CIFAR-100 with R-Drop.")
    parser.add_argument("--data", metavar="PATH", help="folder or zip of images, in place of CIFAR-100")
    parser.add_argument("--small", action="store_true", help="a small model from scratch, in place of the preset")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, 0 for none (%(default)s)")
    parser.add_argument("--dropout", type=float, default=DROPOUT, help="dropout rate (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="on TensorFlow; JAX uses all devices")
    parser.add_argument("--output", default="runs/vit", metavar="FOLDER", help="for what is written (%(default)s)")
    args = parser.parse_args()
    if not 0 <= args.alpha < float("inf"):
        parser.error(f"--alpha must be a number ≥ 0. Received: {args.alpha}")
    if not 0 < args.dropout < 1:
        parser.error(f"--dropout must be > 0 and < 1: R-Drop compares passes that it changes. Received: {args.dropout}")

    keras.utils.set_random_seed(SEED)
    strategy = STRATEGIES[args.strategy]()
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    is_first = not getattr(strategy.cluster_resolver, "task_id", 0)

    *splits, names = load_data(SMALL_IMAGE_SIZE if args.small else IMAGE_SIZE, args.data)
    train, validation, test = (make_batches(split, training=i == 0) for i, split in enumerate(splits))
    learning_rate = SMALL_LEARNING_RATE if args.small else LEARNING_RATE
    with strategy.scope():
        classifier = build_classifier(len(names), args.dropout, args.small)
        model = build_model(classifier, args.alpha, args.epochs * len(train), learning_rate)

    save_freq = "epoch" if is_first else 10**9  # The others never come to save.
    callbacks = [keras.callbacks.BackupAndRestore(f"{args.output}/backup", save_freq, delete_checkpoint=is_first)]
    callbacks += [keras.callbacks.TensorBoard(f"{args.output}/logs")] if is_first else []
    model.fit(train, validation_data=validation, epochs=args.epochs, callbacks=callbacks)
    print(f"Test accuracy: {model.evaluate(test, return_dict=True)['accuracy']:.4f}")

    # The SavedModel is the ViT alone and takes images that are resized and scaled. It is written on TensorFlow.
    # Elsewhere we save the KerasHub task, which does both itself.
    outputs = model.predict(test.take(1))[:2]
    if is_first and keras.backend.backend() == "tensorflow":
        model.export(f"{args.output}/served", verbose=False)
        images, *_ = next(iter(test))
        served = tf.saved_model.load(f"{args.output}/served")
        loaded_outputs = served.serve(classifier.preprocessor(images[:2])).numpy()
    elif is_first:
        classifier.save(f"{args.output}/classifier.keras")
        loaded = keras.models.load_model(f"{args.output}/classifier.keras", compile=False)
        loaded_outputs = loaded.predict(test.take(1))[:2]
    if is_first:
        print("The first two images are", *(names[i] for i in outputs.argmax(axis=1)), "to the model, and")
        print(*(names[i] for i in loaded_outputs.argmax(axis=1)), "to the loaded one.")


if __name__ == "__main__":
    main()
