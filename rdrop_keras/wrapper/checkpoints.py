"""Files of a model that are always whole: a kill or a full disk in the middle of a save leaves the file before it.

Comes in: the path that a user gave, and what is to be saved. Goes out: a path to write to, which then replaces the
first. Called by: `save` and `save_weights` of `WrapperModel`.
"""

import contextlib
import math
import os
import re

# About as many bytes HDF5 needs for each array, besides its values.
_OVERHEAD = 4096


@contextlib.contextmanager
def replacing(filepath, suffix, overwrite, variables):
    """Yields the path to write to. If that succeeds, the file written takes the place of `filepath`.

    What is not a local file ending in `suffix`, or what Keras is to ask about or refuse first, is written directly.

    Args:
        filepath: Where the file is to be.
        suffix: The ending that Keras requires.
        overwrite: Whether it may exist.
        variables: What will be written.

    Raises:
        OSError: If there is no room for `variables`. HDF5 would notice only while it writes, and may end the process.
    """
    path = os.path.realpath(filepath) if "://" not in str(filepath) else ""
    if not path.endswith(suffix) or os.path.isdir(path) or (os.path.exists(path) and not overwrite):
        yield filepath
        return
    # With the number of the process, so that several that write to one path each write a whole file.
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
    """About how many bytes `variable` takes in a file."""
    bits = re.search(r"\d+", variable.dtype)  # "float32", "bfloat16", "float8_e4m3fn"; "bool" has none.
    return math.prod(variable.shape) * (int(bits[0]) if bits else 8) // 8 + _OVERHEAD
