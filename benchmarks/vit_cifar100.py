"""Image classification with a vision Transformer, plain and with R-Drop.

The paper's section 3.5: a pretrained ViT-B/16 fine-tuned on CIFAR-100, or on ImageNet, with α = 0.6. KerasHub's presets
have dropout 0, under which R-Drop has nothing to compare: `rdrop_keras.with_dropout` gives the same model with dropout.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=0.6)

With a network, on CIFAR-100, or on ImageNet as tensorflow-datasets wants it prepared:

    python vit_cifar100.py
    python vit_cifar100.py --dataset imagenet2012 --preset vit_base_patch16_384_imagenet --strategy mirrored

On images of your own, in a folder or a zip of it, as files SPLIT/CLASS/IMAGE such as `train/cat/1.jpg`, where SPLIT is
train, and perhaps validation and test. Without validation a tenth of each class of train is held out for it:

    python vit_cifar100.py --data PATH --preset none --compare --epochs 30 --learning-rate 1e-3

It needs keras-hub, and Pillow with `--data`, tensorflow and tensorflow-datasets without.
"""

import argparse
import importlib.util
import math
import pathlib

import keras
import keras_hub
import numpy as np
from keras import ops

import experiment
import rdrop_keras
import task_data

# What tensorflow-datasets is to read. Neither dataset has a labelled split besides those of training and of the scores
# that papers report, so that the validation split, for tuning, is a part of training.
DATASETS = {
    "cifar100": {"train": "train[:90%]", "validation": "train[90%:]", "test": "test"},
    "imagenet2012": {"train": "train[:99%]", "validation": "train[99%:]", "test": "validation"},
}
STREAMED = ("imagenet2012",)  # Does not fit in memory.
# The model of `--preset none`, which trains on a CPU.
SMALL = {"image_shape": (32, 32, 3), "patch_size": 4, "num_layers": 4, "num_heads": 4, "hidden_dim": 96, "mlp_dim": 192}
VALIDATION_SHARE = 0.1
SPLIT_SEED = 0  # Of what is held out: the same for all runs.
SHUFFLE_ROWS = 10_000
RAND_AUGMENT_FACTOR = 0.2
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


# ## The data
#
# Images as bytes, and one-hot labels, which MixUp can mix. CIFAR and local files are arrays of images at their own
# size, for the model to resize. ImageNet is a stream of single images, resized as they are read.
def load_data(args):
    """`{split: (images, labels)}`, or of `tf.data.Dataset`s of single images and labels."""
    if args.data is None and args.dataset in STREAMED:
        return stream(args)
    data, num_classes = read_dataset(args.dataset) if args.data is None else read_files(args)
    data["train"] = tuple(array[: args.train_rows] for array in data["train"])
    return {
        split: (images, keras.utils.to_categorical(labels, num_classes)) for split, (images, labels) in data.items()
    }


def read_dataset(name):
    tables = task_data.read_tfds(name, ("image", "label"), DATASETS[name])
    import tensorflow_datasets as tfds

    data = {split: (np.stack(table["image"]), np.array(table["label"])) for split, table in tables.items()}
    return data, tfds.builder(name).info.features["label"].num_classes


def read_files(args):
    data, classes = task_data.read_images(args.data, args.image_size)
    images, labels = data["train"]
    rows, held_out = split_rows(labels, 0 if "validation" in data else VALIDATION_SHARE)
    data["train"] = images[rows], labels[rows]
    if "validation" not in data:
        if len(np.unique(labels[rows])) < len(classes):
            experiment.fail(
                f"{args.data} has no validation split, and one cannot be held out of train: expected at least two "
                "train images of each class"
            )
        data["validation"] = images[held_out], labels[held_out]
        print(f"{args.data} has no validation split: {len(held_out):,} images of train are held out for it")
    return data, len(classes)


def split_rows(labels, share):
    """Indices of the rows to train on and to hold out, `share` of each class, in an order that is random but fixed."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        held_out[rows[: math.ceil(share * len(rows))]] = True
    return order[~held_out[order]], order[held_out[order]]


def stream(args):
    """Square images of the model's size, the middle of those in the dataset, and their labels."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    resize = keras.layers.Resizing(args.image_size, args.image_size, crop_to_aspect_ratio=True)
    num_classes = tfds.builder(args.dataset).info.features["label"].num_classes

    def read(row):
        return to_bytes(resize(row["image"])), tf.one_hot(row["label"], num_classes)

    data = {}
    for split, source in DATASETS[args.dataset].items():
        try:
            # Files in their order have the same first rows in each epoch.
            shuffle_files = split == "train" and args.train_rows is None
            rows = tfds.load(args.dataset, split=source, shuffle_files=shuffle_files)
        except Exception as error:
            error.add_note(f"{args.dataset} could not be loaded. --data reads local files in its place.")
            raise
        if split == "train" and args.train_rows is not None:
            rows = rows.take(args.train_rows)
        data[split] = rows.map(read, num_parallel_calls=tf.data.AUTOTUNE)
    return data


