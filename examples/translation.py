"""Training a translation model with R-Drop.

A Transformer learns to translate from pairs of sentences alone: an encoder reads the source, a decoder writes the
target. Here it is trained from scratch with R-Drop, as in section 3.1 of the paper, then translates, is scored by BLEU,
exported and loaded again. R-Drop is the one line that wraps it:

    model = rdrop_keras.RDropModel(translator, alpha=5.0, divergence=rdrop_keras.Divergence("kl", from_logits=True))

To install what it needs, in a copy of the repository, and to run it (on every backend `tf.data` needs TensorFlow):

    python -m pip install ".[tensorflow,tasks]"
    python examples/translation.py
    python examples/translation.py --small --data FOLDER

The second command downloads TED talks with tensorflow-datasets and trains the paper's model, for which you want a GPU.
The third needs neither: it trains a small model on tables in a folder of yours.
"""

import argparse
import gzip
import json
import math
import pathlib

import keras
import keras_hub
import numpy as np
import sacrebleu
import tensorflow as tf
import tensorflow_datasets as tfds
import tokenizers

import rdrop_keras

DATASET, SOURCE, TARGET = "ted_hrlr_translate/pt_to_en", "pt", "en"  # Or "wmt14_translate/de-en", "de", "en".
ALPHA = 5.0
LABEL_SMOOTHING = 0.1
EPOCHS = 60
BATCH_SIZE = 128  # Of all devices together.
LEARNING_RATE = 5e-4
MAX_LENGTH = 64  # Tokens of a sentence. Longer sentences are cut.
SEED = 0
# The paper's model, and that of `--small`.
MODEL = {"num_layers": 6, "num_heads": 4, "hidden_dim": 512, "intermediate_dim": 1024, "dropout": 0.3}
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512, "dropout": 0.1}
VOCABULARY_SIZE, SMALL_VOCABULARY_SIZE = 10_000, 4_000


# ## The data
#
# A split is a pair of lists: sentences and their translations. With `--data` it is a table in a folder: `train.tsv`,
# `validation.tsv` (or `valid.tsv`, `dev.tsv`) and `test.tsv`, perhaps gzipped. Its first line names two columns,
# separated by a tab; the first is translated into the second.
def load_data(folder=None, rows=None):
    """`{split: (sources, targets)}`. `rows` limits the training split."""
    splits = {}
    for split, names in {"train": ["train"], "validation": ["validation", "valid", "dev"], "test": ["test"]}.items():
        if folder is None:
            pairs = tfds.as_numpy(tfds.load(DATASET, split=split))
            columns = zip(*[[tf.compat.as_text(pair[language]) for language in (SOURCE, TARGET)] for pair in pairs])
        else:
            columns = read_table(folder, names)
        splits[split] = tuple(list(column)[: rows if split == "train" else None] for column in columns)
        num_rows, least = len(splits[split][0]), 1 if split == "test" else BATCH_SIZE
        if num_rows < least:
            raise ValueError(f"The {split} split must have at least {least} rows. Received: {num_rows}.")
    return splits


def read_table(folder, names):
    names = [f"{name}.tsv{ending}" for name in names for ending in ("", ".gz")]
    path = next((path for path in (pathlib.Path(folder, name) for name in names) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"--data must be a folder with one of {', '.join(names)}. Received: {folder}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t") for line in file]
    for line, row in enumerate(rows, 1):
        if len(row) != 2:
            raise ValueError(f"{path}, line {line}: there must be two columns, separated by a tab. Received: {row}.")
    return [[row[column] for row in rows[1:]] for column in (0, 1)]


# ## Batches
#
# The batches hold raw sentences, which the KerasHub task tokenizes while it trains. It never shuffles what it is given,
# so we shuffle here, anew in each epoch. All batches are full, so that several devices can split them evenly.
def make_batches(sources, targets, shuffle=False):
    rows = tf.data.Dataset.from_tensor_slices({"encoder_text": sources, "decoder_text": targets})
    rows = rows.shuffle(len(sources), seed=SEED) if shuffle else rows
    return rows.batch(BATCH_SIZE, drop_remainder=True)


