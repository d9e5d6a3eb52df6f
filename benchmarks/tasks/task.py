"""What a task of `when_it_pays.py` is, and how its outputs are scored."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np
from scipy import stats

SHARED = ("half depth", "head only")  # Variants in which the passes share more than what is deterministic.


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


def splits(train, validation, test):
    """The `data` of a task without weights, from `(x, y)` of each split."""
    return {"train": (*train, None), "validation": (*validation, None), "test": (*test, None)}


def crossentropy(reduction="sum_over_batch_size"):
    """The loss of integer labels and logits."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)


def without_preprocessing(task):
    """The model of a KerasHub task, for inputs that are preprocessed once, before training."""
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
    """Matthews correlation first, then accuracy and the calibration error."""
    from sklearn.metrics import matthews_corrcoef

    return {"Matthews": float(matthews_corrcoef(y, logits.argmax(axis=-1))), **accuracy_and_calibration(y, logits)}


def pearson(y, outputs, weights=None):
    """Pearson's correlation of targets and outputs."""
    return {"Pearson": float(stats.pearsonr(y, outputs[:, 0])[0])}


def perplexity(y, logits, weights):
    """The exponential of the mean cross-entropy of a token."""
    return {"perplexity": float(np.exp(crossentropy("mean_with_sample_weight")(y, logits, weights)))}
