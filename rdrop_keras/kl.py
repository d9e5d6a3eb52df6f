"""The KL divergence between passes, from their logits, and its gradient.

Comes in: the logits of m passes in one tensor of shape `(m, …)`. Goes out: the divergence, what is kept of each row of
logits, and the gradient that follows from both. Called by: the divergences, and `crossentropy.py`, which computes the
cross-entropy of the same logits.

Let λ_i be the log-partition of the logits z_i, and P_i = exp(z_i − λ_i). With bars for means over passes and ⟨·⟩ for a
sum over the classes,

    D = 1/(m−1) · Σ_i ⟨(P_i − P̄) e_i⟩                         e_i = z_i − z̄ − (λ_i − λ̄)
    ∂D/∂z_i = 1/(m−1) · (P_i (e_i − ⟨P_i e_i⟩) + P_i − P̄)

D is the mean over pairs of passes of ½(KL + KL), which is Eq. 2 of the paper, computed in time linear in m. Only sums
over rows are kept for the gradient. Given them, the gradient is one elementwise expression of the logits. A compiled
program reads the logits once for it and writes it once. Differences are taken before anything else, so that passes that
hardly differ keep their digits.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from rdrop_keras import blocks

# In place of −inf: finite, so that a class that is impossible in every pass differs by 0 and not by NaN.
MINUS_INFINITY = -1e30


class Rows(NamedTuple):
    """What is kept of each row of logits. All have the logits' shape, with 1 in place of the classes.

    Attributes:
        largest: The largest logit.
        log_sum: log ⟨exp(z_i − largest)⟩. λ_i is `largest + log_sum`. Both are kept, since with large logits the sum
            would lose digits of P_i.
        mean_difference: ⟨P_i e_i⟩.
    """

    largest: Any
    log_sum: Any
    mean_difference: Any


def read(logits, axis=-1):
    """D, of the shape of one pass without its classes, and the `Rows` of `logits`; `axis` is negative."""
    num_passes = logits.shape[0]
    largest = ops.max(logits, axis=axis, keepdims=True)
    log_sum = ops.log(ops.sum(ops.exp(logits - largest), axis=axis, keepdims=True))
    each = list(zip(*(ops.unstack(tensor, num_passes) for tensor in (logits, largest, log_sum))))
    partitions = _each_from_mean([most + of_rest for _, most, of_rest in each])
    differences = _each_from_mean([ops.maximum(z, MINUS_INFINITY) for z, _, _ in each])
    differences = [difference - of_row for difference, of_row in zip(differences, partitions)]
    probabilities = [ops.exp(z - most - of_rest) for z, most, of_rest in each]
    products = [p * e for p, e in zip(probabilities[1:], differences[1:])]
    covariances = [p * e for p, e in zip(_each_from_mean(probabilities), differences)]
    *mean_differences, total = _sums([*products, sum(covariances)], axis)
    # Σ_i e_i = 0, so that Σ_i ⟨P_i e_i⟩ = Σ_i ⟨(P_i − P̄) e_i⟩.
    mean_differences = [total - sum(mean_differences), *mean_differences]
    divergence = ops.maximum(total, 0.0) / (num_passes - 1)  # Rounding may leave less than 0.
    return divergence, Rows(largest, log_sum, ops.expand_dims(ops.stack(mean_differences), axis))


def probabilities(logits, rows):
    """P_i."""
    return ops.exp(logits - rows.largest - rows.log_sum)


def gradient(logits, rows):
    """∂D/∂z_i."""
    p = probabilities(logits, rows)
    differences = _from_mean(ops.maximum(logits, MINUS_INFINITY)) - _from_mean(rows.largest + rows.log_sum)
    return (p * (differences - rows.mean_difference) + _from_mean(p)) / (logits.shape[0] - 1)


def of_logits(logits, axis=-1):
    """D, differentiable."""

    def divergence(logits):
        value, rows = read(logits, axis)
        return value, lambda upstream: ops.expand_dims(upstream, axis) * gradient(logits, rows)

    return differentiable(divergence, logits)


def of_two_passes(logits):
    """D, differentiable, of logits `(2N, …, classes)` on PyTorch, where a processor computes them.

    With d = z_1 − z_2,

        D = ½ ⟨(P_1 − P_2) d⟩                 2 ∂D/∂z_1 = P_1 (d − ⟨P_1 d⟩) + P_1 − P_2

    and z_2's gradient has the other signs. For D, the mean of ⟨P_1 d⟩ and ⟨P_2 d⟩ is taken from d first, so that no
    digits are lost. The gradient is computed together with D, in blocks of rows, and is kept: another softmax would
    take longer.
    """
    import torch

    size = blocks.rows_in_block(logits, 2)
    passes = logits.detach().reshape(2, -1, logits.shape[-1])

    def values_and_gradients():
        values, gradients = passes.new_empty(passes.shape[1]), torch.empty_like(passes)
        for first in range(0, len(values), size):
            z, result = (tensor[:, first : first + size] for tensor in (passes, gradients))
            p = torch.softmax(z, -1)
            # Infinite differences become finite. A class that is impossible in both passes differs by 0.
            difference = (z[0] - z[1]).nan_to_num_(0.0, -MINUS_INFINITY, MINUS_INFINITY)
            means = torch.linalg.vecdot(p, difference.unsqueeze(0)).unsqueeze(-1)
            of_p = p[0] - p[1]
            values[first : first + size] = torch.linalg.vecdot(of_p, difference - means.mean(0)).mul_(0.5)
            torch.addcmul(of_p, p[0], difference - means[0], out=result[0])
            torch.addcmul(of_p.neg_(), p[1], torch.sub(means[1], difference, out=difference), out=result[1])
        return values.clamp_min_(0.0).reshape(-1, *logits.shape[1:-1]), gradients

    def divergence(logits):
        values, *unscaled = values_and_gradients()

        def gradient(upstream):  # In place, so that a second call has to compute what it scales.
            gradients = unscaled.pop() if unscaled else values_and_gradients()[1]
            return gradients.mul_((0.5 * upstream).reshape(-1, 1)).reshape(logits.shape)

        return values, gradient

    return differentiable(divergence, logits)


def differentiable(compute, logits):
    """What `compute(logits)` returns first; second it returns the function of the gradient from what is upstream."""

    @ops.custom_gradient
    def value(logits):
        result, gradient = compute(logits)
        # PyTorch gives what is upstream by name, after the logits.
        return result, lambda *args, upstream=None: gradient(args[0] if upstream is None else upstream)

    return value(logits)


def _sums(tensors, axis):
    """The sum over `axis` of each of `tensors`. On JAX one loop makes all sums, so that XLA writes no tensor down."""
    if keras.backend.backend() != "jax":
        return [ops.sum(tensor, axis=axis) for tensor in tensors]
    from jax import lax

    zero = ops.zeros((), tensors[0].dtype)
    axes = (axis % len(tensors[0].shape),)
    return lax.reduce(tuple(tensors), (zero,) * len(tensors), lambda a, b: tuple(map(ops.add, a, b)), axes)


def _from_mean(passes):
    """Each pass less the mean of all. For two passes that is half of each one's difference from the other."""
    if passes.shape[0] == 2:
        return 0.5 * (passes - ops.flip(passes, axis=0))
    passes = passes - passes[:1]  # The mean is then rounded as a difference is, not as the large passes are.
    # As a sum of slices, so that XLA need not write down what it takes the mean of.
    return passes - sum(passes[i : i + 1] for i in range(passes.shape[0])) / passes.shape[0]


def _each_from_mean(passes):
    """The same for a list."""
    if len(passes) == 2:
        half = 0.5 * (passes[0] - passes[1])
        return [half, -half]
    passes = [each - passes[0] for each in passes]
    mean = sum(passes) / len(passes)
    return [each - mean for each in passes]
