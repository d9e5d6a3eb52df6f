"""Runs of `paper.py` of one task and one kind of training, in a process that makes their program once.

    KERAS_BACKEND=jax python paper_run.py sst2 R-Drop --runs '[[1.0, 1, 0]]' --arrays FOLDER --encoder FOLDER

A run is α, how many times the usual epochs, and a seed. It prints a line of JSON when a run ends. Between runs weights,
optimizer and α are set anew. It needs JAX and no TensorFlow.
"""

import argparse
import functools
import json
import math
import pathlib
import signal
import sys
import time

import jax
import jax.numpy as jnp
import keras
import numpy as np

import measure
import paper_data
import rdrop_keras
from paper_data import PADDING, START

PIECES = 20  # Of a run. After each the validation loss is taken, and the learning rate moves.
WARM_UP = 2  # Pieces of them.
LABEL_SMOOTHING = 0.1


# ## Translation
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy with smoothed labels, given as integers."""

    def call(self, y_true, y_pred):
        log_probs = keras.ops.log_softmax(keras.ops.cast(y_pred, "float32"))
        right = keras.ops.take_along_axis(log_probs, keras.ops.cast(y_true, "int32")[..., None], axis=-1)[..., 0]
        return -(1 - LABEL_SMOOTHING) * right - LABEL_SMOOTHING * keras.ops.mean(log_probs, axis=-1)


class Multi30k:
    """A Transformer of 3 + 3 layers, 256 wide, from scratch, German to English."""

    epochs, batch_size, learning_rate, clipnorm = 40, 256, 7e-4, 1.0
    divergence = rdrop_keras.Divergence("kl", from_logits=True)

    def __init__(self, arrays, encoder, tiny):
        self.content = np.load(arrays / "multi30k.npz")
        self.size = (1, 2, 8, 16) if tiny else (3, 4, 256, 1024)
        self.loss = SmoothedCrossentropy(reduction="mean_with_sample_weight")
        self.score_name, self.translate = "BLEU", None

    def split(self, name):
        source, target = (self.content[f"{name}/{what}"] for what in ("source", "target"))
        x = {
            "encoder_token_ids": source,
            "encoder_padding_mask": (source != PADDING).astype("int32"),
            "decoder_token_ids": target[:, :-1],
            "decoder_padding_mask": (target[:, :-1] != PADDING).astype("int32"),
        }
        return x, target[:, 1:], (target[:, 1:] != PADDING).astype("float32")

    def build(self):
        import keras_hub

        num_layers, num_heads, width, wide = self.size
        backbone = keras_hub.models.BartBackbone(
            len(self.content["pieces"]), num_layers, num_heads, width, wide, dropout=0.3, max_sequence_length=64
        )
        task = keras_hub.models.BartSeq2SeqLM(backbone)
        return keras.Model(task.inputs, task.outputs)

    def score(self, network):
        """BLEU of greedy translations of the test split."""
        import sacrebleu

        x, _, _ = self.split("test")
        weights = [[v.value for v in vs] for vs in (network.trainable_variables, network.non_trainable_variables)]
        if self.translate is None:
            self.translate = jax.jit(functools.partial(greedy, network, x["decoder_token_ids"].shape[1]))
        rows = self.translate(weights, x["encoder_token_ids"], x["encoder_padding_mask"])
        pieces = self.content["pieces"]
        translations = [paper_data.text_of(row[1:], pieces) for row in np.asarray(rows)]
        return sacrebleu.corpus_bleu(translations, [list(self.content["test/reference"])]).score


def greedy(network, length, weights, source, mask):
    """Target tokens, the likeliest at each place. Of `network` only the structure counts."""

    def with_one_more(i, target):
        inputs = {
            "encoder_token_ids": source,
            "encoder_padding_mask": mask,
            "decoder_token_ids": target,
            "decoder_padding_mask": jnp.ones_like(target),  # What follows is masked by causality.
        }
        logits, _ = network.stateless_call(*weights, inputs, training=False)
        return target.at[:, i].set(jnp.argmax(jnp.take(logits, i - 1, axis=1), axis=-1).astype("int32"))

    first = jnp.full((len(source), length), PADDING, "int32").at[:, 0].set(START)
    return jax.lax.fori_loop(1, length, with_one_more, first)


# ## GLUE
class Glue:
    """MiniLM, fine-tuned whole."""

    epochs, batch_size, learning_rate, clipnorm = 5, 32, 1e-4, 1.0
    divergence = "auto"

    def __init__(self, name, arrays, encoder, tiny):
        import keras_hub

        self.content = np.load(arrays / f"{name}.npz")
        self.num_outputs = 1 if name == "stsb" else 2
        self.loss = keras.losses.MeanSquaredError()
        if name != "stsb":
            self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.score_name = {"stsb": "Pearson", "cola": "Matthews"}.get(name, "accuracy")
        if tiny:
            num_words = 1 + max(int(self.content[f"{split}/token_ids"].max()) for split in ("train", "test"))
            length = self.content["train/token_ids"].shape[1]
            options = {"vocabulary_size": num_words, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}
            backbone = keras_hub.models.BertBackbone(**options, intermediate_dim=16, max_sequence_length=length)
        else:
            backbone = keras_hub.models.BertBackbone.from_preset(str(encoder))
        self.pretrained, self.config = backbone.get_weights(), {**backbone.get_config(), "dropout": 0.1}

    def split(self, name):
        tokens = self.content[f"{name}/token_ids"]
        x = {
            "token_ids": tokens,
            "segment_ids": self.content[f"{name}/segment_ids"],
            "padding_mask": (tokens != PADDING).astype("int32"),
        }
        return x, self.content[f"{name}/label"], None

    def build(self):
        import keras_hub

        backbone = keras_hub.models.BertBackbone.from_config(self.config)
        backbone.set_weights(self.pretrained)
        # The head in full precision: bfloat16 has too few digits for a score of numbers.
        task = keras_hub.models.BertTextClassifier(backbone, self.num_outputs, dropout=0.1, dtype="float32")
        return keras.Model(task.inputs, task.outputs)

    def score(self, network):
        x, y, _ = self.split("test")
        outputs = network.predict(x, batch_size=len(y), verbose=0)
        if self.score_name == "Pearson":
            return correlation(y, outputs[:, 0])
        guesses = outputs.argmax(axis=-1)
        return correlation(y, guesses) if self.score_name == "Matthews" else float((guesses == y).mean())


def correlation(a, b):
    """Pearson's, which of two classes is Matthews'; 0 where one of them is constant."""
    a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
    deviations = np.std(a) * np.std(b)
    return float(np.mean((a - a.mean()) * (b - b.mean())) / deviations) if deviations else 0.0


# ## Runs
class Best(keras.callbacks.Callback):
    """Keeps the weights with the lowest validation loss."""

    def __init__(self, network):
        super().__init__()
        self.network, self.losses = network, []

    def on_epoch_end(self, epoch, logs=None):
        if not self.losses or logs["val_loss"] < min(self.losses):
            self.weights = self.network.get_weights()
        self.losses.append(logs["val_loss"] if math.isfinite(logs["val_loss"]) else 1e9)


def learning_rate_at(piece, highest, num_pieces):
    """Warms up, then falls in a line to 0."""
    return highest * min((piece + 1) / (WARM_UP + 1), (num_pieces - piece) / (num_pieces - WARM_UP))


def batches(split, batch_size, seed):
    """Batches without end, in an order of the seed's."""
    x, y, weights = split
    rng = np.random.default_rng(seed)
    parts = (x, y) if weights is None else (x, y, weights)
    while True:
        order = rng.permutation(len(y))
        for i in range(0, len(y) - batch_size + 1, batch_size):
            rows = order[i : i + batch_size]
            yield keras.tree.map_structure(lambda array, rows=rows: array[rows], parts)


