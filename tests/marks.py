"""Parameters of tests that carry a mark."""

import pytest


def slow(*values, **kwargs):
    """The parameters `values` of a slow test. The same test with others runs without `--slow`."""
    return pytest.param(*values, marks=pytest.mark.slow, **kwargs)
