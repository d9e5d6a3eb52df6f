"""Cross-entropy and KL divergence of the same logits, from one reading of them.

Over the many words of a language model, a step's time goes to reading and writing tensors as large as its logits. Each
apart, cross-entropy and divergence take a softmax of every pass and differentiate through it; here they share the
softmax, and have one gradient, which is written out.

Comes in: targets, and the logits of all passes. Goes out: both values for each element of the batch. Called by: the
objective, where the compiled loss is Keras's categorical or sparse categorical cross-entropy from logits.
"""

import functools

import keras
from keras import ops

from rdrop_keras import blocks, divergences
from rdrop_keras.passes import tiling


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


def crossentropy_and_kl(loss, y_true, logits, num_passes):
    """The mean over passes of the values of `loss`, and the divergence `"kl"` between passes, of each element.

    With log-probabilities l_i of m passes, P_i = exp l_i, l̄ and P̄ their means over passes, ⟨·⟩ a sum over classes and
    y the probabilities that are the target,

        C = −1/m · Σ_i ⟨y l_i⟩                D = 1/(m−1) · Σ_i ⟨(P_i − P̄) (l_i − l̄)⟩

    D is the mean over pairs of ½(KL + KL) (Eq. 2 of the paper), in linear time. With d_i = z_i − z̄ − ⟨P_i (z_i − z̄)⟩,
    which is also l_i − l̄ − ⟨P_i (l_i − l̄)⟩,

        ∂C/∂z_i = 1/m · (⟨y⟩ P_i − y)         ∂D/∂z_i = 1/(m−1) · (P_i (1 + d_i) − P̄)

    On a processor, rows of many classes are taken block by block. The gradient takes the softmax anew; nothing as large
    as the logits is kept for it.

    Args:
        loss: A `CategoricalCrossentropy` or `SparseCategoricalCrossentropy` from logits, with its own label smoothing
            and `ignore_class`; elements of that class have 0.
        y_true: Its targets, of shape `(batch, …)` or `(batch, …, classes)`.
        logits: The logits z_i of all passes, of shape `(passes · batch, …, classes)`, joined as by `passes.tiling`.
        num_passes: The number of passes, m.

    Returns:
        The two values in a tensor of shape `(2, batch, …)`, in float32 or wider.
    """
    config = loss.get_config()
    if isinstance(loss, keras.losses.CategoricalCrossentropy):
        target = _Probabilities.of(y_true, logits, config["label_smoothing"])
    else:
        target = _Classes.of(y_true, logits, config["ignore_class"])
    size = blocks.rows_in_block(logits, num_passes)
    if _on_torch() and not _is_compiling():
        compute = functools.partial(_in_place, target, num_passes, size)
    elif size is None:
        compute = functools.partial(_at_once, target, num_passes)
    else:
        compute = functools.partial(_in_blocks, target, num_passes, size)

    @ops.custom_gradient
    def values_of(logits):
        values, gradients = compute(logits)

        def gradient(*args, upstream=None):
            return gradients(args[0] if upstream is None else upstream)  # PyTorch gives it by name, after the logits.

        return values, gradient

    return target.counted(values_of(logits))


def _at_once(target, num_passes, logits):
    """The two values, and the function of their gradient, by operations on whole tensors."""
    passes = tiling.stack(logits, num_passes)
    return _values(target, passes), lambda upstream: tiling.unstack(_gradients(target, passes, upstream))


