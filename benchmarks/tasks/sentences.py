"""GLUE: the upper layers of a pretrained encoder, a head on its embeddings, and a small BERT from scratch."""

import collections
import re

import keras
import numpy as np
from keras import layers

from tasks import tables
from tasks.task import (
    Task,
    accuracy_and_calibration,
    crossentropy,
    matthews_and_calibration,
    pearson,
    without_preprocessing,
)

ENCODER_LAYERS = 6
FROZEN_LAYERS = 4  # Of the pretrained encoder: computed once, before training.

# Title, length of its rows in tokens, and score.
GLUE = {
    "sst2": ("SST-2", 24, accuracy_and_calibration),
    "mrpc": ("MRPC", 48, accuracy_and_calibration),
    "cola": ("CoLA", 16, matthews_and_calibration),
    "stsb": ("STS-B", 40, pearson),
}


def glue_texts(name, folder, num_train):
    """`{split: (texts, labels)}`; without a test split the dev split is tested, and chosen by rows of training."""

    def read(split):
        texts, labels = tables.glue(folder, name, split)
        order = np.random.RandomState(0).permutation(len(labels))
        return tuple([column[i] for i in order] for column in texts), labels[order]

    def part(split, start, end):
        texts, labels = split
        return tuple(column[start:end] for column in texts), labels[start:end]

    train, dev = read("train"), read("dev")
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
    return keras.losses.MeanSquaredError() if num_outputs == 1 else crossentropy()


def upper_layers(name, folder, encoder):
    """The two upper layers of the encoder, and a head on its first token; what they are fed is computed here, once."""
    import keras_hub

    title, length, score = GLUE[name]
    num_outputs = tables.num_outputs(name)
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


def head(name, folder, encoder):
    """Dense layers on embeddings of sentences, the mean of the encoder's last layer, which is computed here, once.

    Of two sentences u and v they get u, v, |u − v| and u · v (Conneau et al., 2017).
    """
    title, _, score = GLUE[name]
    num_outputs = tables.num_outputs(name)
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


def from_scratch(folder):
    """A BERT of two layers that knows the words of SST-2."""
    import keras_hub

    length = 32
    texts = glue_texts("sst2", folder, 6000)
    words = collections.Counter(re.findall(r"\w+|[^\w\s]", " ".join(texts["train"][0][0]).lower()))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in words.most_common(8_000))]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=length)
    data = {}
    for split, ((sentences,), labels) in texts.items():
        tokens = preprocessor(sentences)
        data[split] = ({name: np.array(value, "int32") for name, value in tokens.items()}, labels, None)

    def build(dropout):
        backbone = keras_hub.models.BertBackbone(len(vocabulary), 2, 2, 48, 96, dropout, max_sequence_length=length)
        return without_preprocessing(keras_hub.models.BertTextClassifier(backbone, 2, dropout=dropout))

    return Task(
        title="SST-2, BERT from scratch",
        data=data,
        build=build,
        loss=crossentropy(),
        score=accuracy_and_calibration,
        batch_size=32,
        pilot_steps=1500,
        learning_rates=(3e-4, 1e-3, 3e-3),
        dropouts=(0.1, 0.3, 0.5),
        shared={"half depth": "transformer_layer_0", "head only": "pooled_dense"},
    )
