"""Fine-tuning BERT on GLUE with R-Drop.

GLUE is a benchmark of eight tasks on English sentences: is a sentence grammatical, does one follow from another, how
similar are two? Here a pretrained BERT of KerasHub is fine-tuned on one of them with R-Drop, as in section 3.2 of the
paper, then scored as GLUE does, exported and loaded again. R-Drop is the one line that wraps it:

    model = rdrop_keras.RDropModel(classifier, alpha=0.5)

To install what it needs, in a copy of the repository, and to run it (on every backend `tf.data` needs TensorFlow):

    python -m pip install ".[tensorflow,tasks]"
    python examples/glue.py --task rte
    python examples/glue.py --task rte --small --data FOLDER

The second command downloads data with tensorflow-datasets and weights with KerasHub. The third needs no network: it
trains a small BERT from scratch, on tables in a folder of yours.
"""

import argparse
import collections
import csv
import gzip
import pathlib
import re

import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from scipy import stats
from sklearn import metrics

import rdrop_keras

# The columns of each task's texts, and its number of classes. One class stands for a number to predict.
TASKS = {
    "cola": (["sentence"], 2),
    "mnli": (["premise", "hypothesis"], 3),
    "mrpc": (["sentence1", "sentence2"], 2),
    "qnli": (["question", "sentence"], 2),
    "qqp": (["question1", "question2"], 2),
    "rte": (["sentence1", "sentence2"], 2),
    "sst2": (["sentence"], 2),
    "stsb": (["sentence1", "sentence2"], 1),
}
PRESET = "bert_base_en"  # Any BERT or RoBERTa of KerasHub, such as "roberta_base_en".
ALPHA = 0.5  # The paper chooses among 0.1, 0.5 and 1 for each task.
EPOCHS = 3
BATCH_SIZE = 32  # Of all devices together.
LEARNING_RATE, SMALL_LEARNING_RATE = 3e-5, 3e-4  # SMALL is the model of `--small`.
SEQUENCE_LENGTH = 128
SEED = 0
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512, "dropout": 0.1}


# ## The data
#
# A split is its texts, a tuple of one list of strings or two, and its labels. With `--data` it is a table in a folder:
# `train.tsv`, and `validation.tsv` or `dev.tsv`, perhaps gzipped. The first line of a table names its columns, which
# are separated by tabs: those of the task's texts and `label`, for STS-B `score`. To train on five classes of your own,
# add a line to `TASKS`, such as `"mine": (["text"], 5)`, and give the folder of your tables, with labels from 0 to 4.
def load_data(task, folder=None):
    """`(texts, labels)` of the training and of the validation split."""
    columns, num_classes = TASKS[task]
    splits = []
    for split in ("train", "validation_matched" if task == "mnli" and folder is None else "validation"):
        label = "score" if num_classes == 1 and folder is not None else "label"
        if folder is None:
            rows = list(tfds.as_numpy(tfds.load(f"glue/{task}", split=split)))
        else:
            rows = read_table(folder, split, [*columns, label])
        texts = tuple([tf.compat.as_text(row[column]) for row in rows] for column in columns)
        labels = np.array([row[label] for row in rows], "float32" if num_classes == 1 else "int32")
        if num_classes > 1 and not np.isin(labels, range(num_classes)).all():
            raise ValueError(f"Labels of {task} must be classes from 0 to {num_classes - 1}, in the {split} split.")
        splits.append((texts, labels))
    return splits


def read_table(folder, split, columns):
    stems = ("validation", "dev") if split == "validation" else (split,)
    names = [f"{stem}.tsv{ending}" for stem in stems for ending in ("", ".gz")]
    path = next((path for path in (pathlib.Path(folder, name) for name in names) if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"--data must be a folder with one of {', '.join(names)}. Received: {folder}")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if not set(columns) <= set(reader.fieldnames or []):
            raise ValueError(f"{path} must have columns {', '.join(columns)}. Received: {reader.fieldnames}.")
        return list(reader)


# ## Batches
#
# The batches hold raw strings, which the KerasHub task tokenizes while it trains. It never shuffles what it is given,
# so we shuffle here, anew in each epoch. All batches are full, so that several devices can split them evenly. Training
# leaves out the rows that remain. Evaluation fills its last batch with rows of weight 0.
def make_batches(texts, labels, training):
    rows = tf.data.Dataset.from_tensor_slices((texts, labels))
    if training:
        return rows.shuffle(len(labels), seed=SEED).batch(min(BATCH_SIZE, len(labels)), drop_remainder=True)
    missing = -len(labels) % BATCH_SIZE
    weights = np.array([1 + missing / len(labels)] * len(labels) + [0] * missing, "float32")  # Their mean is 1.
    rows = tf.data.Dataset.zip(rows.repeat(), tf.data.Dataset.from_tensor_slices(weights))
    return rows.map(lambda row, weight: (*row, weight)).batch(BATCH_SIZE)


# ## The classifier
#
# This is the KerasHub task that you would train without R-Drop. R-Drop needs dropout, and this BERT comes with a rate
# of 0.1. `rdrop_keras.with_dropout` gives dropout to a model that comes without.
def build_classifier(task, texts=None):
    """The task of `PRESET`, or a small one from scratch that knows the words of `texts`."""
    _, num_classes = TASKS[task]
    if texts is None:
        preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(PRESET, sequence_length=SEQUENCE_LENGTH)
        return keras_hub.models.TextClassifier.from_preset(PRESET, num_classes=num_classes, preprocessor=preprocessor)
    words = collections.Counter(re.findall(r"\w+|[^\w\s]", " ".join(map(" ".join, texts)).lower()))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word for word, _ in words.most_common(8_000))]
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=True)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=SEQUENCE_LENGTH)
    backbone = keras_hub.models.BertBackbone(len(vocabulary), max_sequence_length=SEQUENCE_LENGTH, **SMALL)
    return keras_hub.models.BertTextClassifier(backbone, num_classes, preprocessor, dropout=SMALL["dropout"])


