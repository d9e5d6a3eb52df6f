"""The tasks of `when_it_pays.py`: real data, and models that plain training brings to their best within a minute.

Each task is a function of the folder of data (see `README.md` here) that returns a `Task`. Models and data are those of
the tutorials in `examples/`, made smaller, wherever there is such a tutorial.
"""

import dataclasses
import functools
import gzip
import importlib.util
import pathlib
import zipfile
from collections.abc import Callable

import keras
import numpy as np
from keras import layers
from scipy import stats

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
ENCODER_LAYERS = 6
SHARED = ("half depth", "head only")  # Variants in which the passes share more than what is deterministic.
FROZEN_LAYERS = 4  # Of the pretrained encoder: computed once, before training.


@dataclasses.dataclass
class Task:
    """What is trained, on what, and what is tried for it.

    Attributes:
        title: What a reader of tables sees.
        data: `{"train" | "validation" | "test": (x, y, sample_weight or None)}`, arrays or dicts of arrays.
        build: A function from a dropout rate to a new model that returns logits, or numbers for a regression.
        loss: The compiled loss, with a mean as its reduction.
        score: A function from targets, outputs and weights of the test split to `{name: value}`, the first the task's
            own. Only perplexity has weights, of tokens.
        batch_size: Rows of a batch.
        pilot_steps: How long plain training runs to find the step of its best validation loss, the unit of budgets.
        learning_rates, dropouts: What is tried for plain training.
        alphas: What is tried for R-Drop.
        shared: `{variant: layer}`: other values of `share` to run, for variants of `SHARED`.
        divergence: As for `RDropModel`.
        num_seeds: How many paired runs a cell has.
    """

    title: str
    data: dict
    build: Callable
    loss: keras.losses.Loss
    score: Callable
    batch_size: int
    pilot_steps: int
    learning_rates: tuple = (1e-3, 2e-3, 4e-3)
    dropouts: tuple = (0.1, 0.2, 0.3)
    alphas: tuple = (0.3, 1.0, 3.0, 10.0)
    shared: dict = dataclasses.field(default_factory=dict)
    divergence: object = "auto"
    num_seeds: int = 5


