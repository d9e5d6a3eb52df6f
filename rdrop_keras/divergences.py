"""The divergences between passes.

They are pure functions of the passes' outputs. `divergence_of_output.py` decides which output has which divergence.
`output_loss.py` weights and averages the values.

The divergences whose time is linear in m come from one identity. For passes i, j of m, with bars for means over passes,

    1/(m(m-1)) · Σ_{i≠j} ½ (u_i − u_j)(v_i − v_j)  =  1/(m−1) · Σ_i (u_i − ū)(v_i − v̄)  =  cov(u, v),

the sample covariance over passes. The symmetric KL of Eq. 2 of the paper is ½(KL(P‖Q) + KL(Q‖P)) =
½ Σ_c (P_c − Q_c)(log P_c − log Q_c), hence Σ_c cov(P_c, log P_c); a squared difference is 2 cov(x, x).
"""

from collections.abc import Sequence
from typing import Any, Literal, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from rdrop_keras import kl

# The smallest normal float32. No probability below it reaches a logarithm. Keras clips at 1e-7, so that its KL and the
# gradient stop growing at log-ratios of 16.
_TINY = float(np.finfo("float32").tiny)


def _mean(tensors):
    return sum(tensors) / len(tensors)


def _covariance(us, vs):
    """Sample covariance over passes, per element."""
    if len(us) == 2:
        return 0.5 * (us[0] - us[1]) * (vs[0] - vs[1])
    u_mean, v_mean = _mean(us), _mean(vs)
    return sum((u - u_mean) * (v - v_mean) for u, v in zip(us, vs)) / (len(us) - 1)


def _log(probabilities):
    return ops.log(ops.maximum(probabilities, _TINY))


def _probabilities_and_logs(passes, from_logits, axis):
    """Probabilities and their logarithms over `axis`, of each pass."""
    if not from_logits:
        return passes, [_log(p) for p in passes]
    log_ps = [ops.log_softmax(z, axis=axis) for z in passes]
    return [ops.exp(p) for p in log_ps], [ops.maximum(p, kl.MINUS_INFINITY) for p in log_ps]


def _kl(passes, from_logits, axis):
    if from_logits:
        return kl.of_logits(ops.stack(passes), axis if axis < 0 else axis - len(passes[0].shape))
    return ops.sum(_covariance(*_probabilities_and_logs(passes, from_logits, axis)), axis=axis)


def _bernoulli_kl(passes, from_logits, axis):
    # The sum of cov(p, log p) over both outcomes is cov(p, log-odds). p − p̄ is written as p q̄ − q p̄, which keeps its
    # digits where p has rounded to 1.
    if from_logits:
        ps, qs = [ops.sigmoid(z) for z in passes], [ops.sigmoid(-z) for z in passes]
        log_odds = [ops.clip(z, kl.MINUS_INFINITY, -kl.MINUS_INFINITY) for z in passes]
    else:
        ps, qs = passes, [1.0 - p for p in passes]
        log_odds = [_log(p) - _log(q) for p, q in zip(ps, qs)]
    p_mean, q_mean, odds_mean = _mean(ps), _mean(qs), _mean(log_odds)
    terms = [(p * q_mean - q * p_mean) * (odds - odds_mean) for p, q, odds in zip(ps, qs, log_odds)]
    return ops.mean(sum(terms) / (len(passes) - 1), axis=axis)


def _mse(passes, from_logits, axis):
    del from_logits
    return ops.mean(2.0 * _covariance(passes, passes), axis=axis)


def _js(passes, from_logits, axis):
    # With M = (P+Q)/2, s = |log P − log Q| and g = log 2 − log(1 + e^−s):
    # P log P/M + Q log Q/M = (P+Q) g − s min(P, Q). Every pair has an M of its own, so the time is quadratic in m.
    ps, log_ps = _probabilities_and_logs(passes, from_logits, axis)
    total = 0.0
    for i in range(len(passes)):
        for j in range(i):
            s = ops.abs(log_ps[i] - log_ps[j])
            g = -ops.log1p(0.5 * ops.expm1(-s))
            total = total + (ps[i] + ps[j]) * g - s * ops.minimum(ps[i], ps[j])
    return ops.sum(total, axis=axis) / (len(passes) * (len(passes) - 1))


_FUNCTIONS = {"bernoulli_kl": _bernoulli_kl, "js": _js, "kl": _kl, "mse": _mse}
NAMES = tuple(sorted(_FUNCTIONS))
Name: TypeAlias = Literal["bernoulli_kl", "js", "kl", "mse"]


