"""Cross-entropy and KL divergence of the same logits, from one reading of them.

Over the many words of a language model, a step's time goes to reading and writing tensors as large as its logits. Each
apart, cross-entropy and divergence take a softmax of every pass and differentiate through it; here they share the
softmax, and have one gradient, which is written out.

Comes in: targets, and the logits of all passes. Goes out: both values for each element of the batch. Called by: the
objective, where the compiled loss is Keras's categorical or sparse categorical cross-entropy from logits.
"""

import keras
from keras import ops

from rdrop_keras import divergences


def reads_together(loss, divergence, output):
    """Whether `crossentropy_and_kl` computes what `loss` and `divergence` do of an `output` of shape `(batch, …)`."""
    if type(loss) not in (keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy):
        return False
    config, rank = loss.get_config(), len(output.shape)
    axes = {config.get("axis", -1), -1 if divergence.axis is None else divergence.axis}
    return bool(
        config["from_logits"]
        and divergence.name == "kl"
        and divergence.from_logits
        and axes <= {-1, rank - 1}
        and rank > 1
        and output.shape[-1] != 1
    )


def crossentropy_and_kl(loss, y_true, passes):
    """The mean over passes of the values of `loss`, and the divergence `"kl"` between passes, of each element.

    With log-probabilities l_i of m passes, P_i = exp l_i, l̄ and P̄ their means over passes, ⟨·⟩ a sum over classes and
    y the probabilities that are the target,

        C = −1/m · Σ_i ⟨y l_i⟩                D = 1/(m−1) · Σ_i ⟨(P_i − P̄) (l_i − l̄)⟩

    D is the mean over pairs of ½(KL + KL) (Eq. 2 of the paper), in linear time. With d_i = l_i − l̄ − ⟨P_i (l_i − l̄)⟩,

        ∂C/∂z_i = 1/m · (⟨y⟩ P_i − y)         ∂D/∂z_i = 1/(m−1) · (P_i (1 + d_i) − P̄)

    Args:
        loss: A `CategoricalCrossentropy` or `SparseCategoricalCrossentropy` from logits, with its own label smoothing
            and `ignore_class`; elements of that class have 0.
        y_true: Its targets, of shape `(batch, …)` or `(batch, …, classes)`.
        passes: The logits z_i of each pass, of shape `(batch, …, classes)`.

    Returns:
        Two tensors of shape `(batch, …)`, in float32 or wider.
    """
    config = loss.get_config()
    passes = [ops.cast(logits, keras.backend.result_type(logits.dtype, "float32")) for logits in passes]
    if isinstance(loss, keras.losses.CategoricalCrossentropy):
        target = _Probabilities(y_true, passes[0], config["label_smoothing"])
    else:
        target = _Classes(y_true, passes[0], config["ignore_class"])
    values = _values(target, *passes)
    return target.counted(values[0]), values[1]


def _values(target, *passes):
    num_passes = len(passes)

    @ops.custom_gradient
    def values(*passes):
        logs = [ops.log_softmax(logits) for logits in passes]
        crossentropy = -sum(target.dot(log) for log in logs) / num_passes
        logs = [ops.maximum(log, divergences.MINUS_INFINITY) for log in logs]
        mean = sum(logs) / num_passes
        probabilities = [ops.exp(log) for log in logs]
        shared = sum(probabilities) / num_passes
        terms = [_dot(p - shared, log - mean) for p, log in zip(probabilities, logs)]
        divergence = ops.maximum(sum(terms), 0.0) / (num_passes - 1)  # Rounding may leave less than 0.

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream  # PyTorch gives it by name, after the logits.
            of_target = ops.expand_dims(upstream[0], -1) / num_passes
            of_divergence = ops.expand_dims(upstream[1], -1) / (num_passes - 1)
            probabilities = [ops.exp(log) for log in logs]  # Anew, rather than kept until now.
            shared = of_divergence / num_passes * sum(probabilities)
            slope = target.total() * of_target + of_divergence

            def of_pass(p, difference):
                difference = difference - ops.expand_dims(_dot(p, difference), -1)
                return target.subtract(of_target, p * (slope + of_divergence * difference) - shared)

            return tuple(of_pass(p, log - mean) for p, log in zip(probabilities, logs))

        return ops.stack([crossentropy, divergence]), gradient

    return values(*passes)


def _dot(a, b):
    """⟨a b⟩, without writing the products."""
    return ops.einsum("...c,...c->...", a, b)


class _Classes:
    """Targets that are classes."""

    def __init__(self, y_true, logits, ignored):
        if len(y_true.shape) == len(logits.shape):  # As Keras, which takes `(batch, …, 1)` too.
            y_true = ops.squeeze(y_true, -1)
        self._counts = None if ignored is None else ops.not_equal(y_true, ops.cast(ignored, y_true.dtype))
        classes = y_true if ignored is None else ops.where(self._counts, y_true, ops.zeros_like(y_true))
        self._classes = ops.expand_dims(ops.cast(classes, "int64" if _on_torch() else "int32"), -1)

    def dot(self, logs):
        return ops.squeeze(ops.take_along_axis(logs, self._classes, axis=-1), -1)

    def total(self):
        return 1.0

    def counted(self, values):
        return values if self._counts is None else ops.where(self._counts, values, ops.zeros_like(values))

    def subtract(self, amount, gradient):
        """`gradient` less `amount` at the target."""
        if _on_torch():
            return gradient.scatter_add_(-1, self._classes, -amount)
        at_target = ops.equal(ops.arange(gradient.shape[-1], dtype=self._classes.dtype), self._classes)
        return ops.where(at_target, gradient - amount, gradient)


class _Probabilities:
    """Targets that are probabilities of the classes."""

    def __init__(self, y_true, logits, smoothing):
        y_true = ops.cast(y_true, logits.dtype)
        if smoothing:
            y_true = y_true * (1.0 - smoothing) + smoothing / logits.shape[-1]
        self._y = y_true

    def dot(self, logs):
        return ops.sum(ops.where(ops.equal(self._y, 0), ops.zeros_like(logs), self._y * logs), axis=-1)

    def total(self):
        return ops.sum(self._y, axis=-1, keepdims=True)

    def counted(self, values):
        return values

    def subtract(self, amount, gradient):
        return gradient - amount * self._y


def _on_torch():
    return keras.backend.backend() == "torch"