def example(name):
    """A tutorial as a module, under a name that no script here has."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_preprocessing(task):
    """The model of a KerasHub task, whose inputs are preprocessed once, before training."""
    return keras.Model(task.inputs, task.outputs, name=task.name)


# ## Scores
def accuracy_and_calibration(y, logits, weights=None):
    """Accuracy, and the expected calibration error over ten bins of confidence (Guo et al., 2017)."""
    probabilities = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
    confidence, right = probabilities.max(axis=-1), logits.argmax(axis=-1) == y
    bins = np.minimum((confidence * 10).astype(int), 9)
    error = sum(abs(confidence[bins == i].sum() - right[bins == i].sum()) for i in range(10)) / len(y)
    return {"accuracy": float(right.mean()), "calibration error": float(error)}


def matthews_and_calibration(y, logits, weights=None):
    from sklearn.metrics import matthews_corrcoef

    return {"Matthews": float(matthews_corrcoef(y, logits.argmax(axis=-1))), **accuracy_and_calibration(y, logits)}


def pearson(y, outputs, weights=None):
    return {"Pearson": float(stats.pearsonr(y, outputs[:, 0])[0])}


# ## Digits: the quickstart's Transformer
def digits(num_train, shifted, folder):
    quickstart = example("quickstart")
    quickstart.NUM_TRAIN, quickstart.PASSES_AN_EPOCH = num_train, 1
    train, validation, test = quickstart.load_data()

    def build(dropout):
        quickstart.DROPOUT = dropout
        model = quickstart.build_model()
        if shifted:
            return model
        return keras.Model(model.get_layer("shift").output, model.output, name=model.name)

    return Task(
        title=f"digits, {num_train} labels" + (", shifted inside the model" if shifted else ""),
        data=splits(train, validation, test),
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=accuracy_and_calibration,
        batch_size=25,
        pilot_steps=2000,
        dropouts=(0.05, 0.1, 0.2),
    )


# ## CIFAR-10
CIFAR_SIZE = 32


@functools.cache
def cifar10(folder, size):
    """Images from 0 to 1 and labels of the training and the test split, whose order is that of names."""
    import io

    from PIL import Image

    with zipfile.ZipFile(folder / "cifar10_15k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        result = []
        for split in ("train/", "test/"):
            found = [name for name in names if split in name]
            images = [Image.open(io.BytesIO(archive.read(name))).reduce(CIFAR_SIZE // size) for name in found]
            images = np.stack([np.asarray(image) for image in images])
            labels = np.array([classes.index(name.split("/")[-2]) for name in found], "int32")
            result.append((images.astype("float32") / 255, labels))
    return result


def cifar_splits(folder, num_train, size):
    """`num_train` images to train on, 500 others to choose by, and 2,000 to test with, all chosen at random."""
    (x, y), (x_test, y_test) = cifar10(folder, size)
    order, test_order = np.random.RandomState(0).permutation(len(y)), np.random.RandomState(1).permutation(len(y_test))
    num_train = min(num_train, len(y) - 500)
    train, validation, test = order[:num_train], order[-500:], test_order[:2000]
    return splits((x[train], y[train]), (x[validation], y[validation]), (x_test[test], y_test[test]))


def cifar_title(num_train, augmented, size, model):
    pixels = "" if size == CIFAR_SIZE else f" at {size} pixels"
    return f"CIFAR-10{pixels}, {num_train:,} images, {model}" + (", augmented inside the model" if augmented else "")


def augmentation(x):
    """Mirrors, and other light and contrast; inside the model, so that each pass draws its own."""
    x = layers.RandomFlip("horizontal")(x)
    x = layers.RandomBrightness(0.2, value_range=(0, 1))(x)
    return layers.RandomContrast(0.2, value_range=(0, 1))(x)


def cifar_conv(num_train, augmented, size, folder):
    def build(dropout):
        inputs = keras.Input((size, size, 3))
        x = augmentation(inputs) if augmented else inputs
        for filters in (16, 32, 64):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.BatchNormalization()(x)
            x = layers.ReLU()(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        x = layers.Dropout(dropout)(x)
        x = layers.Dense(128, activation="relu")(x)
        x = layers.Dropout(dropout)(x)
        return keras.Model(inputs, layers.Dense(10)(x), name="convolutional")

    return Task(
        title=cifar_title(num_train, augmented, size, "convolutional"),
        data=cifar_splits(folder, num_train, size),
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=accuracy_and_calibration,
        batch_size=16,
        pilot_steps=1500 if num_train <= 2000 else 3000,
        dropouts=(0.2, 0.4, 0.6),
        learning_rates=(5e-4, 1e-3, 2e-3),
    )


def cifar_vit(num_train, augmented, size, folder):
    tutorial = example("vit_cifar100")
    tutorial.SMALL_IMAGE_SIZE = size
    tutorial.SMALL = {"patch_size": size // 4, "num_layers": 3, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}

    def build(dropout):
        classifier = without_preprocessing(tutorial.build_classifier(10, dropout, small=True))
        if not augmented:
            return classifier
        inputs = keras.Input((size, size, 3))
        return keras.Model(inputs, classifier(augmentation(inputs)))

    data = {name: (2 * x - 1, y, None) for name, (x, y, _) in cifar_splits(folder, num_train, size).items()}
    return Task(
        title=cifar_title(num_train, augmented, size, "ViT"),
        data=data,
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=accuracy_and_calibration,
        batch_size=32 if size == CIFAR_SIZE else 16,
        pilot_steps=1000 if num_train <= 2000 else 2500,
        learning_rates=(5e-4, 1e-3, 2e-3),
    )


# ## GLUE: the upper layers of a pretrained encoder
GLUE = {
    "sst2": ("SST-2", 24, accuracy_and_calibration),
    "mrpc": ("MRPC", 48, accuracy_and_calibration),
    "cola": ("CoLA", 16, matthews_and_calibration),
    "stsb": ("STS-B", 40, pearson),
}


def glue_texts(name, folder, num_train):
    """`{split: (texts, labels)}`; without a test split the dev split is tested, and chosen by rows of training."""
    tutorial = example("glue")
    columns, num_classes = tutorial.TASKS[name]
    label, dtype = ("score", "float32") if num_classes == 1 else ("label", "int32")

    def read(split):
        rows = tutorial.read_table(folder / "glue" / name, split, [*columns, label])
        order = np.random.RandomState(0).permutation(len(rows))
        texts = tuple([rows[i][column] for i in order] for column in columns)
        return texts, np.array([rows[i][label] for i in order], dtype)

    def part(split, start, end):
        texts, labels = split
        return tuple(column[start:end] for column in texts), labels[start:end]

    train, dev = read("train"), read("validation")
    if name == "cola":
        return {"train": part(train, 0, num_train), "validation": part(train, num_train, num_train + 500), "test": dev}
    return {"train": part(train, 0, num_train), "validation": part(dev, 0, 500), "test": read("test")}


def pretrained(encoder, length):
    """The encoder without dropout, and what makes of texts the `length` tokens that it takes."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone.from_preset(str(encoder), dropout=0.0)
    vocabulary = (encoder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=True)
    return backbone, keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=length)


