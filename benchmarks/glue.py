"""Fine-tuning BERT or RoBERTa on the eight tasks of GLUE, plain and with R-Drop.

The paper's second task (its section 3.2): pretrained encoders are fine-tuned with R-Drop, α chosen from 0.1, 0.5 and
1.0 for each task, at dropout 0.1. STS-B, a regression, takes the mean squared difference of the passes in place of the
KL divergence (appendix A.4): `RDropModel` reads that off the compiled loss. Scores are scikit-learn's and SciPy's.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=0.5)

With a network, weights and data are downloaded by KerasHub and tensorflow-datasets:

    python glue.py --task rte
    python glue.py --task stsb --preset roberta_base_en --compare

On tables of your own, `train.tsv`, `validation.tsv` and perhaps `test.tsv` (also `.tsv.gz`), with a line of column
names and then one row a line, separated by tabs: `label` (a class number; `score` for STS-B) and the task's texts, such
as `sentence1` and `sentence2`. The encoder can be a local folder too: a KerasHub preset, or `model.safetensors`,
`config.json` and `vocab.txt` of a BERT of Hugging Face's. `--preset none` trains a small one from scratch:

    python glue.py --task mrpc --data DIR --encoder DIR
    python glue.py --task cola --data DIR --preset none

It needs keras-hub, scikit-learn and SciPy; safetensors for `--encoder`, tokenizers for `--preset none`, and
tensorflow-datasets without `--data`.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib

import keras
import keras_hub
import numpy as np
import sklearn.metrics
from scipy import stats

import experiment
import rdrop_keras
import task_data

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
# The encoder of `--preset none`.
SMALL_ENCODER = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
SMALL_VOCABULARY = 8_000
ENCODER_FILES = ("config.json", "model.safetensors", "vocab.txt")


# ## The tasks
#
# One or two texts, the classes, and the scores that GLUE and the paper report. One class is a regression.
@dataclasses.dataclass
class Task:
    texts: tuple
    num_classes: int
    scores: tuple
    splits: tuple = ("train", "validation")

    @property
    def label(self):
        return "score" if self.num_classes == 1 else "label"


TASKS = {
    "cola": Task(("sentence",), 2, ("Matthews",)),
    "mnli": Task(("premise", "hypothesis"), 3, ("accuracy",), ("train", "validation_matched", "validation_mismatched")),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "F1")),
    "qnli": Task(("question", "sentence"), 2, ("accuracy",)),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "F1")),
    "rte": Task(("sentence1", "sentence2"), 2, ("accuracy",)),
    "sst2": Task(("sentence",), 2, ("accuracy",)),
    "stsb": Task(("sentence1", "sentence2"), 1, ("Pearson", "Spearman")),
}
SCORES = {
    "accuracy": lambda labels, outputs: sklearn.metrics.accuracy_score(labels, outputs.argmax(axis=-1)),
    "F1": lambda labels, outputs: sklearn.metrics.f1_score(labels, outputs.argmax(axis=-1)),
    "Matthews": lambda labels, outputs: sklearn.metrics.matthews_corrcoef(labels, outputs.argmax(axis=-1)),
    "Pearson": lambda labels, outputs: stats.pearsonr(labels, outputs[:, 0]).statistic,
    "Spearman": lambda labels, outputs: stats.spearmanr(labels, outputs[:, 0]).statistic,
}


# ## The data
#
# Texts as tuples of lists of strings, one list or two, and labels as an array.
def load_data(args):
    """`{split: (texts, labels)}`."""
    task = TASKS[args.task]
    if args.data is not None:
        tables = task_data.read_tables(args.data, (task.label, *task.texts))
        tables["train"] = {name: column[: args.train_rows] for name, column in tables["train"].items()}
    else:
        train, validation, *others = task.splits
        splits = {"train": train, "validation": validation, **{split.replace("_", " "): split for split in others}}
        tables = task_data.read_tfds(f"glue/{args.task}", ("label", *task.texts), splits, args.train_rows)
        for table in tables.values():
            table[task.label] = table.pop("label")
    return {
        split: (tuple(table[name] for name in task.texts), read_labels(table[task.label], task, split))
        for split, table in tables.items()
    }


def read_labels(column, task, split):
    if task.num_classes == 1:
        expected, read = "a number", float
    else:
        expected, read = f"a class from 0 to {task.num_classes - 1}", int
    labels = []
    for row, text in enumerate(column, 2):  # The first line has the column names.
        try:
            label = read(text)
        except ValueError:
            label = None
        if label is None or not np.isfinite(label) or (task.num_classes > 1 and not 0 <= label < task.num_classes):
            experiment.fail(f"{split} split, line {row}: expected {expected} as {task.label}. Received: {text}")
        labels.append(label)
    return np.array(labels, "float32" if task.num_classes == 1 else "int32")


# ## Tokens
#
# The preprocessor of the preset, or BERT's with the vocabulary of the encoder or of the training texts.
def load_preprocessor(args, texts):
    """A `keras_hub.models.TextClassifierPreprocessor`."""
    if args.encoder is not None:
        vocabulary = (args.encoder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    elif args.preset == "none":
        vocabulary = train_vocabulary(texts)
    else:
        with failing(args.preset):
            return keras_hub.models.TextClassifierPreprocessor.from_preset(args.preset, sequence_length=args.max_length)
    # A vocabulary without capitals is one of texts in lower case.
    lowercase = not any(word != word.lower() for word in vocabulary if not word.startswith("["))
    tokenizer = keras_hub.models.BertTokenizer(vocabulary, lowercase=lowercase)
    return keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=args.max_length)


@contextlib.contextmanager
def failing(preset):
    """Turns an error of KerasHub's about a preset into one of the command line."""
    try:
        yield
    except ValueError as error:
        experiment.fail(f"--preset {preset} cannot be used as a text classifier: {error}")


