"""Fine-tuning GPT-2 on Wikipedia with R-Drop.

A language model tells how likely each next word is. Here a pretrained GPT-2 of KerasHub is trained further on articles
of Wikipedia with R-Drop (the paper trains language models in section 3.4). Then it is scored by its perplexity,
continues a text, is exported and loaded again. R-Drop is the one line that wraps it:

    model = rdrop_keras.RDropModel(language_model, alpha=1.0)

To install what it needs, in a copy of the repository, and to run it (on every backend `tf.data` needs TensorFlow):

    python -m pip install ".[tensorflow,tasks]"
    python examples/language_model.py
    python examples/language_model.py --small --data FOLDER

The second command downloads articles with tensorflow-datasets and weights with KerasHub, and wants a GPU. The third
needs neither: it trains a small GPT-2 from scratch, on plain text in a folder of yours.
"""

import argparse
import gzip
import json
import math
import pathlib
import re

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
import tokenizers

import rdrop_keras

DATASET = "wiki40b/en"
ARTICLES = {"train": 30_000, "validation": 500, "test": 500}  # Of 2.9 million, and twice 163,000.
PRESET = "gpt2_base_en"  # Any GPT-2 of KerasHub, such as "gpt2_medium_en".
ALPHA = 1.0
DROPOUT = 0.1
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 5e-5
WORDS = 100  # Of a row of text.
SEQUENCE_LENGTH = 192  # Tokens of a row. Longer rows are cut.
SEED = 0
PROMPT = "The film was released in"
# The model of `--small`. It starts from random weights, which need a higher learning rate.
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
SMALL_VOCABULARY_SIZE = 8_000
SMALL_LEARNING_RATE = 1e-3


# ## The data
#
# A split is a list of rows, strings of a hundred words each. With `--data` it is the text of a file in a folder:
# `train.txt`, `validation.txt` (or `valid.txt`, `dev.txt`) and `test.txt`, perhaps gzipped.
def load_data(folder=None, rows=None):
    """`{split: [row]}`. `rows` limits the training split."""
    splits = {}
    for split, names in {"train": ["train"], "validation": ["validation", "valid", "dev"], "test": ["test"]}.items():
        text = read_articles(split) if folder is None else read_text(folder, names)
        words = text.split()
        splits[split] = [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]
    splits["train"] = splits["train"][:rows]
    for split, found in splits.items():
        if len(found) < (BATCH_SIZE if split == "train" else 1):
            raise ValueError(
                f"The {split} split must have text, and that of training at least BATCH_SIZE={BATCH_SIZE} rows of "
                f"{WORDS} words. Received: {len(found)} rows."
            )
    return splits


def read_articles(split):
    articles = tfds.as_numpy(tfds.load(DATASET, split=f"{split}[:{ARTICLES[split]}]"))
    # Words such as _START_SECTION_ mark the parts of an article.
    return " ".join(re.sub(r"_(START_[A-Z]+|NEWLINE)_", "\n", tf.compat.as_text(row["text"])) for row in articles)


def read_text(folder, names):
    names = [f"{name}.txt{ending}" for name in names for ending in ("", ".gz")]
    path = next((path for path in (pathlib.Path(folder, name) for name in names) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"--data must be a folder with one of {', '.join(names)}. Received: {folder}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


# ## Batches
#
# The batches hold raw strings, which the KerasHub task tokenizes while it trains. It also makes the labels, which are
# the next tokens, and gives padding no weight. It never shuffles what it is given, so we shuffle here, anew in each
# epoch.
def make_batches(rows, training=False):
    dataset = tf.data.Dataset.from_tensor_slices(rows)
    dataset = dataset.shuffle(len(rows), seed=SEED) if training else dataset
    return dataset.batch(BATCH_SIZE, drop_remainder=training)


# ## The model
#
# This is the KerasHub task that you would train without R-Drop. R-Drop needs dropout, and GPT-2 has it in every layer:
# `dropout` sets its rate.
def build_model(texts=None):
    """The task of `PRESET`, or a small one from scratch that knows the words of `texts`."""
    if texts is None:
        preprocessor = keras_hub.models.GPT2CausalLMPreprocessor.from_preset(PRESET, sequence_length=SEQUENCE_LENGTH)
        backbone = keras_hub.models.GPT2Backbone.from_preset(PRESET, dropout=DROPOUT)
    else:
        trainer = tokenizers.ByteLevelBPETokenizer()
        trainer.train_from_iterator(texts, SMALL_VOCABULARY_SIZE - 1, show_progress=False)
        pieces = json.loads(trainer.to_str())["model"]
        # The token that ends a text is last, as in GPT-2's own vocabulary: generation would take a padding's 0 for it.
        vocabulary = {**pieces["vocab"], "<|endoftext|>": len(pieces["vocab"])}
        tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, [" ".join(pair) for pair in pieces["merges"]])
        preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=SEQUENCE_LENGTH)
        backbone = keras_hub.models.GPT2Backbone(
            tokenizer.vocabulary_size(), **SMALL, dropout=DROPOUT, max_sequence_length=SEQUENCE_LENGTH
        )
    return keras_hub.models.GPT2CausalLM(backbone, preprocessor)