class Trainer:
    """One compiled model, of which each run sets weights, optimizer and α anew."""

    def __init__(self, task, kind, tiny):
        self.task, self.kind, self.tiny = task, kind, tiny
        self.splits = {name: task.split(name) for name in ("train", "validation", "test")}
        self.batch_size = min(task.batch_size, len(self.splits["train"][1]) // 2)
        self.pieces = 4 if tiny else PIECES
        self.network = self.model = None

    def begin(self, alpha, num_steps, seed):
        """Makes the model, or makes it new."""
        keras.utils.set_random_seed(seed)
        network = self.task.build()
        half = self.kind == "R-Drop from ½"
        if self.network is None or half:  # `start` counts the steps of a model's life.
            self.network = self.model = network
            if self.kind != "plain":
                start = num_steps // 2 if half else 0
                self.model = rdrop_keras.RDropModel(network, alpha, divergence=self.task.divergence, start=start)
            self.model.compile(
                keras.optimizers.AdamW(1e-3, weight_decay=0.01, beta_2=0.98, clipnorm=self.task.clipnorm),
                self.task.loss,
            )
            return
        for variable, new in zip(self.network.variables, network.variables, strict=True):
            variable.assign(new)
        for variable in self.model.optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        if self.kind != "plain":
            self.model.alpha = alpha

    def run(self, alpha, times, seed):
        began = time.perf_counter()
        task = self.task
        num_steps = 2 if self.tiny else task.epochs * times * len(self.splits["train"][1]) // self.batch_size
        steps = max(1, round(num_steps / self.pieces))
        self.begin(alpha, steps * self.pieces, seed)
        built = time.perf_counter()
        best = Best(self.network)
        rate = keras.callbacks.LearningRateScheduler(
            lambda piece, _: learning_rate_at(piece, task.learning_rate, self.pieces)
        )
        validation = tuple(part for part in self.splits["validation"] if part is not None)
        history = self.model.fit(
            batches(self.splits["train"], self.batch_size, seed),
            steps_per_epoch=steps,
            epochs=self.pieces,
            validation_data=validation,
            validation_batch_size=len(validation[1]),
            callbacks=[best, rate],
            shuffle=False,
            verbose=0,
        ).history
        trained = time.perf_counter()
        self.network.set_weights(best.weights)
        result = {
            task.score_name: measure.rounded(task.score(self.network)),
            "validation loss": measure.rounded(min(best.losses)),
            "best piece": 1 + best.losses.index(min(best.losses)),
            "steps": steps * self.pieces,
            "validation losses": measure.rounded(best.losses),
            "loss": measure.rounded(history["loss"][-1]),
            "seconds to begin": measure.rounded(built - began),
            "seconds of training": measure.rounded(trained - built),
            "seconds": measure.rounded(time.perf_counter() - began),
        }
        if "consistency_loss" in history:
            result["consistency_loss"] = measure.rounded(history["consistency_loss"][-1])
        return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=paper_data.TASKS)
    parser.add_argument("kind", choices=("plain", "R-Drop", "R-Drop from ½"))
    parser.add_argument("--runs", type=json.loads, required=True, metavar="JSON", help="[[alpha, times, seed], …]")
    parser.add_argument("--arrays", type=pathlib.Path, required=True, metavar="FOLDER")
    parser.add_argument("--encoder", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--until", type=float, help="the time, in seconds of the epoch, at which the process ends")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    # KerasHub would import it where it is, which takes seconds and a part of the card.
    sys.modules |= dict.fromkeys(("tensorflow", "tensorflow_text"))
    if args.until is not None:
        signal.alarm(max(1, int(args.until - time.time())))
    keras.config.set_dtype_policy("mixed_bfloat16")
    make = Multi30k if args.task == "multi30k" else functools.partial(Glue, args.task)
    trainer = Trainer(make(args.arrays, args.encoder, args.tiny), args.kind, args.tiny)
    for run in args.runs:
        print(json.dumps({"run": run, **trainer.run(*run), "provenance": measure.provenance()}), flush=True)


if __name__ == "__main__":
    main()