def loss_of(num_outputs):
    if num_outputs == 1:
        return keras.losses.MeanSquaredError()
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def glue(name, folder, encoder):
    """The two upper layers of the encoder, and a head on its first token; what they are fed is computed here, once."""
    import keras_hub

    title, length, score = GLUE[name]
    num_outputs = example("glue").TASKS[name][1]
    backbone, preprocessor = pretrained(encoder, length)
    lower = keras.Model(backbone.input, backbone.get_layer(f"transformer_layer_{FROZEN_LAYERS - 1}").output)
    data = {}
    for split, (texts, labels) in glue_texts(name, folder, 1000).items():
        tokens = preprocessor(texts if len(texts) > 1 else texts[0])
        features = lower.predict(tokens, batch_size=64, verbose=0)
        mask = np.array(tokens["padding_mask"], "bool")
        data[split] = ({"features": features, "padding_mask": mask}, labels, None)
    upper = range(FROZEN_LAYERS, ENCODER_LAYERS)
    weights = [backbone.get_layer(f"transformer_layer_{i}").get_weights() for i in upper]
    width = backbone.hidden_dim

    def build(dropout):
        features = keras.Input((length, width), name="features")
        mask = keras.Input((length,), dtype="bool", name="padding_mask")
        x = features
        for i in upper:
            layer = keras_hub.layers.TransformerEncoder(
                backbone.intermediate_dim,
                backbone.num_heads,
                dropout,
                activation=lambda x: keras.activations.gelu(x, approximate=True),
                layer_norm_epsilon=1e-12,
                name=f"transformer_layer_{i}",
            )
            x = layer(x, padding_mask=mask)
        x = layers.Dropout(dropout)(x[:, 0])
        outputs = layers.Dense(num_outputs, kernel_initializer=keras.initializers.RandomNormal(stddev=0.02))(x)
        model = keras.Model({"features": features, "padding_mask": mask}, outputs)
        for i, values in zip(upper, weights):
            model.get_layer(f"transformer_layer_{i}").set_weights(values)
        return model

    return Task(
        title=f"{title}, two layers of MiniLM",
        data=data,
        build=build,
        loss=loss_of(num_outputs),
        score=score,
        batch_size=8,
        pilot_steps=300,
        learning_rates=(5e-5, 1e-4, 2e-4),
        dropouts=(0.1, 0.2, 0.3),
        shared={"head only": f"transformer_layer_{ENCODER_LAYERS - 1}"},
        num_seeds=3,
    )


