"""Fine-tuning BART to write summaries, with R-Drop.

BART is a pretrained Transformer whose encoder reads a text and whose decoder writes another. Here KerasHub's BART is
fine-tuned on news and their highlights with R-Drop, as in section 3.3 of the paper, then writes summaries, is scored by
ROUGE, exported and loaded again. R-Drop is the one line that wraps it:

    model = rdrop_keras.RDropModel(summarizer, alpha=0.7)

To install what it needs, in a copy of the repository, and to run it (on every backend `tf.data` needs TensorFlow):

    python -m pip install ".[tensorflow,tasks]"
    python examples/summarization.py
    python examples/summarization.py --small --data FOLDER

The second command downloads CNN/DailyMail with tensorflow-datasets and weights with KerasHub, and wants a GPU. The
third needs neither: it trains a small BART from scratch, on tables in a folder of yours.
"""

import argparse
import csv
import gzip
import json
import math
import pathlib

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
import tokenizers
from rouge_score import rouge_scorer

import rdrop_keras

DATASET, DOCUMENT, SUMMARY = "cnn_dailymail", "article", "highlights"  # And the columns that we need.
PRESET = "bart_base_en"  # Any BART of KerasHub, such as "bart_large_en".
ALPHA = 0.7
DROPOUT = 0.1
EPOCHS = 3
BATCH_SIZE = 16
LEARNING_RATE = 3e-5
DOCUMENT_LENGTH, SUMMARY_LENGTH = 512, 128  # Tokens. Longer texts are cut.
SCORED_ROWS = 64  # How many summaries are written and scored, which takes long.
SEED = 0
# The model of `--small`. It starts from random weights, which need a higher learning rate.
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
SMALL_VOCABULARY_SIZE = 6_000
SMALL_DOCUMENT_LENGTH, SMALL_SUMMARY_LENGTH = 96, 24
SMALL_LEARNING_RATE = 2e-3


# ## The data
#
# A split is a `tf.data` dataset of rows `{"encoder_text": document, "decoder_text": summary}`, the names that the
# KerasHub task asks for. With `--data` it is a table in a folder: `train.tsv`, `validation.tsv` (or `valid.tsv`,
# `dev.tsv`) and `test.tsv`, perhaps gzipped. The first line of a table names its columns, which are separated by tabs:
# `document` and `summary`.
def load_data(folder=None, rows=None):
    """`{split: dataset}`. `rows` limits the training split."""
    splits = {}
    for split, names in {"train": ["train"], "validation": ["validation", "valid", "dev"], "test": ["test"]}.items():
        if folder is None:
            dataset = tfds.load(DATASET, split=split, shuffle_files=split == "train")
            dataset = dataset.map(lambda row: {"encoder_text": row[DOCUMENT], "decoder_text": row[SUMMARY]})
        else:
            documents, summaries = read_table(folder, names, ["document", "summary"])
            dataset = tf.data.Dataset.from_tensor_slices({"encoder_text": documents, "decoder_text": summaries})
        splits[split] = dataset.take(rows) if split == "train" and rows is not None else dataset
        num_rows, least = len(splits[split]), BATCH_SIZE if split == "train" else 1
        if num_rows < least:
            raise ValueError(f"The {split} split must have at least {least} rows. Received: {num_rows}.")
    return splits


