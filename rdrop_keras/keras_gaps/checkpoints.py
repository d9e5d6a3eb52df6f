"""Files of a model that are whole or not there: a kill or a full disk in the middle of a save leaves the one before."""

import contextlib
import math
import os
import re

# HDF5 keeps about that much for each array, beside its values.
_OVERHEAD = 4096


@contextlib.contextmanager
def replacing(filepath, suffix, overwrite, variables):
    """Gives the path to write to; when that is done without an error, it takes the place of `filepath`.

    What is no local file ending in `suffix`, and what Keras is to ask about or refuse first, is written as it is.

    Args:
        filepath: Where the file is to be.
        suffix: What Keras wants it to end in.
        overwrite: Whether it may exist.
        variables: What is to be written.

    Raises:
        OSError: If there is no room for `variables`. HDF5, which finds out while it writes, may end the process.
    """
    path = os.path.realpath(filepath) if "://" not in str(filepath) else ""
    if not path.endswith(suffix) or os.path.isdir(path) or (os.path.exists(path) and not overwrite):
        yield filepath
        return
    # The number of the process: of several that write one file, each writes a whole one.
    partial = f"{path.removesuffix(suffix)}.partial-{os.getpid()}{suffix}"
    try:
        if hasattr(os, "posix_fallocate"):
            with open(partial, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, sum(map(_size, variables)))
        yield partial
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(partial)
        raise


def _size(variable):
    """About the bytes of `variable` in a file."""
    bits = re.search(r"\d+", variable.dtype)  # "float32", "bfloat16", "float8_e4m3fn"; "bool" has none.
    return math.prod(variable.shape) * (int(bits[0]) if bits else 8) // 8 + _OVERHEAD