def glue_head(name, folder, encoder):
    """Dense layers on embeddings of sentences, the mean of the encoder's last layer, which is computed here, once.

    Of two sentences u and v they get u, v, |u − v| and u · v (Conneau et al., 2017).
    """
    title, _, score = GLUE[name]
    num_outputs = example("glue").TASKS[name][1]
    backbone, preprocessor = pretrained(encoder, 48)
    mean = layers.GlobalAveragePooling1D()(backbone.output["sequence_output"], mask=backbone.input["padding_mask"])
    embed = keras.Model(backbone.input, mean)
    data = {}
    for split, (texts, labels) in glue_texts(name, folder, 1500).items():
        columns = [embed.predict(preprocessor(column), batch_size=64, verbose=0) for column in texts]
        if len(columns) > 1:
            u, v = columns
            columns += [np.abs(u - v), u * v]
        data[split] = (np.concatenate(columns, axis=-1), labels, None)
    width = data["train"][0].shape[-1]

    def build(dropout):
        features = keras.Input((width,))
        x = layers.Dropout(dropout)(features)
        x = layers.Dense(256, activation="relu")(x)
        x = layers.Dropout(dropout)(x)
        return keras.Model(features, layers.Dense(num_outputs)(x))

    return Task(
        title=f"{title}, a head on embeddings of MiniLM",
        data=data,
        build=build,
        loss=loss_of(num_outputs),
        score=score,
        batch_size=16,
        pilot_steps=1500,
        learning_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        dropouts=(0.1, 0.3, 0.5),
    )


# ## Text from scratch
def text_from_scratch(folder):
    """The tutorial's small BERT, smaller still, on the words of SST-2."""
    tutorial = example("glue")
    tutorial.SEQUENCE_LENGTH = 32
    tutorial.SMALL = {"num_layers": 2, "num_heads": 2, "hidden_dim": 48, "intermediate_dim": 96, "dropout": 0.1}
    texts = glue_texts("sst2", folder, 6000)
    classifier = tutorial.build_classifier("sst2", texts["train"][0])
    data = {}
    for split, ((sentences,), labels) in texts.items():
        tokens = classifier.preprocessor(sentences)
        data[split] = ({name: np.array(value, "int32") for name, value in tokens.items()}, labels, None)

    def build(dropout):
        tutorial.SMALL["dropout"] = dropout
        return without_preprocessing(tutorial.build_classifier("sst2", texts["train"][0]))

    return Task(
        title="SST-2, BERT from scratch",
        data=data,
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=accuracy_and_calibration,
        batch_size=32,
        pilot_steps=1500,
        learning_rates=(3e-4, 1e-3, 3e-3),
        dropouts=(0.1, 0.3, 0.5),
        shared={"half depth": "transformer_layer_0", "head only": "pooled_dense"},
    )


# ## Sequences
def rows_with_weights(preprocessor, texts):
    """What a KerasHub task makes of texts, as arrays."""
    x, y, weights = preprocessor(texts)
    return (
        {name: np.array(value, "int32") for name, value in x.items()},
        np.array(y, "int32"),
        np.array(weights, "float32"),
    )


def perplexity(y, logits, weights):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    return {"perplexity": float(np.exp(loss(y, logits, weights)))}


