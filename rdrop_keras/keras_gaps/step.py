"""The training step under way, for code that Keras calls in the middle of it and gives nothing of ours.

Comes in: the kind of step, from `WrapperModel.train_step`. Goes out: a `Step`, to the model's call, the loss and the
replicas. Two context variables hold all state of this sort in the package; both are contexts and not attributes of the
model, since `MirroredStrategy` traces its replicas in threads that take turns, each in the middle of its own step:

- `_current`, here: Keras calls `Model.call` and the loss by itself.
- `multi_worker._in_step_function`: Keras asks the model for its strategy in many places, of which one needs another.
"""

import contextlib
import contextvars
import dataclasses

# The kind of a step that is Keras's own and nothing else, down to the random numbers.
AS_IS = 0

_current = contextvars.ContextVar("rdrop_keras_step", default=None)


@dataclasses.dataclass
class Step:
    """A training step on one replica.

    Attributes:
        kind: What `WrapperModel.kind_of_step` says of it.
        share_of_rows: The replica's rows as a multiple of the mean over replicas; None if all have the same.
        notes: What parts of the loss leave for the whole.
    """

    kind: object = None
    share_of_rows: object = None
    notes: list = dataclasses.field(default_factory=list)


def current():
    """The `Step` under way; None outside of training steps."""
    return _current.get()


@contextlib.contextmanager
def training(kind=None):
    """Within it a step of that kind is under way."""
    token = _current.set(Step(kind))
    try:
        yield
    finally:
        _current.reset(token)