def _in_blocks(target, num_passes, size, logits):
    """The same, in blocks of `size` rows."""
    shape, classes = ops.shape(logits), logits.shape[-1]
    passes, rows = ops.reshape(logits, (num_passes, -1, classes)), target.rows()
    num_blocks = ops.shape(passes)[1] // size

    def values_of(i):
        part, block = rows.part(i * size, size), blocks.rows(passes, i * size, size)
        return blocks.compiled(lambda: _values(part, block))

    def gradients(upstream):
        upstream = ops.reshape(upstream, (2, -1, 1))

        def gradients_of(i):
            part, block = rows.part(i * size, size), blocks.rows(passes, i * size, size)
            upstream_of_block = blocks.rows(upstream, i * size, size)[..., 0]
            return blocks.compiled(lambda: _gradients(part, block, upstream_of_block))

        return ops.reshape(blocks.filled(gradients_of, num_blocks, size, passes), shape)

    values = blocks.side_by_side(values_of, num_blocks, 2, _wide_dtype(logits))
    return ops.reshape(values, (2, shape[0] // num_passes, *shape[1:-1])), gradients


def _in_place(target, num_passes, size, logits):
    """The same on PyTorch, where each operation writes what it computes: over what is not needed any more."""
    import torch

    passes = logits.reshape(num_passes, -1, logits.shape[-1])
    rows = target.rows()
    num_rows = max(1, passes.shape[1])  # A batch without rows is one block too.
    size = size or num_rows
    starts = range(0, num_rows, size)

    def block_of(first):
        part = passes[:, first : first + size]
        return rows.part(first, part.shape[1]), _wide(part)

    def values_of(first):
        part, block = block_of(first)
        logs = torch.log_softmax(block, -1)
        crossentropy = part.dot(logs).mean(0).neg_()
        probabilities = logs.clamp_min_(divergences.MINUS_INFINITY).exp()
        if num_passes == 2:  # As in `_values`.
            from_other = [each[0].sub_(each[1]) for each in (probabilities, logs)]
            divergence = torch.linalg.vecdot(*from_other).mul_(0.5)
        else:
            from_mean = [each.sub_(each.mean(0)) for each in (probabilities, logs)]
            divergence = torch.linalg.vecdot(*from_mean).sum(0).div_(num_passes - 1)
        return torch.stack([crossentropy, divergence.clamp_min_(0.0)])

    values = torch.cat([values_of(first) for first in starts], dim=1)

    def gradients(upstream):
        result = torch.empty_like(logits)
        of_passes = result.view_as(passes)
        of_targets, of_divergences = _shares(upstream.reshape(2, -1, 1), num_passes)
        for first in starts:
            part, block = block_of(first)
            of_target, of_divergence = (each[first : first + size] for each in (of_targets, of_divergences))
            probabilities = torch.softmax(block, -1)
            shared = probabilities.mean(0).mul_(of_divergence)
            differences = block.clamp_min(divergences.MINUS_INFINITY)
            differences = differences - differences[0]  # As in `_gradients`.
            differences.sub_(differences.mean(0))
            differences.sub_(torch.linalg.vecdot(probabilities, differences).unsqueeze(-1)).mul_(of_divergence)
            differences.add_(part.times_total(of_target) + of_divergence).mul_(probabilities).sub_(shared)
            of_passes[:, first : first + size] = part.subtract(of_target, differences)
        return result

    return values.reshape(2, -1, *logits.shape[1:-1]), gradients


def _values(target, passes):
    """The two values, stacked, of `passes` of shape `(m, …, classes)`."""
    num_passes = passes.shape[0]
    logs = ops.log_softmax(_wide(passes))
    crossentropy = -ops.mean(target.dot(logs), axis=0)
    logs = ops.maximum(logs, divergences.MINUS_INFINITY)
    probabilities = ops.exp(logs)
    if num_passes == 2:  # The same, in fewer operations.
        divergence = 0.5 * _dot(*(ops.subtract(*ops.unstack(each)) for each in (probabilities, logs)))
    else:
        from_mean = [each - ops.mean(each, axis=0) for each in (probabilities, logs)]
        divergence = ops.sum(_dot(*from_mean), axis=0) / (num_passes - 1)
    return ops.stack([crossentropy, ops.maximum(divergence, 0.0)])  # Rounding may leave less than 0.


def _gradients(target, passes, upstream):
    """The gradient with respect to `passes`, `(m, …, classes)`, of the two values times `upstream`, `(2, …)`."""
    of_target, of_divergence = _shares(ops.expand_dims(upstream, -1), passes.shape[0])
    wide = _wide(passes)
    probabilities = ops.softmax(wide)
    differences = ops.maximum(wide, divergences.MINUS_INFINITY)
    differences = differences - differences[0]  # So that the mean has the rounding of differences, not of logits.
    differences = differences - ops.mean(differences, axis=0)
    differences = differences - ops.expand_dims(_dot(probabilities, differences), -1)
    slope = target.times_total(of_target) + of_divergence
    gradients = probabilities * (slope + of_divergence * differences) - of_divergence * ops.mean(probabilities, axis=0)
    return ops.cast(target.subtract(of_target, gradients), passes.dtype)


def _shares(upstream, num_passes):
    """What `upstream`, `(2, …)`, is for each pass: ∂/∂z_i of its products with C and D, without their sums over i."""
    of_target, of_divergence = ops.unstack(upstream)
    return of_target / num_passes, of_divergence / (num_passes - 1)


def _wide(logits):
    return ops.cast(logits, _wide_dtype(logits))


def _wide_dtype(logits):
    return keras.backend.result_type(logits.dtype, "float32")


def _dot(a, b):
    """⟨a b⟩, without writing the products where no compiler would leave them out."""
    return ops.sum(a * b, axis=-1) if keras.backend.backend() == "jax" else ops.einsum("...c,...c->...", a, b)


class _Classes:
    """Targets that are classes, of shape `(…, 1)`; `counts` says of which of them the loss is not to be ignored."""

    def __init__(self, classes, counts=None):
        self._classes = classes
        self._counts = counts

    @classmethod
    def of(cls, y_true, logits, ignored):
        if len(y_true.shape) == len(logits.shape):  # As Keras, which takes `(batch, …, 1)` too.
            y_true = ops.squeeze(y_true, -1)
        counts = None if ignored is None else ops.not_equal(y_true, ops.cast(ignored, y_true.dtype))
        classes = y_true if ignored is None else ops.where(counts, y_true, ops.zeros_like(y_true))
        return cls(ops.expand_dims(ops.cast(classes, "int64" if _on_torch() else "int32"), -1), counts)

    def dot(self, logs):
        """⟨y l⟩ of each pass, for `logs` of shape `(m, …, classes)`."""
        classes = self._of_passes(logs)
        if _on_torch():
            chosen = logs.gather(-1, classes)
        elif keras.backend.backend() == "tensorflow":  # Keras's own makes some thirty operations.
            import tensorflow as tf

            chosen = tf.gather(logs, classes, axis=-1, batch_dims=len(logs.shape) - 1)
        else:
            chosen = ops.take_along_axis(logs, classes, axis=-1)
        return ops.squeeze(chosen, -1)

    def times_total(self, amount):
        """⟨y⟩ `amount`."""
        return amount

    def counted(self, values):
        """The two values, with cross-entropies of 0 where the target is ignored."""
        if self._counts is None:
            return values
        return ops.where(ops.stack([self._counts, ops.ones_like(self._counts)]), values, ops.zeros_like(values))

    def subtract(self, amount, gradient):
        """`gradient` less `amount` at the target."""
        if _on_torch():
            at_target = self._of_passes(gradient)
            return gradient.scatter_add_(-1, at_target, (-amount).expand_as(at_target))
        at_target = ops.equal(ops.arange(gradient.shape[-1], dtype=self._classes.dtype), self._classes)
        return ops.where(at_target, gradient - amount, gradient)

    def _of_passes(self, passes):
        """The classes of each pass, `(m, …, 1)`."""
        num_passes = passes.shape[0]
        if _on_torch():
            return self._classes.expand(num_passes, *self._classes.shape)
        return ops.stack([self._classes] * num_passes)

    def rows(self):
        """The same with the batch and all other axes but that of classes as one."""
        return _Classes(ops.reshape(self._classes, (-1, 1)))

    def part(self, first, size):
        return _Classes(blocks.rows(self._classes, first, size))


class _Probabilities:
    """Targets that are probabilities of the classes, of shape `(…, classes)`."""

    def __init__(self, y):
        self._y = y

    @classmethod
    def of(cls, y_true, logits, smoothing):
        y_true = ops.cast(y_true, _wide_dtype(logits))
        return cls(y_true * (1.0 - smoothing) + smoothing / logits.shape[-1] if smoothing else y_true)

    def dot(self, logs):
        return ops.sum(ops.where(ops.equal(self._y, 0), ops.zeros_like(logs), self._y * logs), axis=-1)

    def times_total(self, amount):
        return ops.sum(self._y, axis=-1, keepdims=True) * amount

    def counted(self, values):
        return values

    def subtract(self, amount, gradient):
        return gradient - amount * self._y

    def rows(self):
        return _Probabilities(ops.reshape(self._y, (-1, self._y.shape[-1])))

    def part(self, first, size):
        return _Probabilities(blocks.rows(self._y, first, size))


def _is_compiling():
    """Whether `torch.compile` is reading along, which fuses operations itself and would unroll a loop."""
    import torch

    return torch.compiler.is_compiling()


def _on_torch():
    return keras.backend.backend() == "torch"
