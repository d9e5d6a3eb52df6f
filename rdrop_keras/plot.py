"""Pictures of runs side by side: losses, metrics and consistency over steps and over seconds.

It needs the extra `plot`. It does not use pyplot, so that no display and no global state are involved.

Comes in: histories of `fit`. Goes out: a matplotlib figure. Called by: users.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import keras
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What `fit` returns, or its `.history`.
History: TypeAlias = keras.callbacks.History | Mapping[str, Sequence[float]]

# Okabe and Ito's colours, which the colour-blind can tell apart. Runs also differ in their markers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_MARKERS = "osD^vPX*"
_PANEL_SIZE = (4.2, 2.8)  # Inches.
_LOG_FROM = 8.0  # Panels that span more than this factor get a logarithmic axis: the ends of curves stay legible.
_NOT_METRICS = ("alpha", "consistency_loss", "loss", "seconds", "task_loss")


class Clock(keras.callbacks.Callback):
    """Adds `seconds`, the time since training began, to the logs of each epoch. `compare` draws curves over it."""

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs is not None:
            logs["seconds"] = time.perf_counter() - self._start


def compare(
    histories: Mapping[str, History | Sequence[History]], path: str | os.PathLike[str] | None = None
) -> "Figure":
    """Draws runs next to each other, as the paper's Figure 2 does.

    There is a row of panels for the losses (training dashed, validation solid), for each validation metric and for the
    consistency loss. There is a column over training steps. If every run has `seconds` from the callback `Clock`, there
    is one over seconds too. What the runs do not have is left out. If a run has `task_loss`, it is drawn as the
    training loss, since it is comparable with the loss of plain training. Panels that span more than a factor of 8 get
    a logarithmic axis.

    Args:
        histories: `{name: run}`. A run is what `fit` returns, or its `.history`. It may be a list of these, one for
            each seed, which is drawn as a mean with a band of one standard deviation.
        path: Where to save the picture. The ending chooses the format. By default it is not saved.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ImportError: Without matplotlib.
        TypeError: If `histories` is not a dict of histories.
        ValueError: If it is empty, or the seeds of a run differ in length.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("`plot.compare` needs matplotlib: `pip install rdrop-keras[plot]`.") from error
    if not isinstance(histories, dict):
        raise TypeError(f"`histories` must be a dict from names to runs. Received: {type(histories).__name__}.")
    if not histories:
        raise ValueError("`histories` must have at least one run. Received: an empty dict.")
    runs = {name: _Run(name, run) for name, run in histories.items()}
    metrics = sorted({key for run in runs.values() for key in run.curves if _is_metric(key)})
    trained = any("loss" in run.curves for run in runs.values())
    panels = [
        ("loss (dashed: training)" if trained else "validation loss", [("loss", "--"), ("val_loss", "-")]),
        *((f"validation {key[4:]}", [(key, "-")]) for key in metrics),
    ]
    if any("consistency_loss" in run.curves for run in runs.values()):
        panels.append(("consistency loss", [("consistency_loss", "-")]))
    axes_names = ["training step" if all(run.steps for run in runs.values()) else "epoch"]
    if all("seconds" in run.curves for run in runs.values()):
        axes_names.append("seconds")
    width, height = _PANEL_SIZE
    figure = Figure(figsize=(width * len(axes_names), height * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), len(axes_names), squeeze=False, sharey="row", sharex="col")
    for row, (title, keys) in zip(grid, panels):
        for axes, axis in zip(row, axes_names):
            for i, run in enumerate(runs.values()):
                colour = _COLOURS[i % len(_COLOURS)]
                for key, style in keys:
                    _draw(axes, run, axis, key, style, colour, _MARKERS[i % len(_MARKERS)])
            axes.grid(alpha=0.3)
        row[0].set_ylabel(title)
        drawn = np.concatenate([line.get_ydata() for line in row[0].get_lines()])
        if (drawn > 0).all() and drawn.max() > _LOG_FROM * drawn.min():
            row[0].set_yscale("log")
    for axes, axis in zip(grid[-1], axes_names):
        axes.set_xlabel(axis)
    handles = [line for line in grid[0, 0].get_lines() if not line.get_label().startswith("_")]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


class _Run:
    """The curves of one run: `{key: (seeds, epochs)}`."""

    def __init__(self, name, run):
        seeds = run if isinstance(run, (list, tuple)) else [run]
        logs = [getattr(seed, "history", seed) for seed in seeds]
        if not logs or not all(isinstance(log, dict) and log for log in logs):
            raise TypeError(
                "A run must be a keras.callbacks.History, its `.history`, or a list of these, each with at least one "
                f"epoch. Received: {run!r} for {name!r}."
            )
        lengths = {len(values) for log in logs for values in log.values()}
        if len(lengths) != 1:
            raise ValueError(f"All curves and seeds of a run must have one length. Received: {name!r} with {lengths}.")
        keys = set.intersection(*(set(log) for log in logs))
        curves = {key: np.array([log[key] for log in logs], "float64") for key in keys}
        curves["loss"] = curves.pop("task_loss", curves.get("loss"))
        self.name = name
        self.curves = {key: values for key, values in curves.items() if values is not None}
        self.steps = getattr(seeds[0], "params", None) and seeds[0].params.get("steps")

    def along(self, axis):
        if axis == "seconds":
            return self.curves["seconds"].mean(axis=0)
        epochs = np.arange(1, next(iter(self.curves.values())).shape[1] + 1)
        return epochs * self.steps if axis == "training step" else epochs


def _is_metric(key):
    return key.startswith("val_") and key[4:] not in _NOT_METRICS


def _draw(axes, run, axis, key, style, colour, marker):
    if key not in run.curves:
        return
    x, values = run.along(axis), run.curves[key]
    mean = values.mean(axis=0)
    every = max(1, math.ceil(len(mean) / 8))
    label = None if style == "--" else run.name
    axes.plot(x, mean, style, color=colour, marker=marker, markevery=every, markersize=4, linewidth=1.4, label=label)
    if len(values) > 1:
        deviation = values.std(axis=0, ddof=1)
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.15, linewidth=0)