@keras.saving.register_keras_serializable(package="rdrop_keras")
class Divergence:
    """A divergence between the output distributions of m passes, averaged over all ordered pairs of passes.

    `1/(m(m-1)) · Σ_{i≠j} D(P_i ‖ P_j)`, per element of the batch, in float32 or wider. `D` is one of

    - `"kl"`: ½(KL(P‖Q) + KL(Q‖P)) over the class axis (Eq. 2 of the paper);
    - `"bernoulli_kl"`: the same for each of many Bernoulli variables, averaged over the last axis;
    - `"mse"`: the squared difference, averaged over the last axis (appendix A.4, STS-B);
    - `"js"`: the Jensen–Shannon divergence over the class axis.

    All but `"js"` take time linear in m.

    Args:
        name: `"kl"`, `"bernoulli_kl"`, `"mse"` or `"js"`.
        from_logits: Whether the outputs are logits (`True`) or probabilities (`False`). `None`, the default, takes it
            from the compiled loss. `"mse"` does not use it.
        axis: The class axis, or the axis averaged over, counted as in the model's output. `None`, the default, takes
            it from the compiled loss, or −1 if the loss has none.

    Raises:
        ValueError: For an unknown `name`, a `from_logits` that is no bool, or an `axis` of 0.

    Called with the outputs of m passes, a list of tensors of shape `(batch, …)` or one tensor of shape
    `(m, batch, …)`, it returns their divergence, of shape `(batch, …)` without `axis`. It is then an error if
    `from_logits` is needed and not given, if the outputs have no such `axis`, or if there are fewer than two passes or
    two classes.

    Logits may be as large as float32 holds, and may be −inf. A class whose logit is −inf in all passes counts 0. One
    whose logit is −inf in some passes only has an infinite `"kl"` in theory. Its logit is then taken for −1e30, which
    gives a value of that size and no NaN. Logits beyond ±1e30 are not told apart.

    Example:

    >>> logits = keras.ops.array([[[40.0, 0.0, 0.0]], [[0.0, 40.0, 0.0]]])
    >>> divergence = rdrop_keras.Divergence("kl", from_logits=True)
    >>> keras.ops.convert_to_numpy(divergence(logits)).tolist()
    [40.0]
    """

    name: Name
    from_logits: bool | None
    axis: int | None

    def __init__(self, name: Name, from_logits: bool | None = None, axis: int | None = None) -> None:
        if name not in _FUNCTIONS:
            raise ValueError(f"A divergence must be one of {', '.join(map(repr, NAMES))}. Received: name={name!r}.")
        if from_logits is not None and not isinstance(from_logits, bool):
            raise ValueError(f"`from_logits` must be True, False or None. Received: from_logits={from_logits!r}.")
        if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int) or axis == 0):
            raise ValueError(
                f"`axis` must be an integer other than 0, which is the batch, or None. Received: axis={axis!r}."
            )
        self.name = name
        self.from_logits = from_logits
        self.axis = axis

    def __call__(self, outputs: Any) -> Any:
        if self.from_logits is None and self.name != "mse":
            raise ValueError(
                f"Divergence {self.name!r} must know whether the outputs are logits or probabilities. "
                f"Pass `from_logits=True` or `from_logits=False`. Received: {self}."
            )
        if not isinstance(outputs, (list, tuple)):
            outputs = ops.convert_to_tensor(outputs)
            if outputs.shape[0] is None:
                raise ValueError(
                    "The number of passes, axis 0 of a tensor of all, must be known; or give a list with one tensor "
                    f"for each pass. Received: shape={tuple(outputs.shape)}."
                )
            outputs = ops.unstack(outputs, outputs.shape[0])
        passes = [ops.convert_to_tensor(output) for output in outputs]
        if len(passes) < 2:
            raise ValueError(f"A divergence needs the outputs of at least two passes. Received: {len(passes)}.")
        passes = [widened(output) for output in passes]
        if len(passes[0].shape) == 1:
            passes = [ops.expand_dims(output, axis=-1) for output in passes]  # As Keras's losses see one output a row.
        self.check_axis(passes[0].shape)
        axis = -1 if self.axis is None else self.axis
        if self.name in ("js", "kl") and passes[0].shape[axis] == 1:
            raise ValueError(
                f"Divergence {self.name!r} is 0 over a single class. For one sigmoid output a row use 'bernoulli_kl'. "
                f"Received: outputs of shape {tuple(passes[0].shape)} (batch, …), axis={self.axis}."
            )
        return _FUNCTIONS[self.name](passes, self.from_logits, axis)

    def check_axis(self, shape: Sequence[int | None]) -> None:
        """Raises if outputs of `shape`, `(batch, …)`, have no axis `axis` after the batch."""
        rank = max(len(shape), 2)  # One output a row has an axis of its own, as for Keras's losses.
        if self.axis is not None and not 0 < self.axis % rank == self.axis + rank * (self.axis < 0):
            raise ValueError(
                f"`axis` must be one of an output's axes behind the batch, 1 to {rank - 1} or -1 to {1 - rank}. "
                f"Received: axis={self.axis} with an output of shape {tuple(shape)} (batch, …)."
            )

    @property
    def decides(self) -> bool:
        """Whether outputs are decisions. Those of a regression are not."""
        return self.name != "mse"

    def decisions(self, output: Any) -> Any:
        """What each element of `output` decides: the likeliest class, or for `"bernoulli_kl"` yes or no."""
        if self.name == "bernoulli_kl":
            return ops.greater(output, 0.0 if self.from_logits else 0.5)
        return ops.argmax(output, axis=-1 if self.axis is None else self.axis)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"name": self.name, "from_logits": self.from_logits, "axis": self.axis}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Makes a `Divergence` from what `get_config` returned."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Divergence) and type(other) is type(self) and other.get_config() == self.get_config()

    def __hash__(self) -> int:
        return hash((self.name, self.from_logits, self.axis))

    def __repr__(self) -> str:
        return f"Divergence({self.name!r}, from_logits={self.from_logits}, axis={self.axis})"


def widened(output):
    """`output` in float32, or in its own dtype where that is wider."""
    return ops.cast(output, keras.backend.result_type(output.dtype, "float32"))
