"""Checks of the numbers that users give.

Comes in: the name and value of an argument. Goes out: nothing, or an error that names what was received. Called by:
every function that takes numbers from users.
"""

import math
import numbers

import numpy as np


def is_number(value):
    """Whether `value` is a real number: Python's, NumPy's, or a NumPy array of shape ()."""
    if isinstance(value, np.ndarray) and value.shape == ():
        value = value[()]
    return isinstance(value, numbers.Real) and not isinstance(value, (bool, np.bool_))


def check_number(name, value):
    """Raises if `value` is not a finite number ≥ 0."""
    received = f"Received: {name}={value!r} ({type(value).__name__})."
    if not is_number(value):
        raise TypeError(f"`{name}` must be a number ≥ 0. {received}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number ≥ 0. {received}")


def check_integer(name, value, least):
    """Raises if `value` is not an integer ≥ `least`."""
    received = f"Received: {name}={value!r} ({type(value).__name__})."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer ≥ {least}. {received}")
    if value < least:
        raise ValueError(f"`{name}` must be an integer ≥ {least}. {received}")
