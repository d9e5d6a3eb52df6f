"""RDropModel: a Keras model that trains with R-Drop.

It decides when a step is paired. How the passes are made is in `pairing.py`, the objective in `objective.py`.
"""

import contextlib
import functools
import math
import numbers

import keras
from keras import tree

from rdrop_keras import _keras, divergences, pairing, preprocessing, random_state, stochastic
from rdrop_keras.graph import PairedGraph
from rdrop_keras.objective import RDropLoss


def _preprocessed(method):
    """`keras.Model`'s method, for a KerasHub task with the task's preprocessing of raw inputs before it."""
    plain = getattr(keras.Model, method)

    @functools.wraps(plain)
    def call(self, *args, **kwargs):
        with self._reporting(evaluation=method in ("evaluate", "test_on_batch")):
            if preprocessing.pipeline_class(self.model) is None:
                return plain(self, *args, **kwargs)
            return preprocessing.run(method, self.model, self, args, kwargs)

    return call


@keras.saving.register_keras_serializable(package="rdrop_keras")
class RDropModel(keras.Model):
    """Trains a model with R-Drop: regularized dropout (Liang et al., NeurIPS 2021, arXiv 2106.14448).

    Each batch passes through the model m times with different dropout, layers before the first dropout once, and a
    consistency term pulls the outputs of the passes together:

        L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

    For m = 2 this is half of the paper's Eq. 4: the same α, the same optimum, and the scale of the compiled loss.
    `loss` is the compiled loss with its reduction, weights and masks; `D` (`rdrop_keras.Divergence`) is weighted,
    masked and reduced in the same way, so that α means the same for any batch size, sequence length, padding, number
    of classes, reduction or number of replicas. With several outputs each adds its divergence times its entry in
    `loss_weights`. What layers give to `add_loss`, and weight regularizers, are added once; a layer's own `add_loss`
    should be a mean over the batch, since it sees the rows of all passes.

    In `evaluate`, `predict`, `export` and when called, it is the wrapped model: one pass, dropout off, and `val_loss`
    is the compiled loss alone. A step of `fit` logs

    - `loss`: L, with what layers add;
    - `task_loss`: the mean over passes of the compiled loss;
    - `consistency_loss`: `1/(m(m−1)) · Σ_{i≠j} D`, without α, so that `loss = task_loss + α/m · consistency_loss`;
    - the compiled metrics, of the first pass.

    Args:
        model: The `keras.Model` to train: Sequential, Functional, subclassed, or a KerasHub task, whose raw inputs
            `fit`, `evaluate` and `predict` then take as the task does. It is shared, not copied, and is found again
            under `.model`.
        alpha: α, a number ≥ 0. The paper uses 5 for translation, 1 for language modelling, 0.7 for summarization,
            0.1 to 1 for GLUE and 0.6 for ViT. 0 is plain training, exactly. Defaults to 1.
        divergence: D. `"auto"`, the default, reads it off the compiled loss of each output: `"kl"` for categorical
            cross-entropies, `"bernoulli_kl"` for binary ones, `"mse"` for regression. Or one of these names, `"js"`,
            or a `rdrop_keras.Divergence`; or a dict or list with one of them for each output.
        num_passes: m ≥ 2 (section 4.3 of the paper). Defaults to 2.
        share: What the passes compute once. `"deterministic"`, the default: all layers of a Functional or Sequential
            model, nested ones too, before the first that is random; the passes are the same as without it, and
            `rdrop_keras.sharing` tells what is shared and why. `"nothing"`: the inputs are repeated, as in the paper.
            The name of a layer, `"backbone/pooled_dense"` if nested (or the end of it): all that this layer needs is
            computed once with it, dropout included, and only what follows differs between passes: R-Drop on the head
            of a large encoder, nearly free.
        name: Name of the wrapper.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has an impossible value; if no layer of `model` is random in training, or none after
            the layer `share` names; if `model` was made under another `tf.distribute` strategy; if `model` overrides a
            step of training that the wrapper replaces.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.1), keras.layers.Dense(3)])
    >>> model = rdrop_keras.RDropModel(model, alpha=5.0)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'consistency_loss', 'loss', 'task_loss']
    """

    def __init__(self, model, alpha=1.0, divergence="auto", num_passes=2, share="deterministic", name=None):
        _check_model(model)
        _check_alpha(alpha)
        _check_divergence(divergence)
        _check_num_passes(num_passes)
        check_share(share)
        # The model's own policy, for loss scaling; inputs are left to the model to cast.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        if _keras.strategy_of(model) is not _keras.strategy_of(self):
            raise ValueError(
                "`model` and the RDropModel around it must be made under the same `strategy.scope()`. Received: "
                f"model={model.name!r} made under {_described(_keras.strategy_of(model))}, the RDropModel under "
                f"{_described(_keras.strategy_of(self))}."
            )
        self.alpha = float(alpha)
        self.divergence = divergence
        self.num_passes = int(num_passes)
        self.share = share
        self.model = model
        self.built = model.built
        self._task_loss = keras.metrics.Mean(name="task_loss")
        self._consistency_loss = keras.metrics.Mean(name="consistency_loss")
        # `alpha=0` draws nothing that the model alone would not draw.
        self._torch_seed = random_state.torch_seed() if self.alpha else None
        # By this Keras's trainers (3.15.1) decide whether to pass `training`: the answer is the model's.
        self._call_has_training_arg = _keras.takes_training(model)
        self._evaluating = False
        self._graph = None
        if self.alpha and model.built:
            self._make_graph()
        elif self.alpha and not isinstance(model, keras.Sequential):
            PairedGraph(model, share)  # For its errors: no graph will come of this model, but its layers are not known.

    def call(self, inputs, training=None):
        num_passes = pairing.passes_in_step()
        if num_passes > 1 and self._graph is None and isinstance(self.model, keras.Sequential):
            self.model.build(tuple(inputs.shape))
            self._make_graph()
        if num_passes > 1 and self._graph is not None and self._graph.shares:
            return self._graph(inputs, num_passes, training)
        inputs = pairing.tile(inputs, num_passes)
        outputs = self.model(inputs, training=training) if _keras.takes_training(self.model) else self.model(inputs)
        if num_passes > 1 and self._graph is None:  # Now that all layers exist.
            self._make_graph()
        return outputs

    def stateless_call(self, *args, **kwargs):
        # Keras's JAX trainer (3.15.1) calls `model.call` itself, with no call context: in a model that does not hand
        # `training` on to its layers, dropout stays off. With `alpha=0` the wrapped model is trained just so.
        return super().stateless_call(*args, **kwargs) if self.alpha else self.model.stateless_call(*args, **kwargs)

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, *args, **kwargs):
        """Configures training; see `keras.Model.compile`, whose arguments it takes.

        Raises:
            ValueError: If there is no `loss`, of which R-Drop needs one unless `alpha=0`, or if the divergence of an
                output cannot be told from it.
        """
        objective = None
        if self.alpha:
            if all(leaf is None for leaf in tree.flatten(loss)):
                raise ValueError(
                    "R-Drop needs a compiled `loss`: `compile(optimizer, loss=...)`; without one only `alpha=0` can be "
                    f"trained. Received: loss={loss}."
                )
            objective = RDropLoss(
                loss,
                loss_weights,
                getattr(self, "output_names", None),
                alpha=self.alpha,
                divergence=self.divergence,
                task_loss=self._task_loss,
                consistency_loss=self._consistency_loss,
            )
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        if objective is not None:
            self._compile_loss = objective
            if self.model.built:
                self._make_graph()  # Anew: rates may have changed since the last one.

    def compile_from_config(self, config):
        """Compiles with what `get_compile_config` returned, and makes the optimizer's variables."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, *args):
        if not self.alpha:
            return super().train_step(*args)
        with pairing.paired_step(self.num_passes), random_state.drawing_from(self._torch_seed):
            return super().train_step(*args)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        num_passes = pairing.passes_in_step()
        if num_passes > 1:
            y_pred = pairing.split(y_pred, num_passes)[0]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    @property
    def metrics(self):
        metrics = super().metrics
        if self.alpha and not self._evaluating:
            return metrics
        return [metric for metric in metrics if metric not in (self._task_loss, self._consistency_loss)]

    @property
    def output_names(self):
        return self.model.output_names

    fit = _preprocessed("fit")
    evaluate = _preprocessed("evaluate")
    predict = _preprocessed("predict")
    train_on_batch = _preprocessed("train_on_batch")
    test_on_batch = _preprocessed("test_on_batch")
    predict_on_batch = _preprocessed("predict_on_batch")

    def summary(self, line_length=None, positions=None, print_fn=None, **kwargs):
        """Prints `keras.Model.summary`, whose arguments it takes, and a line on what the passes share."""
        super().summary(line_length, positions, print_fn, **kwargs)
        if self._graph is not None:
            (print_fn or print)(f" R-Drop: {self._graph.summary()}")

    def export(self, filepath, *args, **kwargs):
        """Exports the wrapped model alone; see `keras.Model.export`, whose arguments it takes."""
        return self.model.export(filepath, *args, **kwargs)

    def save_own_variables(self, store):
        random_state.save(store, self.model, self._torch_seed)

    def load_own_variables(self, store):
        random_state.load(store, self.model, self._torch_seed)

    def get_config(self):
        return {
            "name": self.name,
            "model": keras.saving.serialize_keras_object(self.model),
            "alpha": self.alpha,
            "divergence": keras.saving.serialize_keras_object(self.divergence),
            "num_passes": self.num_passes,
            "share": self.share,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        nested = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("model", "divergence")
        }
        return cls(**{**config, **nested})

    def _make_graph(self):
        stochastic.check_stochastic(self.model)
        self._graph = PairedGraph(self.model, self.share)

    @contextlib.contextmanager
    def _reporting(self, evaluation):
        """While `evaluation`, the logs are those of the wrapped model."""
        before, self._evaluating = self._evaluating, evaluation
        try:
            yield
        finally:
            self._evaluating = before


# What `keras.Model` does in training and the wrapper does in the model's place.
_REPLACED = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", *preprocessing.METHODS)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    inner = next((layer for layer in _keras.all_layers(model) if isinstance(layer, RDropModel)), None)
    if inner is not None:
        raise ValueError(
            f"`model` is or holds an RDropModel: use the model inside that, its `.model`. Received: {inner.name!r}."
        )
    pipeline = preprocessing.pipeline_class(model)
    for method in _REPLACED:
        known = [getattr(keras.Model, method), getattr(pipeline, method, None)]
        if getattr(type(model), method) not in known:
            raise ValueError(
                f"`{type(model).__name__}` overrides `{method}`, which an RDropModel around it would pass by. Override "
                f"`{method}` in a subclass of RDropModel instead, where `self.model` is the wrapped model."
            )


def _check_alpha(alpha):
    received = f"Received: alpha={alpha!r} ({type(alpha).__name__})."
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"`alpha` must be a number ≥ 0. {received}")
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"`alpha` must be a finite number ≥ 0. {received}")


def _check_divergence(divergence):
    choices = ("auto", *divergences.NAMES)
    for leaf in tree.flatten(divergence):
        if isinstance(leaf, str) and leaf not in choices:
            raise ValueError(
                f"`divergence` must be one of {', '.join(map(repr, choices))}, or a rdrop_keras.Divergence. "
                f"Received: divergence={leaf!r}."
            )
        if not isinstance(leaf, (str, divergences.Divergence)) and (leaf is not None or divergence is None):
            raise TypeError(
                f"`divergence` must be one of {', '.join(map(repr, choices))}, a rdrop_keras.Divergence, or a dict or "
                f"list of these. Received: divergence={leaf!r} ({type(leaf).__name__})."
            )


def _check_num_passes(num_passes):
    received = f"Received: num_passes={num_passes!r} ({type(num_passes).__name__})."
    if isinstance(num_passes, bool) or not isinstance(num_passes, numbers.Integral):
        raise TypeError(f"`num_passes` must be an integer ≥ 2. {received}")
    if num_passes < 2:
        raise ValueError(f"`num_passes` must be an integer ≥ 2. {received}")


def check_share(share):
    """Raises if `share` is no string; whether it names a layer is seen when the graph is made."""
    if not isinstance(share, str):
        raise TypeError(
            "`share` must be 'deterministic', 'nothing' or the name of a layer. "
            f"Received: share={share!r} ({type(share).__name__})."
        )


def _described(strategy):
    return "no strategy" if strategy is None else type(strategy).__name__
