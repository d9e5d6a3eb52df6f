"""Parameters of tests that carry a mark."""

import importlib.metadata
import importlib.util

import pytest


def slow(*values, **kwargs):
    """The parameters `values` of a slow test. The same test with others runs without `--slow`."""
    return pytest.param(*values, marks=pytest.mark.slow, **kwargs)


def _version(package):
    """The first two numbers of an installed package's version; infinite ones if there is none."""
    if importlib.util.find_spec(package) is None:
        return (float("inf"),)
    return tuple(map(int, importlib.metadata.version(package).split(".")[:2]))


# TensorFlow 2.21 serves no SavedModel that JAX 0.12 wrote, of no model: "failed to deserialize portable artifact".
serves = pytest.mark.backends("tensorflow", *(["jax"] if _version("jax") < (0, 11) else []))
