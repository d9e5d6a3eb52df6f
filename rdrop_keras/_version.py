"""The version of the package, and the versions of Keras with which it is tested.

It is imported before `keras_private`, so that an untested Keras gets the warning even if private names are missing.
"""

import warnings

import keras

__version__ = "0.1.0"

# Minor versions of Keras. `setup.cfg` requires the oldest.
OLDEST, NEWEST = (3, 14), (3, 15)


def check_version() -> None:
    """Warns if the installed Keras is older or newer than what is tested."""
    minor = tuple(int(part) for part in keras.__version__.split(".")[:2])
    if OLDEST <= minor <= NEWEST:
        return
    oldest, newest = ("{}.{}".format(*version) for version in (OLDEST, NEWEST))
    remedy = (
        "Upgrade it"
        if minor < OLDEST
        else "If training fails or differs from what you expect, upgrade rdrop_keras or install a tested Keras"
    )
    warnings.warn(
        f"rdrop_keras is tested with Keras {oldest} to {newest}, and Keras {keras.__version__} is installed. "
        f"{remedy}: pip install 'keras>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'.",
        stacklevel=2,
    )


check_version()