def language_model(folder):
    """The tutorial's small GPT-2, smaller still, on WikiText-2's validation text."""
    tutorial = example("language_model")
    tutorial.WORDS, tutorial.SEQUENCE_LENGTH, tutorial.SMALL_VOCABULARY_SIZE, tutorial.BATCH_SIZE = 24, 32, 1000, 16
    tutorial.SMALL = {"num_layers": 2, "num_heads": 2, "hidden_dim": 64, "intermediate_dim": 128}
    rows = tutorial.load_data(folder / "wikitext2", rows=4000)
    rows = {"train": rows["train"], "validation": rows["validation"][:400], "test": rows["test"][:800]}
    preprocessor = tutorial.build_model(rows["train"]).preprocessor

    def build(dropout):
        tutorial.DROPOUT = dropout
        return without_preprocessing(tutorial.build_model(rows["train"]))

    return Task(
        title="WikiText-2, GPT-2 from scratch",
        data={split: rows_with_weights(preprocessor, texts) for split, texts in rows.items()},
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        score=perplexity,
        batch_size=tutorial.BATCH_SIZE,
        pilot_steps=1500,
        learning_rates=(1e-3, 2e-3, 4e-3),
        dropouts=(0.1, 0.2, 0.3),
        alphas=(0.1, 0.3, 1.0),
        shared={"half depth": "transformer_layer_0"},
        num_seeds=3,
    )


def translation(folder):
    """The tutorial's small BART, smaller still, on short captions of Multi30k, German to English."""
    tutorial = example("translation")
    tutorial.MAX_LENGTH, tutorial.SMALL_VOCABULARY_SIZE, tutorial.BATCH_SIZE = 16, 1000, 16
    tutorial.SMALL = {"num_layers": 1, "num_heads": 4, "hidden_dim": 64, "intermediate_dim": 128, "dropout": 0.1}
    table = {}
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        with gzip.open(next((folder / "multi30k").glob(f"{name}*.tsv.gz")), "rt", encoding="utf-8") as file:
            english, german = zip(*(line.rstrip("\n").split("\t") for line in list(file)[1:]))
        table[split] = list(german), list(english)
    table["train"] = tuple(column[:3000] for column in table["train"])
    table["validation"] = tuple(column[:500] for column in table["validation"])
    texts = table["train"][0] + table["train"][1]
    preprocessor = tutorial.build_model(texts, small=True).preprocessor

    def build(dropout):
        tutorial.SMALL["dropout"] = dropout
        return without_preprocessing(tutorial.build_model(texts, small=True))

    return Task(
        title="Multi30k, BART from scratch",
        data={
            split: rows_with_weights(preprocessor, {"encoder_text": list(german), "decoder_text": list(english)})
            for split, (german, english) in table.items()
        },
        build=build,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        score=perplexity,
        batch_size=tutorial.BATCH_SIZE,
        pilot_steps=2000,
        learning_rates=(1e-3, 2e-3),
        dropouts=(0.1, 0.2, 0.3),
        alphas=(0.3, 1.0, 3.0),
        num_seeds=2,
    )


def splits(train, validation, test):
    return {"train": (*train, None), "validation": (*validation, None), "test": (*test, None)}


# By the name that `--tasks` takes, from the cheapest. All but the digits need `--data`, and GLUE's `--encoder`.
TASKS = {
    "digits-100": functools.partial(digits, 100, False),
    "digits-400": functools.partial(digits, 400, False),
    "digits-50-shifted": functools.partial(digits, 50, True),
    "sst2-head": functools.partial(glue_head, "sst2"),
    "mrpc-head": functools.partial(glue_head, "mrpc"),
    "cola-head": functools.partial(glue_head, "cola"),
    "stsb-head": functools.partial(glue_head, "stsb"),
    "text": text_from_scratch,
    "conv-2000": functools.partial(cifar_conv, 2000, False, 32),
    "conv-2000-augmented": functools.partial(cifar_conv, 2000, True, 16),
    "conv-10000": functools.partial(cifar_conv, 10_000, False, 16),
    "vit-2000": functools.partial(cifar_vit, 2000, False, 32),
    "vit-2000-augmented": functools.partial(cifar_vit, 2000, True, 16),
    "vit-10000": functools.partial(cifar_vit, 10_000, False, 16),
    "sst2": functools.partial(glue, "sst2"),
    "mrpc": functools.partial(glue, "mrpc"),
    "cola": functools.partial(glue, "cola"),
    "stsb": functools.partial(glue, "stsb"),
    "language-model": language_model,
    "translation": translation,
}