# ## Compiling
#
# We compile the wrapper as we would compile the task. The loss is a mean over the tokens that are not padding. The
# metric `nll` is the same mean over all batches together. The perplexity is its exponential.
def compile_model(model, num_steps, learning_rate):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps - num_steps // 10, warmup_target=learning_rate, warmup_steps=num_steps // 10
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")],
    )


# ## Training
#
# `BackupAndRestore` keeps the state of training: after an interruption the same command goes on.
# `tensorboard --logdir runs` shows the curves.
def main():
    parser = argparse.ArgumentParser(description="Fine-tunes GPT-2 with R-Drop.")
    parser.add_argument("--data", metavar="FOLDER", help="of plain text, in place of tensorflow-datasets")
    parser.add_argument("--small", action="store_true", help="a small model from scratch, in place of the preset")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, 0 for none (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--rows", type=int, metavar="N", help=f"train on the first N rows, of {WORDS} words each")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="for what is written (%(default)s)")
    args = parser.parse_args()
    if not (0 <= args.alpha < math.inf and args.epochs >= 1):
        parser.error(f"--alpha must be a number ≥ 0, and --epochs ≥ 1. Received: {args.alpha} and {args.epochs}")

    keras.utils.set_random_seed(SEED)
    output = f"{args.output}/language_model"
    splits = load_data(args.data, args.rows)
    train, validation = make_batches(splits["train"], training=True), make_batches(splits["validation"])
    language_model = build_model(splits["train"] if args.small else None)
    model = rdrop_keras.RDropModel(language_model, alpha=args.alpha)
    compile_model(model, args.epochs * len(train), SMALL_LEARNING_RATE if args.small else LEARNING_RATE)
    callbacks = [keras.callbacks.BackupAndRestore(f"{output}/backup"), keras.callbacks.TensorBoard(f"{output}/logs")]
    model.fit(train, validation_data=validation, epochs=args.epochs, callbacks=callbacks)

    # `evaluate` runs the wrapped model alone. Perplexities per token are comparable between models with one tokenizer.
    nll = model.evaluate(make_batches(splits["test"]), return_dict=True)["nll"]
    print(f"Perplexity a token of {len(splits['test'])} test rows: {math.exp(nll):.2f}")

    # The trained model is `model.model`, the KerasHub task, which generates as it always does.
    language_model.compile(sampler=keras_hub.samplers.TopKSampler(20, seed=SEED))
    print(language_model.generate(PROMPT))

    # The SavedModel is GPT-2 alone, from tokens to logits. It is written on TensorFlow. Elsewhere we save the KerasHub
    # task, tokenizer included.
    tokens, _, _ = language_model.preprocess_samples(splits["test"][:2])
    tokens = {name: np.array(value, "int32") for name, value in tokens.items()}
    if keras.backend.backend() == "tensorflow":
        model.export(f"{output}/served", verbose=False)
        served = tf.saved_model.load(f"{output}/served")
        logits = served.serve(tokens)
    else:
        language_model.save(f"{output}/language_model.keras")
        logits = keras.models.load_model(f"{output}/language_model.keras", compile=False)(tokens)
    difference = float(keras.ops.max(keras.ops.abs(language_model(tokens) - logits)))
    print(f"Logits of the model and of the loaded one differ by at most {difference:.1g}.")


if __name__ == "__main__":
    main()
