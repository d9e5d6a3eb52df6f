"""Files of a model that are always whole: after a kill or on a full disk in the middle of a save, the old file is left.

Comes in: the path that a user gave, and what is to be saved. Goes out: a path to write to. The file written there then
replaces the old one. Called by: `save` and `save_weights` of `WrapperModel`.
"""

import contextlib
import math
import os
import platform
import re
import shutil
import threading
import time
import zlib

# HDF5 needs about so many bytes for a file, and for each array in it, besides the values.
_OVERHEAD = 4096
# There is no way to ask whether a process elsewhere still writes. A file untouched for a day is taken for left over.
_LEFT_OVER_SECONDS = 24 * 3600


@contextlib.contextmanager
def replacing(filepath, suffix, overwrite, variables):
    """Yields the path to write to. If that succeeds, the file written takes the place of `filepath`, with its mode.

    Anything other than a local file ending in `suffix` is written directly, and so is a file that Keras has to ask
    about or refuse first. Files in the same folder that killed processes left in the middle of a save are removed.

    Args:
        filepath: Where the file is to be.
        suffix: The ending that Keras requires.
        overwrite: Whether it may exist.
        variables: What will be written.

    Raises:
        OSError: If there is no room for `variables`. HDF5 would notice only while it writes, and might end the process.
    """
    path = os.path.realpath(filepath) if "://" not in str(filepath) else ""
    exists = os.path.exists(path)
    if not path.endswith(suffix) or os.path.isdir(path) or (exists and not overwrite):
        yield filepath
        return
    _remove_left_over(os.path.dirname(path))
    # Several processes, or threads of one, that write to one path each write a whole file of their own.
    writer = f"{os.getpid()}-{_place()}-{threading.get_native_id()}"
    partial = f"{path.removesuffix(suffix)}.partial-{writer}{suffix}"
    try:
        # Whoever may not read the old file must not read this one, not even while it is written.
        with open(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600 if exists else 0o666), "wb") as file:
            if exists:
                shutil.copystat(path, partial)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, _OVERHEAD + sum(map(_size, variables)))
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


def _place():
    """Eight digits for the place in which a process is known by its number: a host, and on Linux a container."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        container = ""
    return f"{zlib.crc32(f'{platform.node()} {container}'.encode()):08x}"


def _remove_left_over(folder):
    """Removes from `folder` the partial files of processes that are gone."""
    with contextlib.suppress(OSError):  # Keras says best what is wrong with a folder.
        for name in os.listdir(folder):
            writer = re.search(r"\.partial-(\d+)-([0-9a-f]{8})-\d+\.", name)
            if writer and _is_left_over(os.path.join(folder, name), int(writer[1]), writer[2]):
                with contextlib.suppress(OSError):  # Another process may have been faster.
                    os.remove(os.path.join(folder, name))


def _is_left_over(path, process, place):
    if place != _place() or os.name != "posix":
        return time.time() - os.stat(path).st_mtime > _LEFT_OVER_SECONDS
    try:
        os.kill(process, 0)  # Asks whether there is such a process, and does nothing to it.
    except ProcessLookupError:
        return True
    except PermissionError:  # There is one, of another user.
        pass
    return False
