"""The current training step, for code that Keras calls in the middle of a step without arguments for our state.

Comes in: the number of passes, from `WrapperModel`. Goes out: a `Step`. Called by: `WrapperModel`, `RDropModel`, the
loss, the metrics and `replicas`.

`_current` and `output_loss._reading` hold such state. They are context variables and not attributes of the model, since
`MirroredStrategy` traces its replicas in threads that take turns, each in the middle of its own step.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

_current: contextvars.ContextVar["Step | None"] = contextvars.ContextVar("rdrop_keras_step", default=None)


@dataclasses.dataclass
class Step:
    """A training step on one replica.

    Attributes:
        num_passes: How often the rows of the batch stand in the outputs of the model.
        called: Whether the model has been called.
        num_rows: The number of rows of the batch that it was called on.
        loss_made: Whether the loss has been computed. If a step computes it again, only the first is logged.
        row_scale: The replica's number of rows as a multiple of the mean over replicas; None if all have the same.
        kept: What the first loss of the step keeps for further losses in it.
    """

    num_passes: int = 1
    called: bool = False
    num_rows: Any = None
    loss_made: bool = False
    row_scale: Any = None
    kept: Any = None


def current() -> Step | None:
    """The current `Step`; None outside of training steps."""
    return _current.get()


@contextlib.contextmanager
def training(num_passes: int = 1) -> Iterator[Step]:
    """Within it, the current step is one of so many passes."""
    made = Step(num_passes)
    token = _current.set(made)
    try:
        yield made
    finally:
        _current.reset(token)