def sizes(split):
    """How many images there are, the size of each as stored, and the number of classes."""
    if isinstance(split, tuple):
        images, labels = split
        return len(images), images.shape[1], labels.shape[1]
    image, label = split.element_spec
    return int(split.cardinality()), image.shape[0], label.shape[0]


# ## Batches
#
# Arrays go to `fit` as they are. Augmentation and ImageNet take tf.data. Images are augmented here and not in the
# model, so that both passes of R-Drop see the same images.
def training_batches(args, split):
    """What `fit` takes: `(images, labels)`, or `(batches,)` of a dataset."""
    if isinstance(split, tuple):
        split = experiment.whole_batches(args, *split)
        if args.rand_augment is None and args.mixup is None:
            return split
        import tensorflow as tf

        rows = tf.data.Dataset.from_tensor_slices(split).shuffle(len(split[0]))
    else:
        num_rows, _, _ = sizes(split)
        if num_rows < args.batch_size:
            experiment.fail(f"--batch-size must be ≤ the {num_rows} rows to train on. Received: {args.batch_size}")
        rows = split.shuffle(SHUFFLE_ROWS)
    batches = rows.batch(args.batch_size, drop_remainder=True)
    return (batches.map(augmentation(args)).prefetch(2),)


def evaluation_batches(args, split):
    if isinstance(split, tuple):
        return experiment.filled(args, *split)
    return (split.batch(args.batch_size).prefetch(2),)


def augmentation(args):
    """A function of a batch: flips and RandAugment, the kind the same for a batch, and mixes of two images."""
    layers = []
    if args.rand_augment is not None:
        layers.append(keras.layers.RandomFlip("horizontal"))
        layers.append(keras.layers.RandAugment(value_range=(0, 255), factor=args.rand_augment))
    if args.mixup is not None:
        layers.append(keras.layers.MixUp(args.mixup))

    def augment(images, labels):
        batch = {"images": images, "labels": labels}
        for layer in layers:
            batch = layer(batch)
        return to_bytes(batch["images"]), batch["labels"]

    return augment


def to_bytes(images):
    import tensorflow as tf

    return tf.cast(tf.round(tf.cast(images, tf.float32)), tf.uint8)


# ## The model
#
# The task of the preset tells the architecture, the weights and how images are scaled. The small one has no weights.
def load_preset(preset):
    if preset == "none":
        converter = keras_hub.layers.ViTImageConverter(scale=1 / 127.5, offset=-1.0)
        preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(image_converter=converter)
        backbone = keras_hub.models.ViTBackbone(**SMALL)
        return keras_hub.models.ViTImageClassifier(backbone, num_classes=2, preprocessor=preprocessor)
    try:
        # The head is made anew for the classes of the data: their number here does not matter.
        pretrained = keras_hub.models.ViTImageClassifier.from_preset(preset, num_classes=2, activation=None)
    except (OSError, ValueError) as error:
        presets = ", ".join(sorted(keras_hub.models.ViTImageClassifier.presets))
        experiment.fail(
            f"--preset must be none, the folder of a preset of a ViT, or one of {presets}. Received: {preset}, which "
            f"KerasHub cannot load: {error}"
        )
    if getattr(pretrained.preprocessor, "image_converter", None) is None:
        experiment.fail(f"--preset {preset} has no image converter, which tells how images are scaled")
    return pretrained


def build_task(pretrained, args, num_classes):
    """The task with dropout, for images of `args.image_size`, and with the weights of the preset but a new head."""
    old = pretrained.backbone
    config = {**old.get_config(), "image_shape": (args.image_size, args.image_size, 3)}
    backbone = keras_hub.models.ViTBackbone.from_config(config)
    if args.preset != "none":
        # For another image size the position embeddings have another shape, and nothing else does.
        weights = old.get_weights()
        for i, variable in enumerate(backbone.weights):
            if weights[i].shape != tuple(variable.shape):
                weights[i] = resize_positions(weights[i], grid(old), grid(backbone))
        backbone.set_weights(weights)
    config = {**pretrained.get_config(), "backbone": backbone, "num_classes": num_classes, "head_dtype": "float32"}
    task = keras_hub.models.ViTImageClassifier.from_config(config)
    return rdrop_keras.with_dropout(task, args.dropout) if args.dropout else task


