"""The tasks of `when_it_pays.py`: real data, and models that plain training brings to their best within a minute.

Each task is a function of the folder of data (see `README.md` beside this folder) that returns a `Task`. Those that
build on a pretrained encoder also take its folder.
"""

import functools

from tasks.digits import digits
from tasks.images import convolutional, vit
from tasks.sentences import from_scratch, head, upper_layers
from tasks.sequences import language_model, translation
from tasks.task import SHARED, Task, accuracy_and_calibration

__all__ = ["SHARED", "TASKS", "Task", "accuracy_and_calibration"]

# By the name that `--tasks` takes, from the cheapest. All but the digits need `--data`, and GLUE's `--encoder`.
TASKS = {
    "digits-100": functools.partial(digits, 100, False),
    "digits-400": functools.partial(digits, 400, False),
    "digits-50-shifted": functools.partial(digits, 50, True),
    "sst2-head": functools.partial(head, "sst2"),
    "mrpc-head": functools.partial(head, "mrpc"),
    "cola-head": functools.partial(head, "cola"),
    "stsb-head": functools.partial(head, "stsb"),
    "text": from_scratch,
    "conv-2000": functools.partial(convolutional, 2000, False, 32),
    "conv-2000-augmented": functools.partial(convolutional, 2000, True, 16),
    "conv-10000": functools.partial(convolutional, 10_000, False, 16),
    "vit-2000": functools.partial(vit, 2000, False, 32),
    "vit-2000-augmented": functools.partial(vit, 2000, True, 16),
    "vit-10000": functools.partial(vit, 10_000, False, 16),
    "sst2": functools.partial(upper_layers, "sst2"),
    "mrpc": functools.partial(upper_layers, "mrpc"),
    "cola": functools.partial(upper_layers, "cola"),
    "stsb": functools.partial(upper_layers, "stsb"),
    "language-model": language_model,
    "translation": translation,
}
