"""docs/coming-from-other-code.md: each objective of other code, in float64, is R-Drop's here at the α the page says.

What is compared are the gradients of every logit of both passes, which train the same but for the `scale` of the loss.
Code that takes the cross-entropy of the first pass alone is the same on average over which pass is the first.
"""

import pathlib
import re

import keras
import numpy as np
import pytest

import reference
from models import Passes, gradients_of_step
from rdrop_keras import RDropModel

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "coming-from-other-code.md").read_text(encoding="utf-8")
ROWS, CLASSES, THEIR_ALPHA = 4, 3, 0.7
P, Q = np.random.RandomState(0).normal(size=(2, ROWS, CLASSES), scale=1.5).astype("float32")
Y = np.array([0, 2, 1, 1])


def kl_div(a, b):
    """PyTorch's and Paddle's `kl_div(log_softmax(a), softmax(b), reduction="none")`: KL(b ‖ a), class by class."""
    return reference.softmax(b) * (reference.log_softmax(b) - reference.log_softmax(a))


def cross_entropy(logits):
    return reference.sparse_cross_entropy(Y, logits)


def official_snippet(p, q, alpha, reduce):
    kl_loss = (reduce(kl_div(p, q)) + reduce(kl_div(q, p))) / 2
    return cross_entropy(p).mean() + alpha * kl_loss


def official_bert(p, q, alpha):
    kl_loss = (kl_div(p, q).sum() + kl_div(q, p).sum()) / 2
    return cross_entropy(p).mean() + cross_entropy(q).mean() + alpha * kl_loss


def official_vit(p, q, alpha):
    return cross_entropy(p).mean() + cross_entropy(q).mean() + alpha * (kl_div(p, q).sum() + kl_div(q, p).sum())


def fairseq(p, q, alpha):
    """Sums over the tokens of both passes; the optimizer divides by the number of tokens in the data."""
    tokens = len(Y)
    kl_loss = (kl_div(p, q).sum() + kl_div(q, p).sum()) / 2
    return (cross_entropy(p).sum() + cross_entropy(q).sum() + alpha * kl_loss) / tokens


def bert4keras(p, q, alpha):
    """The batch has every row twice, side by side, and probabilities for outputs."""
    rows = np.stack([p, q], axis=1).reshape(-1, CLASSES)
    probabilities = reference.softmax(rows)
    loss = -np.log(probabilities[np.arange(len(rows)), np.repeat(Y, 2)]).mean()
    even, odd = probabilities[::2], probabilities[1::2]
    kl = reference.kl_of_probabilities(even, odd) + reference.kl_of_probabilities(odd, even)
    return loss + kl.mean() / 4 * alpha


def paddlenlp(p, q, alpha, reduction):
    """Its `RDropLoss`, and `ce_loss + kl_loss * rdrop_coef` of its examples."""
    reduce = {"none": np.sum, "sum": np.sum, "mean": np.mean, "batchmean": lambda x: x.sum() / len(x)}[reduction]
    return cross_entropy(p).mean() + alpha * (reduce(kl_div(p, q)) + reduce(kl_div(q, p))) / 2


def bert4torch(p, q, alpha):
    loss = np.concatenate([cross_entropy(p), cross_entropy(q)]).mean()
    return loss + (kl_div(p, q) + kl_div(q, p)).mean() / 4 * alpha


# The α of the page, as it is written there, the objective, and its scale: the loss is so many times ours.
CASES = {
    "Snippet of the official README, as it stands (`.sum()`)": ("2αN", lambda *a: official_snippet(*a, np.sum), 1),
    "The same, with `.mean()` in place of `.sum()`": ("2α/C", lambda *a: official_snippet(*a, np.mean), 1),
    "The same, with `.sum(-1).mean()`": ("2α", lambda *a: official_snippet(*a, lambda x: x.sum(-1).mean()), 1),
    "Official code for fairseq": ("α", fairseq, 2),
    "Official BERT": ("αN", official_bert, 2),
    "Official ViT": ("2αN", official_vit, 2),
    "bert4keras": ("α", bert4keras, 1),
    "bert4torch": ("α/C", bert4torch, 1),
    'PaddleNLP, `RDropLoss()` or `"sum"`': ("2αN", lambda *a: paddlenlp(*a, "none"), 1),
    'PaddleNLP, `"mean"`': ("2α/C", lambda *a: paddlenlp(*a, "mean"), 1),
    'PaddleNLP, `"batchmean"`': ("2α", lambda *a: paddlenlp(*a, "batchmean"), 1),
}


def alpha_here(formula):
    factor, _, divisor = formula.partition("/")
    value = THEIR_ALPHA * (2 if factor.startswith("2") else 1) * (ROWS if "N" in factor else 1)
    return value / CLASSES if divisor == "C" else value


@pytest.mark.parametrize("name", CASES)
def test_same_objective(name):
    formula, theirs, scale = CASES[name]
    x = keras.Input((1,))
    model = RDropModel(keras.Model(x, Passes([P, Q])(x)), alpha_here(formula))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logs, (slope,) = gradients_of_step(model, np.zeros((ROWS, 1), "float32"), Y)

    def objective(passes):
        p, q = passes
        return (theirs(p, q, THEIR_ALPHA) + theirs(q, p, THEIR_ALPHA)) / 2 / scale

    passes = np.stack([P, Q]).astype("float64")
    assert logs["loss"] == pytest.approx(objective(passes), rel=1e-5)
    expected = reference.gradient(objective, passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_page_says_what_is_tested():
    rows = re.findall(r"^\| (.+?) \| ([^|]+?) \| [^|]+ \|$", PAGE, flags=re.MULTILINE)
    assert {name: formula for name, (formula, _, _) in CASES.items()} == dict(rows[1:])
