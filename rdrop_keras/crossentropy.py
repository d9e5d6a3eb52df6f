"""Cross-entropy and KL divergence of the same logits, from one reading of them.

With the many words of a language model, most of a step's time goes to reading and writing tensors as large as its
logits. Computed separately, cross-entropy and divergence each take a softmax of every pass and differentiate through
it. Here they share one softmax and one gradient, which is written out in `kl.py`.

Comes in: targets, and the logits of all passes. Goes out: both values for each element of the batch. Called by:
`OutputLoss`, where the compiled loss is Keras's categorical or sparse categorical cross-entropy from logits and the
divergence is `"kl"`. With a loss of one's own, `OutputLoss` takes KL alone.
"""

import keras
from keras import ops

from rdrop_keras import blocks, keras_private, kl
from rdrop_keras.passes import tiling


def reads_together(loss, divergence, output):
    """Whether `crossentropy_and_kl` computes the same as `loss` and `divergence`, for an `output` `(batch, …)`."""
    if type(loss) not in (keras.losses.CategoricalCrossentropy, keras.losses.SparseCategoricalCrossentropy):
        return False
    config = loss.get_config()
    last = (-1, len(output.shape) - 1)
    return bool(config["from_logits"] and config.get("axis", -1) in last and reads_kl(divergence, output))


def reads_kl(divergence, output):
    """Whether `kl_alone` computes the same as `divergence`, for an `output` `(batch, …)`."""
    rank = len(output.shape)
    return bool(
        divergence.name == "kl"
        and divergence.from_logits
        and divergence.axis in (None, -1, rank - 1)
        and rank > 1
        and output.shape[-1] != 1
    )


def kl_alone(logits, num_passes):
    """The divergence `"kl"` alone, `(batch, …)`, of logits as for `crossentropy_and_kl`: for losses of one's own."""
    is_wide = keras.backend.standardize_dtype(logits.dtype) == _wide_dtype(logits)
    if _writes_each_result() and num_passes == 2 and is_wide and blocks.on_processor(logits):
        return kl.of_two_passes(logits)
    return _values_of(_NoTargets(), logits, num_passes)[1]


def with_gradient_written_once(logits):
    """`logits`, for a loss of one's own. On JAX, XLA writes their gradient to memory before it is used.

    Otherwise it would compute all of it once for each of the products that come next, on a processor. See
    `_Classes.joined`.
    """
    if keras.backend.backend() != "jax" or not blocks.on_processor(logits):
        return logits
    import jax.numpy as jnp

    def written(gradient):
        first = jnp.zeros((*gradient.shape[:-1], 1), "int32")
        return jnp.put_along_axis(gradient, first, gradient[..., :1], axis=-1, inplace=False)

    result = kl.differentiable(lambda logits: (logits, written), logits)
    return keras_private.copy_annotations([logits], result, lambda attached: attached[0])