def train_vocabulary(texts):
    """WordPieces of the texts, in lower case."""
    from tokenizers import BertWordPieceTokenizer

    trainer = BertWordPieceTokenizer(lowercase=True)
    sentences = (sentence for column in texts for sentence in column)
    trainer.train_from_iterator(sentences, vocab_size=SMALL_VOCABULARY, show_progress=False)
    return sorted(trainer.get_vocab(), key=trainer.get_vocab().get)


def tokenize(preprocessor, texts, labels):
    """The classifier's inputs and its labels, as arrays."""
    x, _ = preprocessor(texts if len(texts) > 1 else texts[0], labels)
    return {name: keras.ops.convert_to_numpy(value) for name, value in x.items()}, labels


# ## The model
#
# KerasHub's classifier for the encoder. Rates of dropout are part of a preset; here they are what `--dropout` says, in
# the encoder and in the classifier's head.
def load_classifier(args, preprocessor):
    """A `keras_hub.models.TextClassifier`."""
    options = {"preprocessor": preprocessor, "num_classes": TASKS[args.task].num_classes, "dropout": args.dropout}
    if args.encoder is not None:
        return keras_hub.models.BertTextClassifier(load_encoder(args), **options)
    if args.preset == "none":
        backbone = keras_hub.models.BertBackbone(
            preprocessor.tokenizer.vocabulary_size(),
            **SMALL_ENCODER,
            dropout=args.dropout,
            max_sequence_length=args.max_length,
        )
        return keras_hub.models.BertTextClassifier(backbone, **options)
    with failing(args.preset):
        backbone = keras_hub.models.Backbone.from_preset(args.preset, dropout=args.dropout)
        return keras_hub.models.TextClassifier.from_preset(args.preset, backbone=backbone, **options)