def read_table(folder, names, columns):
    names = [f"{name}.tsv{ending}" for name in names for ending in ("", ".gz")]
    path = next((path for path in (pathlib.Path(folder, name) for name in names) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"--data must be a folder with one of {', '.join(names)}. Received: {folder}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not set(columns) <= set(reader.fieldnames or []):
            raise ValueError(f"{path} must have columns {', '.join(columns)}. Received: {reader.fieldnames}.")
        rows = list(reader)
    for line, row in enumerate(rows, 2):
        if None in row.values():
            raise ValueError(f"{path}, line {line}: there must be {len(reader.fieldnames)} columns, as in line 1.")
    return [[row[column] for row in rows] for column in columns]


# ## Batches
#
# The batches hold raw texts, which the KerasHub task tokenizes while it trains. It also makes the labels, which are the
# next tokens of the summary, and gives padding no weight. It never shuffles what it is given, so we shuffle here, anew
# in each epoch.
def make_batches(dataset, training=False):
    dataset = dataset.shuffle(10_000, seed=SEED) if training else dataset
    return dataset.batch(BATCH_SIZE, drop_remainder=training)


# ## The model
#
# This is the KerasHub task that you would train without R-Drop. R-Drop needs dropout, and BART has it in every layer:
# `dropout` sets its rate.
def build_model(texts=None):
    """The task of `PRESET`, or a small one from scratch that knows the words of `texts`."""
    if texts is None:
        preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor.from_preset(
            PRESET, encoder_sequence_length=DOCUMENT_LENGTH, decoder_sequence_length=SUMMARY_LENGTH
        )
        backbone = keras_hub.models.BartBackbone.from_preset(PRESET, dropout=DROPOUT)
    else:
        trainer = tokenizers.ByteLevelBPETokenizer()
        specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trainer.train_from_iterator(texts, SMALL_VOCABULARY_SIZE, special_tokens=specials, show_progress=False)
        pieces = json.loads(trainer.to_str())["model"]
        tokenizer = keras_hub.models.BartTokenizer(pieces["vocab"], [" ".join(pair) for pair in pieces["merges"]])
        preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(
            tokenizer, SMALL_DOCUMENT_LENGTH, SMALL_SUMMARY_LENGTH
        )
        backbone = keras_hub.models.BartBackbone(
            tokenizer.vocabulary_size(), **SMALL, dropout=DROPOUT, max_sequence_length=SMALL_DOCUMENT_LENGTH
        )
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)


# ## Compiling
#
# We compile the wrapper as we would compile the task. The loss is a mean over the tokens that are not padding.
def compile_model(model, num_steps, learning_rate):
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps - num_steps // 10, warmup_target=learning_rate, warmup_steps=num_steps // 10
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, global_clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    model.compile(optimizer, loss, weighted_metrics=["accuracy"])


# ## The score
#
# ROUGE counts what a summary shares with its reference: words, pairs of words, and the longest common subsequence.
# The score is the mean F1 over rows, times 100. `rougeLsum` is customary for CNN/DailyMail, with one sentence a line.
def rouge(references, summaries):
    kinds = ["rouge1", "rouge2", "rougeLsum"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score(reference, summary) for reference, summary in zip(references, summaries)]
    return {kind: 100 * np.mean([row[kind].fmeasure for row in rows]) for kind in kinds}


# ## Training
#
# `BackupAndRestore` keeps the state of training: after an interruption the same command goes on.
# `tensorboard --logdir runs` shows the curves.
def main():
    parser = argparse.ArgumentParser(description="Fine-tunes BART to write summaries, with R-Drop.")
    parser.add_argument("--data", metavar="FOLDER", help="of tables, in place of tensorflow-datasets")
    parser.add_argument("--small", action="store_true", help="a small model from scratch, in place of the preset")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, 0 for none (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--rows", type=int, metavar="N", help="train on the first N rows")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="for what is written (%(default)s)")
    args = parser.parse_args()
    if not (0 <= args.alpha < math.inf and args.epochs >= 1):
        parser.error(f"--alpha must be a number ≥ 0, and --epochs ≥ 1. Received: {args.alpha} and {args.epochs}")

    keras.utils.set_random_seed(SEED)
    output = f"{args.output}/summarization"
    splits = load_data(args.data, args.rows)
    train, validation = make_batches(splits["train"], training=True), make_batches(splits["validation"])
    texts = (text.decode() for row in splits["train"].as_numpy_iterator() for text in row.values())
    summarizer = build_model(texts if args.small else None)
    model = rdrop_keras.RDropModel(summarizer, alpha=args.alpha)
    compile_model(model, args.epochs * len(train), SMALL_LEARNING_RATE if args.small else LEARNING_RATE)
    callbacks = [keras.callbacks.BackupAndRestore(f"{output}/backup"), keras.callbacks.TensorBoard(f"{output}/logs")]
    model.fit(train, validation_data=validation, epochs=args.epochs, callbacks=callbacks)

    # The trained model is `model.model`, the KerasHub task, which takes texts and writes texts as it always does. Here
    # it takes the most likely token each time. `keras_hub.samplers.BeamSampler(4)` looks further ahead.
    summarizer.compile(sampler="greedy")
    rows = list(splits["test"].take(SCORED_ROWS).as_numpy_iterator())
    documents, references = ([row[name].decode() for row in rows] for name in ("encoder_text", "decoder_text"))
    batches = [documents[i : i + BATCH_SIZE] for i in range(0, len(documents), BATCH_SIZE)]
    summaries = [text for batch in batches for text in summarizer.generate(batch)]
    for name, value in rouge(references, summaries).items():
        print(f"{name} of {len(summaries)} test rows: {value:.2f}")
    print(f"\n{documents[0][:500]}\n  reference: {references[0]}\n  summary:   {summaries[0]}\n")

    # The SavedModel is BART alone, from tokens to logits. It is written on TensorFlow. Elsewhere we save the KerasHub
    # task, but not the lengths in its preprocessor: set `preprocessor` before a loaded task generates.
    tokens, _, _ = summarizer.preprocess_samples({"encoder_text": documents[:2], "decoder_text": references[:2]})
    tokens = {name: np.array(value, "int32") for name, value in tokens.items()}
    if keras.backend.backend() == "tensorflow":
        model.export(f"{output}/served", verbose=False)
        served = tf.saved_model.load(f"{output}/served")
        logits = served.serve(tokens)
    else:
        summarizer.save(f"{output}/summarizer.keras")
        logits = keras.models.load_model(f"{output}/summarizer.keras", compile=False)(tokens)
    difference = float(keras.ops.max(keras.ops.abs(summarizer(tokens) - logits)))
    print(f"Logits of the model and of the loaded one differ by at most {difference:.1g}.")


if __name__ == "__main__":
    main()