def crossentropy_and_kl(loss, y_true, logits, num_passes):
    """For each element, the mean over passes of the values of `loss`, and the divergence `"kl"` between passes.

    With log-probabilities l_i of m passes, P_i = exp l_i, ⟨·⟩ for a sum over classes, and the target probabilities y,

        C = −1/m · Σ_i ⟨y l_i⟩                ∂C/∂z_i = 1/m · (⟨y⟩ P_i − y)

    The divergence and its gradient are those of `kl.py`. The gradient computes probabilities anew from sums over rows,
    so that nothing as large as the logits is kept for it.

    Args:
        loss: A `CategoricalCrossentropy` or `SparseCategoricalCrossentropy` from logits, with its own label smoothing
            and `ignore_class`. Elements of the ignored class have a cross-entropy of 0.
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
    return target.counted(_values_of(target, logits, num_passes))


def _values_of(target, logits, num_passes):
    """The two values, differentiable with respect to `logits`."""
    if _writes_each_result():
        compute = _in_place
    elif keras.backend.backend() == "tensorflow" and blocks.rows_in_block(logits, num_passes):
        compute = _in_blocks
    else:
        compute = _at_once

    return kl.differentiable(lambda logits: compute(target, num_passes, logits), logits)


def _at_once(target, num_passes, logits):
    """The two values, and the function of their gradient, by operations on whole tensors."""
    passes = tiling.stack(logits, num_passes)
    values, rows = _read(target, passes)

    def gradients(upstream):
        gradient = _Gradient(target, rows, ops.expand_dims(upstream, -1), num_passes)
        return tiling.unstack(target.gradient(gradient, passes))

    return values, gradients


def _in_blocks(target, num_passes, logits):
    """The same on TensorFlow, in blocks of rows, by a compiled program for each block."""
    size = blocks.rows_in_block(logits, num_passes)
    shape, classes = ops.shape(logits), logits.shape[-1]
    passes, target = ops.reshape(logits, (num_passes, -1, classes)), target.rows()
    num_blocks = ops.shape(passes)[1] // size

    def block_of(i):
        return target.part(i * size, size), blocks.rows(passes, i * size, size)

    def read(i):
        part, block = block_of(i)

        def values_and_rows():
            values, rows = _read(part, block)
            return ops.concatenate([values, *(ops.squeeze(each, -1) for each in rows)])

        return blocks.compiled(values_and_rows)

    results = blocks.side_by_side(read, num_blocks, 2 + 3 * num_passes, _wide_dtype(logits))
    kept = ops.expand_dims(results[2:], -1)

    def gradients(upstream):
        upstream = ops.reshape(upstream, (2, -1, 1))

        def gradients_of(i):
            part, block = block_of(i)
            rows, of_block = (blocks.rows(each, i * size, size) for each in (kept, upstream))
            gradient = _Gradient(part, kl.Rows(*ops.split(rows, 3)), of_block, num_passes)
            return part.joined(*blocks.compiled(lambda: part.in_parts(gradient, block)))

        return ops.reshape(blocks.filled(gradients_of, num_blocks, size, passes), shape)

    return ops.reshape(results[:2], (2, shape[0] // num_passes, *shape[1:-1])), gradients


def _in_place(target, num_passes, logits):
    """The same on PyTorch. There each operation writes its result to memory, so results overwrite what is done with."""
    import torch

    passes = logits.reshape(num_passes, -1, logits.shape[-1])
    rows = target.rows()
    num_rows = max(1, passes.shape[1])  # A batch without rows is one block too.
    size = blocks.rows_in_block(logits, num_passes)
    starts = range(0, num_rows, size)

    def block_of(first):
        part = passes[:, first : first + size]
        return rows.part(first, part.shape[1]), _wide(part)

    def values_of(first):
        part, block = block_of(first)
        logs = torch.log_softmax(block, -1)
        crossentropy = part.crossentropy(logs, kl.Rows(0.0, 0.0, None)).mean(0)
        probabilities = logs.clamp_min_(kl.MINUS_INFINITY).exp()
        if num_passes == 2:  # As in `kl.read`.
            from_other = [each[0].sub_(each[1]) for each in (probabilities, logs)]
            divergence = torch.linalg.vecdot(*from_other).mul_(0.5)
        else:
            from_mean = [each.sub_(each.mean(0)) for each in (probabilities, logs)]
            divergence = torch.linalg.vecdot(*from_mean).sum(0).div_(num_passes - 1)
        return torch.stack([crossentropy, divergence.clamp_min_(0.0)])

    values = torch.cat([values_of(first) for first in starts], dim=1)

    def gradients(upstream):
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)  # Logits may be transposed.
        of_passes = result.view_as(passes)
        of_targets, of_divergences = _per_pass(upstream.reshape(2, -1, 1), num_passes)
        for first in starts:
            part, block = block_of(first)
            of_target, of_divergence = (each[first : first + size] for each in (of_targets, of_divergences))
            of_divergence = of_divergence / (num_passes - 1)
            probabilities = torch.softmax(block, -1)
            shared = probabilities.mean(0).mul_(of_divergence)
            differences = block.clamp_min(kl.MINUS_INFINITY)
            differences = differences - differences[0]  # As in `kl.gradient`.
            differences.sub_(differences.mean(0))
            differences.sub_(torch.linalg.vecdot(probabilities, differences).unsqueeze(-1)).mul_(of_divergence)
            differences.add_(part.times_total(of_target) + of_divergence).mul_(probabilities).sub_(shared)
            of_passes[:, first : first + size] = part.subtract_in_place(of_target, differences)
        return result

    return values.reshape(2, -1, *logits.shape[1:-1]), gradients


def _read(target, passes):
    """The two values of `passes`, `(m, …, classes)`, stacked; and the `kl.Rows` for their gradient."""
    logits = _wide(passes)
    divergence, rows = kl.read(logits)
    return ops.stack([ops.mean(target.crossentropy(logits, rows), axis=0), divergence]), rows


class _Gradient:
    """The gradient with respect to the logits, of the two values times `upstream`, `(2, …, 1)`.

    Attributes:
        of_target: What is subtracted at the targets, times y.
    """

    def __init__(self, target, rows, upstream, num_passes):
        self.of_target, self._of_divergence = _per_pass(upstream, num_passes)
        self._of_total = target.times_total(self.of_target)
        self._rows = rows

    def of_probabilities(self, logits):
        """What depends on P_i alone, for logits of shape `(m, …)` and of any classes."""
        logits = _wide(logits)
        of_crossentropy = self._of_total * kl.probabilities(logits, self._rows)
        return of_crossentropy + self._of_divergence * kl.gradient(logits, self._rows)


def _per_pass(upstream, num_passes):
    """Splits `upstream`: the part of C, a mean over passes, for each pass; and that of D, which has its own factor."""
    of_target, of_divergence = ops.unstack(upstream, 2)
    return of_target / num_passes, of_divergence


def _wide(logits):
    return ops.cast(logits, _wide_dtype(logits))


def _wide_dtype(logits):
    return keras.backend.result_type(logits.dtype, "float32")


class _Classes:
    """Targets that are classes, of shape `(…, 1)`. `counts` tells which of them count; None if all do."""

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

    def crossentropy(self, logits, rows):
        """−⟨y l⟩ of each pass, for `logits` of shape `(m, …, classes)`."""
        return ops.squeeze(rows.largest - self.chosen(logits) + rows.log_sum, -1)

    def times_total(self, amount):
        """⟨y⟩ `amount`."""
        return amount

    def counted(self, values):
        """The two values, with cross-entropies of 0 where the target is ignored."""
        if self._counts is None:
            return values
        return ops.where(ops.stack([self._counts, ops.ones_like(self._counts)]), values, ops.zeros_like(values))

    def gradient(self, gradient, passes):
        """The `gradient`, for logits `passes` of shape `(m, …, classes)` and in their type."""
        if keras.backend.backend() == "jax" and blocks.on_processor(passes):
            return self.joined(*self.in_parts(gradient, passes))
        result = gradient.of_probabilities(passes)
        is_target = ops.equal(ops.arange(ops.shape(passes)[-1], dtype=self._classes.dtype), self._classes)
        return ops.cast(ops.where(is_target, result - gradient.of_target, result), passes.dtype)

    def in_parts(self, gradient, passes):
        """The same beside the targets, and at them, `(m, …, 1)`: what `joined` takes."""
        at_target = gradient.of_probabilities(self.chosen(passes)) - gradient.of_target
        return [ops.cast(part, passes.dtype) for part in (gradient.of_probabilities(passes), at_target)]

    def joined(self, beside, at_target):
        """The gradient, with its values at the targets put into what it is beside them.

        On JAX that makes XLA write the gradient to memory first. Otherwise XLA would compute all of it once for each of
        the products that come next. On TensorFlow, too, it is faster than comparing each class with the target, for
        which XLA's program on a processor takes one class at a time.
        """
        classes = self._of_passes(beside)
        if keras.backend.backend() == "jax":
            import jax.numpy as jnp

            return jnp.put_along_axis(beside, classes, at_target, axis=-1, inplace=False)
        import tensorflow as tf

        indices = tf.stack([*tf.meshgrid(*map(tf.range, beside.shape[:-1]), indexing="ij"), classes[..., 0]], axis=-1)
        return tf.tensor_scatter_nd_update(beside, indices, at_target[..., 0])

    def chosen(self, passes):
        """What each of `passes`, `(m, …, classes)`, has at the target, `(m, …, 1)`."""
        classes = self._of_passes(passes)
        if keras.backend.backend() == "tensorflow":  # Keras's function makes some thirty operations of it.
            import tensorflow as tf

            return tf.gather(passes, classes, axis=-1, batch_dims=len(passes.shape) - 1)
        return ops.take_along_axis(passes, classes, axis=-1)

    def subtract_in_place(self, amount, gradient):
        """`gradient`, on PyTorch, less `amount` at the target."""
        at_target = self._of_passes(gradient)
        return gradient.scatter_add_(-1, at_target, (-amount).expand_as(at_target))

    def _of_passes(self, passes):
        """The classes of each pass, `(m, …, 1)`."""
        num_passes = passes.shape[0]
        if _on_torch():
            return self._classes.expand(num_passes, *self._classes.shape)
        return ops.stack([self._classes] * num_passes)

    def rows(self):
        """The same targets, with all axes but that of the classes joined into one."""
        return _Classes(ops.reshape(self._classes, (-1, 1)))

    def part(self, first, size):
        return _Classes(blocks.rows(self._classes, first, size))


class _InOnePart:
    """Targets at which the gradient is computed as it is beside them; see `_Classes.in_parts`."""

    def in_parts(self, gradient, passes):
        return [self.gradient(gradient, passes)]

    def joined(self, gradient):
        return gradient


class _Probabilities(_InOnePart):
    """Targets that are probabilities of the classes, of shape `(…, classes)`."""

    def __init__(self, y):
        self._y = y

    @classmethod
    def of(cls, y_true, logits, smoothing):
        y_true = ops.cast(y_true, _wide_dtype(logits))
        if smoothing:
            num_classes = ops.cast(ops.shape(logits)[-1], y_true.dtype)
            y_true = y_true * (1.0 - smoothing) + smoothing / num_classes
        return cls(y_true)

    def crossentropy(self, logits, rows):
        logs = logits - rows.largest - rows.log_sum
        return -ops.sum(ops.where(ops.equal(self._y, 0), ops.zeros_like(logs), self._y * logs), axis=-1)

    def times_total(self, amount):
        return ops.sum(self._y, axis=-1, keepdims=True) * amount

    def counted(self, values):
        return values

    def gradient(self, gradient, passes):
        return ops.cast(gradient.of_probabilities(passes) - gradient.of_target * self._y, passes.dtype)

    def subtract_in_place(self, amount, gradient):
        return gradient.sub_(amount * self._y)

    def rows(self):
        return _Probabilities(ops.reshape(self._y, (-1, self._y.shape[-1])))

    def part(self, first, size):
        return _Probabilities(blocks.rows(self._y, first, size))


class _NoTargets(_InOnePart):
    """In place of targets where KL is taken alone: a cross-entropy of 0."""

    def crossentropy(self, logits, rows):
        return ops.zeros_like(logits[..., 0])

    def times_total(self, amount):
        return ops.zeros_like(amount)

    def gradient(self, gradient, passes):
        return ops.cast(gradient.of_probabilities(passes), passes.dtype)

    def subtract_in_place(self, amount, gradient):
        return gradient

    def rows(self):
        return self

    def part(self, first, size):
        return self


def _writes_each_result():
    """Whether each operation writes its result to memory, as on PyTorch.

    `torch.compile` fuses operations itself while it is tracing, and would unroll a loop.
    """
    if not _on_torch():
        return False
    import torch

    return not torch.compiler.is_compiling()


def _on_torch():
    return keras.backend.backend() == "torch"
