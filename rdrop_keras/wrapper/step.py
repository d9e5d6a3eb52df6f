"""The current training step, for code that Keras calls in the middle of it without telling it our state.

Comes in: the kind of step, from `WrapperModel.train_step`. Goes out: a `Step`, to the model's call, the loss and the
replicas. Two context variables hold all such state in the package. They are not attributes of the model, since
`MirroredStrategy` traces its replicas in threads that take turns, each in the middle of its own step:

- `_current`, here: Keras calls `Model.call` and the loss by itself.
- `multi_worker._in_step_function`: Keras asks the model for its strategy in many places, one of which needs another.
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
        kind: What `WrapperModel.kind_of_step` returned for it.
        share_of_rows: The replica's rows as a multiple of the mean over replicas; None if all have as many.
        notes: What the parts of the loss leave for the whole.
    """

    kind: object = None
    share_of_rows: object = None
    notes: list[object] = dataclasses.field(default_factory=list)


def current():
    """The current `Step`; None outside of training steps."""
    return _current.get()


@contextlib.contextmanager
def training(kind=None):
    """Within it, the current step is of that kind."""
    token = _current.set(Step(kind))
    try:
        yield
    finally:
        _current.reset(token)