def load_encoder(args):
    """KerasHub's BERT with the weights of Hugging Face's files."""
    import safetensors.numpy

    backbone = keras_hub.models.BertBackbone.from_preset(str(args.encoder), dropout=args.dropout)
    # KerasHub reads the tensors that it looks for. That no other is left shows that the file is such an encoder.
    tensors = safetensors.numpy.load_file(args.encoder / "model.safetensors")
    sizes = [tensor.size for name, tensor in tensors.items() if not name.endswith("position_ids")]
    if sum(sizes) != backbone.count_params():
        experiment.fail(
            f"--encoder {args.encoder} must have the {backbone.count_params():,} parameters of its config.json as a "
            f"BertBackbone. Received: {sum(sizes):,} in {len(sizes)} tensors"
        )
    return backbone


# ## Training
#
# `run.alpha` is None for plain training. Both compile and fit alike: the cross-entropy of classes, or for STS-B the
# squared error, of which R-Drop takes its divergence.
def train(run, arrays, preprocessor, args):
    task = TASKS[args.task]
    x, y = experiment.whole_batches(args, *arrays["train"])
    with run.scope():
        classifier = load_classifier(args, preprocessor)
        model = experiment.trainable(classifier)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha)
        optimizer = keras.optimizers.AdamW(
            experiment.schedule(args, len(y)), weight_decay=WEIGHT_DECAY, clipnorm=CLIP_NORM
        )
        optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
        if task.num_classes > 1:
            loss, metrics = keras.losses.SparseCategoricalCrossentropy(from_logits=True), ["accuracy"]
        else:
            loss, metrics = keras.losses.MeanSquaredError(), None
        model.compile(optimizer, loss, weighted_metrics=metrics, jit_compile=run.jit_compile)
    model.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=experiment.filled(args, *arrays["validation"]),
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    scores = {}
    for split in arrays:
        if split != "train":
            x, labels = arrays[split]
            rows, *_ = experiment.filled(args, x, labels)
            outputs = model.predict(rows, batch_size=args.batch_size, verbose=run.verbose)[: len(labels)]
            scores.update({f"{split} {name}": float(SCORES[name](labels, outputs)) for name in task.scores})
    return classifier, scores


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), required=True, help="which of GLUE")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of tables, in place of GLUE's own")
    encoder = parser.add_mutually_exclusive_group()
    encoder.add_argument(
        "--preset",
        default="bert_base_en",
        help="of KerasHub's BERT or RoBERTa, or a folder of one; none trains a small one (default: %(default)s)",
    )
    encoder.add_argument(
        "--encoder", type=pathlib.Path, metavar="DIR", help=f"a BERT of Hugging Face's: {', '.join(ENCODER_FILES)}"
    )
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    experiment.add_flags(parser, alpha=0.5, dropout=0.1, epochs=3, batch_size=32, learning_rate=3e-5)
    args = experiment.parse(parser)
    experiment.check_least(parser, args, max_length=4)
    if args.preset == "none" and args.encoder is None and args.num_workers > 1:
        parser.error(
            "--preset none is for one worker: each would train a vocabulary of its own. Give --encoder or a preset"
        )
    if args.encoder is not None:
        missing = [name for name in ENCODER_FILES if not (args.encoder / name).is_file()]
        if missing:
            parser.error(
                f"--encoder must be a folder with {', '.join(ENCODER_FILES)}. Missing: {args.encoder / missing[0]}"
            )
        kind = json.loads((args.encoder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "bert":
            parser.error(f"--encoder must be of model_type bert in its config.json. Received: {kind}")
    return args


def main():
    args = parse_arguments()
    scope = experiment.prepare(args)
    data = load_data(args)
    sizes = ", ".join(f"{split} {len(labels):,}" for split, (_, labels) in data.items())
    print(f"GLUE {args.task}. Rows: {sizes}")
    preprocessor = load_preprocessor(args, data["train"][0])
    arrays = {split: tokenize(preprocessor, *rows) for split, rows in data.items()}
    experiment.run_all(args, scope, lambda run: train(run, arrays, preprocessor, args))


if __name__ == "__main__":
    main()
