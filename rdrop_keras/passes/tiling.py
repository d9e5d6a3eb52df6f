"""Several passes in one tensor: how passes are joined and split again.

Passes lie one after another on axis 0: `(N, …)` becomes `(mN, …)`, all rows of the first pass, then all of the second.
Under `keras.distribution` the passes of a row lie next to each other instead. Each device holds a stretch of axis 0,
and so it keeps its own rows. Otherwise devices would have to exchange rows.

Comes in: tensors of N rows for each pass, or of mN rows. Goes out: tensors of mN rows, or of N rows for each pass.
Called by: the paired graph, `Passes`, the losses, the metrics and `monitor`.
"""

import keras
from keras import ops, tree

from rdrop_keras import keras_private


def tile(tensors, num_passes):
    """Repeats each tensor of a nested structure along axis 0: `(N, …)` to `(mN, …)`; None stays None."""
    if any(tensor is not None and len(tensor.shape) == 0 for tensor in tree.flatten(tensors)):
        raise ValueError(
            "R-Drop repeats the batch, axis 0 of every input. Received: an input of shape (), which has none."
        )
    return concatenate([tensors] * num_passes)


def concatenate(passes):
    """Joins passes, nested structures of `(N, …)` tensors, into one structure of `(mN, …)`; None stays None.

    Keras's masks and cached logits are joined with their tensors. Scalars have no rows: the first pass's are kept.
    """
    if len(passes) == 1:
        return passes[0]

    def join(tensors):
        if tensors[0] is None or len(tensors[0].shape) == 0:
            return tensors[0]
        return keras_private.copy_annotations(tensors, _joined(tensors), _joined)

    flat = [tree.flatten(tensors) for tensors in passes]
    return tree.pack_sequence_as(passes[0], [join(list(tensors)) for tensors in zip(*flat)])


def split(tensors, num_passes):
    """The passes of each tensor of a nested structure: a list of `num_passes` structures of `(N, …)` tensors.

    Keras's masks and cached logits are split with their tensors. What has no rows is given to all passes as it is.
    """

    def parts(tensor):
        if _rows_together():
            stacked = stack(tensor, num_passes)
            return [stacked[i] for i in range(num_passes)]
        return ops.split(tensor, num_passes, axis=0)

    def annotated_parts(tensor):
        if tensor is None or not has_rows(tensor, num_passes):
            return [tensor] * num_passes
        return [
            keras_private.copy_annotations([tensor], part, lambda attached, i=i: parts(attached[0])[i])
            for i, part in enumerate(parts(tensor))
        ]

    flat = [annotated_parts(tensor) for tensor in tree.flatten(tensors)]
    return [tree.pack_sequence_as(tensors, [passes[i] for passes in flat]) for i in range(num_passes)]


def stack(tensor, num_passes):
    """The passes of a tensor of shape `(mN, …)` as one of shape `(m, N, …)`."""
    if _rows_together():
        return ops.moveaxis(ops.reshape(tensor, (-1, num_passes, *tensor.shape[1:])), 1, 0)
    return ops.reshape(tensor, (num_passes, -1, *ops.shape(tensor)[1:]))


def unstack(passes):
    """Undoes `stack`: the tensor of shape `(mN, …)` for `passes` of shape `(m, N, …)`."""
    passes = ops.moveaxis(passes, 0, 1) if _rows_together() else passes
    return ops.reshape(passes, (-1, *ops.shape(passes)[2:]))


def has_rows(tensor, num_passes):
    """Whether axis 0 of `tensor` can hold the rows of `num_passes` passes."""
    return len(tensor.shape) > 0 and (tensor.shape[0] is None or tensor.shape[0] % num_passes == 0)


def _joined(tensors):
    if _rows_together():
        return unstack(ops.stack(tensors))
    return ops.concatenate(tensors, axis=0)


def _rows_together():
    return keras.distribution.distribution() is not None