def grid(backbone):
    """How many patches an image has, down and across."""
    return tuple(size // patch for size, patch in zip(backbone.image_shape, backbone.patch_size))


def resize_positions(positions, old_grid, new_grid):
    """Position embeddings `(tokens, width)`, those of a grid of patches interpolated for another grid."""
    num_others = len(positions) - math.prod(old_grid)
    patches = positions[num_others:].reshape(*old_grid, -1)
    patches = ops.image.resize(patches, new_grid, interpolation="bilinear", data_format="channels_last")
    patches = ops.convert_to_numpy(patches).reshape(math.prod(new_grid), -1)
    return np.concatenate([positions[:num_others], patches])


# What is trained takes images as they are stored. Scaling and resizing come before the first dropout, so R-Drop does
# them once for both passes. In this order, which has the same result, Keras does not round resized images to bytes.
def build_classifier(task, stored_size):
    height, width, _ = task.backbone.image_shape
    converter = task.preprocessor.image_converter
    scale = 1.0 if converter.scale is None else converter.scale
    offset = 0.0 if converter.offset is None else converter.offset
    images = keras.Input((stored_size, stored_size, 3), dtype="uint8", name="images")
    x = keras.layers.Rescaling(scale, offset, dtype="float32")(images)
    resize = keras.layers.Resizing(height, width, interpolation=converter.interpolation, dtype="float32")
    # Without `training=False`, Keras 3.15 has dropout on in what follows wherever `training` is not given.
    x = resize(x, training=False)
    return keras.Model(images, experiment.trainable(task)(x), name="classifier")


# ## Training
#
# `run.alpha` is None for plain training. Both compile and fit alike. `evaluate` is of one pass without dropout.
def train(run, data, pretrained, args):
    num_rows, stored_size, num_classes = sizes(data["train"])
    batches = training_batches(args, data["train"])
    evaluated = {split: evaluation_batches(args, data[split]) for split in ("validation", "test") if split in data}
    with run.scope():
        classifier = build_classifier(build_task(pretrained, args, num_classes), stored_size)
        model = classifier if run.alpha is None else rdrop_keras.RDropModel(classifier, alpha=run.alpha)
        compile_model(model, experiment.schedule(args, num_rows), args.label_smoothing, run.jit_compile)
    model.fit(
        *batches,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=evaluated["validation"],
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    scores = {}
    for split, batches in evaluated.items():
        logs = model.evaluate(*batches, batch_size=args.batch_size, verbose=0, return_dict=True)
        scores[f"{split} accuracy"] = logs["accuracy"]
    return classifier, scores


def compile_model(model, learning_rate, label_smoothing, jit_compile="auto"):
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=WEIGHT_DECAY, clipnorm=CLIP_NORM),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=label_smoothing),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
    )


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, metavar="PATH", help="folder or zip, in place of --dataset")
    parser.add_argument("--dataset", choices=sorted(DATASETS), default="cifar100", help="(default: %(default)s)")
    parser.add_argument(
        "--preset",
        default="vit_base_patch16_224_imagenet",
        help="a ViT of KerasHub, the folder of one, or none for a small model from scratch (default: %(default)s)",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="height and width that the model sees (default: the preset's)"
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="< 1 (default: %(default)s)")
    parser.add_argument(
        "--rand-augment",
        type=float,
        nargs="?",
        const=RAND_AUGMENT_FACTOR,
        metavar="FACTOR",
        help="RandomFlip and RandAugment, of a strength up to 1 (%(const)s if not given). It needs TensorFlow, for "
        "tf.data, and is slow on JAX, where Keras equalizes histograms in another way",
    )
    parser.add_argument(
        "--mixup",
        type=float,
        metavar="A",
        help="MixUp by weights of Beta(A, A), A ≤ 1. It needs TensorFlow, for tf.data",
    )
    experiment.add_flags(parser, alpha=0.6, dropout=0.1, epochs=10, batch_size=128, learning_rate=1e-4)
    args = experiment.parse(parser)
    if not 0 <= args.label_smoothing < 1:
        parser.error(f"--label-smoothing must be ≥ 0 and < 1. Received: {args.label_smoothing}")
    for name in ("mixup", "rand_augment"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be > 0 and ≤ 1. Received: {getattr(args, name)}")
    experiment.check_least(parser, args, image_size=1)
    if args.data is None and importlib.util.find_spec("tensorflow_datasets") is None:
        parser.error("without --data, tensorflow-datasets is needed: pip install tensorflow tensorflow-datasets")
    for name in ("mixup", "rand_augment"):
        if getattr(args, name) is not None and importlib.util.find_spec("tensorflow") is None:
            parser.error(f"--{name.replace('_', '-')} needs TensorFlow, for tf.data: pip install tensorflow")
    return args


def main():
    args = parse_arguments()
    scope = experiment.prepare(args)
    pretrained = load_preset(args.preset)
    if args.image_size is None:
        args.image_size = pretrained.backbone.image_shape[0]
    for patch in pretrained.backbone.patch_size:
        if args.image_size % patch:
            experiment.fail(f"--image-size must be a multiple of the {patch} of a patch. Received: {args.image_size}")
    data = load_data(args)
    _, stored_size, num_classes = sizes(data["train"])
    counts = ", ".join(f"{split} {sizes(images)[0]:,}" for split, images in data.items())
    print(f"Images of {stored_size}×{stored_size} in {num_classes} classes, seen at {args.image_size}: {counts}")
    experiment.run_all(args, scope, lambda run: train(run, data, pretrained, args))


if __name__ == "__main__":
    main()