# ## R-Drop
#
# We wrap the task, and compile the wrapper as we would compile the task. The loss also tells how R-Drop compares its
# two passes: by the KL divergence for classes, by the squared difference for the numbers of STS-B.
def build_model(classifier, alpha, num_steps, learning_rate):
    model = rdrop_keras.RDropModel(classifier, alpha=alpha)
    schedule = keras.optimizers.schedules.PolynomialDecay(learning_rate, num_steps, end_learning_rate=0.0)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    if classifier.num_classes == 1:
        model.compile(optimizer, "mean_squared_error")
    else:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, weighted_metrics=["accuracy"])
    return model


# ## The scores
#
# GLUE scores CoLA by Matthews correlation, MRPC and QQP also by F1, STS-B by correlations, and the rest by accuracy.
def score(task, labels, outputs):
    if outputs.shape[1] == 1:
        outputs = outputs[:, 0]
        return {"Pearson": stats.pearsonr(labels, outputs)[0], "Spearman": stats.spearmanr(labels, outputs)[0]}
    classes = outputs.argmax(axis=1)
    if task == "cola":
        return {"Matthews": metrics.matthews_corrcoef(labels, classes)}
    f1 = {"F1": metrics.f1_score(labels, classes)} if task in ("mrpc", "qqp") else {}
    return {"accuracy": metrics.accuracy_score(labels, classes), **f1}


# ## Training on one device or several
#
# On TensorFlow the model is made in the scope of a strategy; several workers, which find each other by the variable
# `TF_CONFIG`, all run this program. On JAX one line, before the model is made, lets all devices share each batch.
# `BackupAndRestore` keeps the state of training: after an interruption the same command goes on. Of several workers the
# first writes, to a place where all can read. `tensorboard --logdir runs` shows the curves.
STRATEGIES = {
    "none": tf.distribute.get_strategy,
    "mirrored": tf.distribute.MirroredStrategy,
    "multiworker": tf.distribute.MultiWorkerMirroredStrategy,
    "tpu": lambda: tf.distribute.TPUStrategy(tf.distribute.cluster_resolver.TPUClusterResolver.connect()),
}


def main():
    parser = argparse.ArgumentParser(description="Fine-tunes BERT on a task of GLUE with R-Drop.")
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    parser.add_argument("--data", metavar="FOLDER", help="of tables, in place of tensorflow-datasets")
    parser.add_argument("--small", action="store_true", help="a small model from scratch, in place of the preset")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, 0 for none (%(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="(%(default)s)")
    parser.add_argument("--strategy", choices=STRATEGIES, default="none", help="on TensorFlow; JAX uses all devices")
    parser.add_argument("--output", default="runs", metavar="FOLDER", help="for what is written (%(default)s)")
    args = parser.parse_args()
    if not 0 <= args.alpha < float("inf"):
        parser.error(f"--alpha must be a number ≥ 0. Received: {args.alpha}")
    keras.utils.set_random_seed(SEED)
    strategy = STRATEGIES[args.strategy]()
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    is_first = not getattr(strategy.cluster_resolver, "task_id", 0)
    output = f"{args.output}/{args.task}"
    train, validation = load_data(args.task, args.data)
    train_batches, validation_batches = make_batches(*train, training=True), make_batches(*validation, training=False)
    learning_rate = SMALL_LEARNING_RATE if args.small else LEARNING_RATE
    with strategy.scope():
        classifier = build_classifier(args.task, train[0] if args.small else None)
        model = build_model(classifier, args.alpha, args.epochs * len(train_batches), learning_rate)

    save_freq = "epoch" if is_first else 10**9  # The others never come to save.
    callbacks = [keras.callbacks.BackupAndRestore(f"{output}/backup", save_freq, delete_checkpoint=is_first)]
    callbacks += [keras.callbacks.TensorBoard(f"{output}/logs")] if is_first else []
    model.fit(train_batches, validation_data=validation_batches, epochs=args.epochs, callbacks=callbacks)
    texts, labels = validation
    outputs = model.predict(validation_batches)[: len(labels)]
    for name, value in score(args.task, labels, outputs).items():
        print(f"{args.task} {name}: {value:.4f}")

    # The SavedModel takes tokens, all as integers. On other backends we save the KerasHub task, tokenizer included.
    if is_first and keras.backend.backend() == "tensorflow":
        model.export(f"{output}/served", verbose=False)
        tokens = classifier.preprocess_samples(tuple(column[:2] for column in texts))
        tokens = {name: np.array(value, "int32") for name, value in tokens.items()}
        served = tf.saved_model.load(f"{output}/served")
        print("By the model and its SavedModel:", outputs[:2], served.serve(tokens).numpy())
    elif is_first:
        classifier.save(f"{output}/classifier.keras")
        loaded = keras.models.load_model(f"{output}/classifier.keras", compile=False)
        print("By the model and the loaded one:", outputs[:2], loaded.predict(validation_batches, verbose=0)[:2])


if __name__ == "__main__":
    main()