# ## The model
#
# KerasHub's BART is the encoder-decoder Transformer that we need. Encoder, decoder and output share one vocabulary of
# word pieces, learned from both languages, and its embeddings. As a KerasHub task it takes sentences in `fit` and
# writes sentences in `generate`.
def build_model(texts, small=False):
    """A translator that knows the words of `texts`. Its weights are random."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    size, specials = SMALL_VOCABULARY_SIZE if small else VOCABULARY_SIZE, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer.train_from_iterator(texts, size, special_tokens=specials, show_progress=False)
    pieces = json.loads(trainer.to_str())["model"]
    tokenizer = keras_hub.models.BartTokenizer(pieces["vocab"], [" ".join(pair) for pair in pieces["merges"]])
    preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(tokenizer, MAX_LENGTH, MAX_LENGTH)
    backbone = keras_hub.models.BartBackbone(
        tokenizer.vocabulary_size(), **(SMALL if small else MODEL), max_sequence_length=MAX_LENGTH
    )
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)


# ## The loss
#
# The paper smooths the labels: the right word counts 0.9, and all words share the remaining 0.1. Keras does that for
# one-hot labels, which would be large here, so we write it for integers. R-Drop cannot tell from our own loss what the
# outputs are, so `main` passes `divergence`. The mean is over the tokens that are not padding.
class SmoothedCrossentropy(keras.losses.Loss):
    def call(self, y_true, y_pred):
        log_probs = keras.ops.log_softmax(keras.ops.cast(y_pred, "float32"))
        right = keras.ops.take_along_axis(log_probs, keras.ops.cast(y_true, "int32")[..., None], axis=-1)[..., 0]
        return -(1 - LABEL_SMOOTHING) * right - LABEL_SMOOTHING * keras.ops.mean(log_probs, axis=-1)


def compile_model(model, num_steps):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps - num_steps // 10, warmup_target=LEARNING_RATE, warmup_steps=num_steps // 10
    )
    model.compile(
        keras.optimizers.Adam(schedule, beta_2=0.98, clipnorm=1.0),
        SmoothedCrossentropy(reduction="mean_with_sample_weight"),
        weighted_metrics=["accuracy"],
    )


# ## Translations
#
# The decoder takes the most likely token each time. `keras_hub.samplers.BeamSampler(5)` looks further ahead.
def translate(translator, sources):
    translator.compile(sampler="greedy")  # For `generate` alone: the translator has been trained by its wrapper.
    translations = []
    for i in range(0, len(sources), BATCH_SIZE):
        batch = sources[i : i + BATCH_SIZE]
        filling = batch[:1] * (BATCH_SIZE - len(batch))  # All batches are full, so that several devices can split them.
        translations += translator.generate(batch + filling)[: len(batch)]
    return translations


# ## Several devices
#
# On TensorFlow the model is made and compiled in the scope of a strategy, as in `main`. Several workers all run this
# program, and find each other by the variable `TF_CONFIG`. On JAX one line, before the model is made, lets all devices
# share each batch.
STRATEGIES = {
    "none": tf.distribute.get_strategy,
    "mirrored": tf.distribute.MirroredStrategy,
    "multiworker": tf.distribute.MultiWorkerMirroredStrategy,
    "tpu": lambda: tf.distribute.TPUStrategy(tf.distribute.cluster_resolver.TPUClusterResolver.connect()),
}


# ## Training
#
# `BackupAndRestore` keeps the state of training: after an interruption the same command goes on. Of several workers the
# first writes, to a place where all can read. `tensorboard --logdir runs` shows the curves.
def main():
    parser = argparse.ArgumentParser(description="Trains a translation model with R-Drop.")
    parser.add_argument("--data", metavar="FOLDER", help="of tables, in place of tensorflow-datasets")
    parser.add_argument("--small", action="store_true", help="a small model, in place of the paper's")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, 0 for none (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--rows", type=int, metavar="N", help="train on the first N rows")
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="on TensorFlow; JAX uses all devices")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="for what is written (%(default)s)")
    args = parser.parse_args()
    if not (0 <= args.alpha < math.inf and args.epochs >= 1):
        parser.error(f"--alpha must be a number ≥ 0, and --epochs ≥ 1. Received: {args.alpha} and {args.epochs}")

    strategy = STRATEGIES[args.strategy]()  # First of all, as workers must find each other before they compute.
    keras.utils.set_random_seed(SEED)
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    is_first = not getattr(strategy.cluster_resolver, "task_id", 0)
    output = f"{args.output}/translation"

    splits = load_data(args.data, args.rows)
    train, validation = make_batches(*splits["train"], shuffle=True), make_batches(*splits["validation"])
    with strategy.scope():
        translator = build_model(splits["train"][0] + splits["train"][1], args.small)
        divergence = rdrop_keras.Divergence("kl", from_logits=True)
        model = rdrop_keras.RDropModel(translator, alpha=args.alpha, divergence=divergence)
        compile_model(model, args.epochs * len(train))

    save_freq = "epoch" if is_first else 10**9  # The others never come to save.
    callbacks = [keras.callbacks.BackupAndRestore(f"{output}/backup", save_freq, delete_checkpoint=is_first)]
    callbacks += [keras.callbacks.TensorBoard(f"{output}/logs")] if is_first else []
    model.fit(train, validation_data=validation, epochs=args.epochs, callbacks=callbacks)

    sources, targets = splits["test"]
    translations = translate(translator, sources)
    print(f"BLEU of {len(sources)} test sentences: {sacrebleu.corpus_bleu(translations, [targets]).score:.2f}")
    print(f"\n{sources[0]}\n  reference:   {targets[0]}\n  translation: {translations[0]}\n")

    # The SavedModel is the translator alone, from tokens to logits. It is written on TensorFlow. Elsewhere we save the
    # KerasHub task, but not the lengths in its preprocessor: set `preprocessor` before a loaded task generates.
    if is_first:
        tokens, _, _ = translator.preprocess_samples({"encoder_text": sources[:2], "decoder_text": targets[:2]})
        tokens = {name: np.array(value, "int32") for name, value in tokens.items()}
        if keras.backend.backend() == "tensorflow":
            model.export(f"{output}/served", verbose=False)
            served = tf.saved_model.load(f"{output}/served")
            logits = served.serve(tokens)
        else:
            translator.save(f"{output}/translator.keras")
            logits = keras.models.load_model(f"{output}/translator.keras", compile=False)(tokens)
        difference = float(keras.ops.max(keras.ops.abs(translator(tokens) - logits)))
        print(f"Logits of the model and of the loaded one differ by at most {difference:.1g}.")


if __name__ == "__main__":
    main()
