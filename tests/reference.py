"""Independent oracles in float64 NumPy: R-Drop's objective written out as the paper writes it, pair by pair.

Nothing here calls the package or Keras.
"""

import numpy as np


def softmax(a, axis=-1):
    e = np.exp(a - a.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def log_softmax(a, axis=-1):
    a = a - a.max(axis=axis, keepdims=True)
    return a - np.log(np.exp(a).sum(axis=axis, keepdims=True))


def sigmoid(a):
    return np.exp(-np.logaddexp(0, -a))


def softplus(a):
    return np.logaddexp(0, a)


def kl(a, b, axis=-1):
    """KL(P‖Q) of logits."""
    p, q = log_softmax(a, axis), log_softmax(b, axis)
    return (np.exp(p) * (p - q)).sum(axis=axis)


def kl_of_probabilities(p, q, axis=-1):
    return (p * (np.log(p) - np.log(q))).sum(axis=axis)


def bernoulli_kl(a, b, axis=-1):
    """KL of Bernoulli variables with logits a and b, averaged over `axis`."""
    p = sigmoid(a)
    return (p * (softplus(-b) - softplus(-a)) + (1 - p) * (softplus(b) - softplus(a))).mean(axis=axis)


def bernoulli_kl_of_probabilities(p, q, axis=-1):
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=axis)


def mse(a, b, axis=-1):
    return ((a - b) ** 2).mean(axis=axis)


def js(a, b, axis=-1):
    p, q = softmax(a, axis), softmax(b, axis)
    return js_of_probabilities(p, q, axis)


def js_of_probabilities(p, q, axis=-1):
    middle = (p + q) / 2
    return (kl_of_probabilities(p, middle, axis) + kl_of_probabilities(q, middle, axis)) / 2


def mean_over_pairs(divergence, passes, axis=-1):
    """1/(m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j), per element."""
    m = len(passes)
    total = sum(divergence(passes[i], passes[j], axis) for i in range(m) for j in range(m) if i != j)
    return total / (m * (m - 1))


def sparse_cross_entropy(y, a):
    return -np.take_along_axis(log_softmax(a), y[..., None].astype(int), axis=-1)[..., 0]


def sparse_cross_entropy_of_probabilities(y, p):
    return -np.log(np.take_along_axis(p, y[..., None].astype(int), axis=-1)[..., 0])


def cross_entropy(y, a, axis=-1):
    return -(y * log_softmax(a, axis)).sum(axis=axis)


def binary_cross_entropy(y, a):
    return (softplus(a) - y * a).mean(axis=-1)


def binary_cross_entropy_of_probabilities(y, p):
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=-1)


def squared_error(y, a):
    return ((y - a) ** 2).mean(axis=-1)


def absolute_error(y, a):
    return np.abs(y - a).mean(axis=-1)


def reduce(values, reduction, weights=None, mask=None):
    """Keras's reductions. A mask takes elements out of the sum and out of the count."""
    weights = np.ones_like(values) if weights is None else np.broadcast_to(np.asarray(weights, float), values.shape)
    mask = np.ones_like(values) if mask is None else np.asarray(mask, float)
    total = (values * weights * mask).sum()
    if reduction == "sum":
        return total
    if reduction == "mean_with_sample_weight":
        return total / (weights * mask).sum()
    return total / mask.sum()


def objective(passes, y, loss, divergence, alpha, reduction="sum_over_batch_size", weights=None, mask=None, axis=-1):
    """`(L, task loss, consistency loss)` of one output; `loss` and `divergence` are functions of this module."""
    m = len(passes)
    task = sum(reduce(loss(y, p), reduction, weights, mask) for p in passes) / m
    consistency = reduce(mean_over_pairs(divergence, passes, axis), reduction, weights, mask)
    return task + alpha / m * consistency, task, consistency


def gradient(function, x, step=1e-6):
    """Central differences of a scalar function, element by element."""
    x = np.array(x, dtype="float64")
    result = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = function(x)
        x[index] = value - step
        below = function(x)
        x[index] = value
        result[index] = (above - below) / (2 * step)
    return result
