"""RDropModel: a Keras model that trains with R-Drop.

It decides when a step is paired. How the passes are made is in `pairing.py`, the objective in `objective.py`.
"""

import contextlib
import functools
import warnings

import keras
import numpy as np
from keras import tree

from rdrop_keras import (
    _keras,
    arguments,
    checkpoints,
    multi_worker,
    pairing,
    preprocessing,
    random_state,
    replicas,
)
from rdrop_keras import alpha as alphas
from rdrop_keras.objective import RDropLoss
from rdrop_keras.passes import Passes


def _preprocessed(method):
    """`keras.Model`'s method, for a KerasHub task with the task's preprocessing of raw inputs before it."""
    plain = getattr(keras.Model, method)

    @functools.wraps(plain)
    def call(self, *args, **kwargs):
        with self._reporting(evaluation=method in ("evaluate", "test_on_batch")):
            if preprocessing.pipeline_class(self.model) is None:
                result = plain(self, *args, **kwargs)
            else:
                result = preprocessing.run(method, self.model, self, args, kwargs)
        if method == "fit":
            self._alpha.end_fit()
            self._warn_of_equal_passes(result)
        return result

    return call


# What an RDropModel is made with and keeps. α alone can be assigned.
_FIXED = ("model", "divergence", "num_passes", "every", "dropout_rates", "share")


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
    - `alpha`, if it moves;
    - the compiled metrics, of the first pass.

    `alpha` can be assigned as `optimizer.learning_rate` can: `model.alpha = 2.0` holds from the next step, without a
    new program (on JAX from the next epoch, if it is not assigned through a callback's `self.model`), and is saved with
    the model. All other arguments are fixed. `compile` starts the optimizer anew and leaves α alone: a schedule's step,
    which counts the steps that this `RDropModel` has made, and what a `KLBudget` has found go on.

    Rows of a batch are taken to be independent, but for batch normalization. Where shapes tell that they are not, such
    as for similarities of each row with each, or where a layer is known to draw one number for the whole batch, the
    passes run one after another: exact, and not as fast. `rdrop_keras.sharing` says so. A layer of your own that mixes
    rows without a trace in its shapes, or draws once for all of them, is not seen; `fit` warns if a whole epoch's
    consistency loss was exactly 0. Augmentation layers inside the model are random layers like others: each pass gets a
    view of its own, unless `share` names the last of them.

    Args:
        model: The `keras.Model` to train: Sequential, Functional, subclassed, or a KerasHub task, whose raw inputs
            `fit`, `evaluate` and `predict` then take as the task does. It is shared, not copied, and is found again
            under `.model`.
        alpha: α. A number ≥ 0: the paper uses 5 for translation, 1 for language modelling, 0.7 for summarization, 0.1
            to 1 for GLUE and 0.6 for ViT; 0 is plain training, exactly. Or a `LearningRateSchedule`, or any function
            of `keras.ops` from the training step, an integer tensor that counts plain steps too, to a scalar ≥ 0; where
            it is not, it is taken for 0, and `fit` warns. Or a `KLBudget`. What moves is logged as `alpha`, the mean
            over R-Drop's steps. Defaults to 1.
        divergence: D. `"auto"`, the default, reads it off the compiled loss of each output: `"kl"` for categorical
            cross-entropies, `"bernoulli_kl"` for binary ones, `"mse"` for regression. Or one of these names, `"js"`,
            or a `rdrop_keras.Divergence`; or a dict or list with one of them for each output.
        num_passes: m ≥ 2 (section 4.3 of the paper). Defaults to 2.
        every: k ≥ 1 (section 4.2). Steps 0, k, 2k, … of training are R-Drop's and the others plain, of one pass;
            `consistency_loss` is averaged over the first, `task_loss` over all. Not with `steps_per_execution` above
            1. Defaults to 1.
        dropout_rates: One rate for each pass, from 0 to less than 1 (section 4.4): pass i runs all dropout layers whose
            own rate is above 0 at rate i, attention and recurrent dropout included; at rate 0 it is the full model.
            The passes then run one after another, so that batch normalization sees them one by one. `None`, the
            default, leaves the layers their own rates.
        share: What the passes compute once. `"deterministic"`, the default: all layers of a Functional or Sequential
            model, nested ones too, before the first that is random; the passes are the same as without it, and
            `rdrop_keras.sharing` tells what is shared and why. `"nothing"`: the inputs are repeated, as in the paper.
            The name of a layer, `"backbone/pooled_dense"` if nested (or the end of it): all that this layer needs is
            computed once with it, dropout included, and only what follows differs between passes: R-Drop on the head
            of a large encoder, nearly free.
        name: Name of the wrapper.

    Raises:
        TypeError: If an argument, or an assigned `alpha`, has the wrong type.
        AttributeError: If an argument other than `alpha` is assigned.
        ValueError: If an argument has an impossible value, or `alpha` is changed from or to 0; if no layer of `model`
            is random in training, or none after the layer `share` names; if a recurrent layer with `stateful=True`
            comes after the first dropout; if `model` was made under another `tf.distribute` strategy; if it overrides
            a step of training that the wrapper replaces.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.1), keras.layers.Dense(3)])
    >>> model = rdrop_keras.RDropModel(model, alpha=5.0)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'consistency_loss', 'loss', 'task_loss']
    """

    def __init__(
        self,
        model,
        alpha=1.0,
        divergence="auto",
        num_passes=2,
        every=1,
        dropout_rates=None,
        share="deterministic",
        name=None,
    ):
        arguments.check_model(model, RDropModel)
        alphas.check_alpha(alpha)
        arguments.check_divergence(divergence)
        arguments.check_integer("num_passes", num_passes, least=2)
        arguments.check_integer("every", every, least=1)
        arguments.check_dropout_rates(dropout_rates, num_passes)
        arguments.check_share(share)
        # The model's own policy, for loss scaling; inputs are left to the model to cast.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        arguments.check_strategy(model, self)
        self.divergence = divergence
        self.num_passes = int(num_passes)
        self.every = int(every)
        self.dropout_rates = None if dropout_rates is None else tuple(map(float, dropout_rates))
        self.share = share
        self.model = model
        self.built = model.built
        self._alpha = alphas.make(alpha, self)
        self._plain = self.alpha == 0
        names = ["task_loss", "consistency_loss", *(["alpha"] if self._alpha.moves else [])]
        self._trackers = {name: keras.metrics.Mean(name=name) for name in names}
        # `alpha=0` draws nothing that the model alone would not draw.
        self._torch_seed = None if self._plain else random_state.torch_seed()
        # By this Keras's trainers (3.15.1) decide whether to pass `training`: the answer is the model's.
        self._call_has_training_arg = _keras.takes_training(model)
        self._evaluating = False
        self._warned_of_equal_passes = False
        self._num_steps = 0  # Steps made, by which `every` counts. No variable: it decides which program runs.
        self._paired = True  # Whether the step under way is one of R-Drop.
        self._passes = None if self._plain else Passes(model, share, self.dropout_rates)

    @property
    def alpha(self):
        return self._alpha.given

    @alpha.setter
    def alpha(self, alpha):
        self._alpha.assign(alpha)

    def __setattr__(self, name, value):
        if name in _FIXED and hasattr(self, name):
            raise AttributeError(
                f"`{name}` of an RDropModel is fixed when it is made. Make a new one around the same `.model` and "
                f"compile it: `RDropModel(model.model, {name}=...)` goes on from its weights."
                if name != "model"
                else "`model` of an RDropModel is fixed when it is made. Make a new one around the other model and "
                "compile it: `RDropModel(other, alpha=...)`."
            )
        super().__setattr__(name, value)

    @property
    def weights(self):
        # Those of the wrapped model: α and its step are variables for Keras's programs, as random states are.
        return self.model.weights

    def call(self, inputs, training=None):
        num_passes = pairing.passes_in_step()
        if num_passes == 1:
            return _keras.call(self.model, inputs, training)
        return self._passes(inputs, num_passes, training)

    def stateless_call(self, *args, **kwargs):
        # Keras's JAX trainer (3.15.1) calls `model.call` itself, with no call context: in a model that does not hand
        # `training` on to its layers, dropout stays off. With `alpha=0` the wrapped model is trained just so.
        return self.model.stateless_call(*args, **kwargs) if self._plain else super().stateless_call(*args, **kwargs)

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, *args, **kwargs):
        """Configures training; see `keras.Model.compile`, whose arguments it takes.

        Raises:
            ValueError: If there is no `loss`, of which R-Drop needs one unless `alpha=0`; if the divergence of an
                output cannot be told from it; if `steps_per_execution` is above 1 while `every` is.
        """
        if (isinstance(optimizer, str) and optimizer == "auto") or (isinstance(loss, str) and loss == "auto"):
            raise ValueError(
                "'auto' is for KerasHub's tasks to choose by; an RDropModel around one must be told: "
                "`compile(keras.optimizers.Adam(5e-5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))` "
                f"is what most classifiers choose. Received: optimizer={optimizer!r}, loss={loss!r}."
            )
        objective = None
        if not self._plain:
            if all(leaf is None for leaf in tree.flatten(loss)):
                raise ValueError(
                    "R-Drop needs a compiled `loss`: `compile(optimizer, loss=...)`; without one only `alpha=0` can be "
                    f"trained. Received: loss={loss}."
                )
            objective = RDropLoss(
                loss,
                loss_weights,
                getattr(self, "output_names", None),
                alpha=self._alpha,
                divergence=self.divergence,
                trackers=self._trackers,
            )
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        try:
            self._check_steps_per_execution()
        except ValueError:
            self.compiled = False
            raise
        if objective is not None:
            self._compile_loss = objective
            if self.model.built:
                self._passes.refresh()

    def compile_from_config(self, config):
        """Compiles with what `get_compile_config` returned, and makes the optimizer's variables."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def jax_state_sync(self):
        super().jax_state_sync()
        self._alpha.write()

    def make_train_function(self, force=False):
        self._check_steps_per_execution()
        if self.every == 1 or self._plain:
            super().make_train_function(force)
            return
        if self.train_function is not None and not force:
            return
        functions = {}
        for paired in (True, False):
            # A function of its own each time: JAX would take the program of an equal one from its cache.
            vars(self)["train_step"] = lambda *args: type(self).train_step(self, *args)
            try:
                super().make_train_function(force=True)
            finally:
                del vars(self)["train_step"]
            functions[paired] = self.train_function

        def train_function(*args):
            self._paired = self._num_steps % self.every == 0
            result = functions[self._paired](*args)
            self._num_steps += 1
            return result

        self.train_function = train_function

    def train_step(self, *args):
        if self._plain:
            return super().train_step(*args)
        num_passes = self.num_passes if self._paired else 1
        of_replica = replicas.training_step(self.model, args[-1])
        with pairing.training_step(num_passes), random_state.drawing_from(self._torch_seed), of_replica:
            return super().train_step(*args)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        if y is None and not self._plain:
            raise ValueError(
                "The compiled loss needs targets: `fit(x, y)`, or a dataset of `(x, y)`. Received: no `y`."
            )
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if pairing.in_training_step():
            self._alpha.end_step()
        return loss

    # Private to Keras (3.14 to 3.15.1): the part that `add_loss` and regularizers have in the loss.
    def _aggregate_additional_loss(self, loss):
        return replicas.weigh(super()._aggregate_additional_loss(loss))

    # Private to Keras's trainer for TensorFlow (3.14 to 3.15.1), like the next two; see `multi_worker.py`.
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if iterator is not None and _keras.strategy_of(self) is not None:
            iterator, data_batch = None, multi_worker.batch_specification(iterator)
        super()._maybe_symbolic_build(iterator, data_batch)

    def _make_function(self, step_function, **kwargs):
        return multi_worker.with_local_logs(super()._make_function(step_function, **kwargs), _keras.strategy_of(self))

    @property
    def distribute_strategy(self):
        return multi_worker.strategy_of_step(super().distribute_strategy)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        num_passes = pairing.passes_in_step()
        if num_passes > 1:
            y_pred = pairing.split(y_pred, num_passes)[0]
        return super().compute_metrics(x, y, y_pred, sample_weight)

    @property
    def metrics(self):
        metrics = super().metrics
        if not self._plain and not self._evaluating:
            return metrics
        own = list(self._trackers.values())
        return [metric for metric in metrics if metric not in own]

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
        if self._passes is not None and self._passes.graph is not None:
            (print_fn or print)(f" R-Drop: {self._passes.graph.summary()}")

    def export(self, filepath, *args, **kwargs):
        """Exports the wrapped model alone; see `keras.Model.export`, whose arguments it takes."""
        return self.model.export(filepath, *args, **kwargs)

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Saves as `keras.Model.save`, whose arguments it takes; an existing file is replaced when the new is whole."""
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                "An RDropModel is saved as a `.keras` file, or its weights by `save_weights` as a `.weights.h5` file: "
                "from the older HDF5 format it could not be loaded. `model.model.save(filepath)` saves the trained "
                f"model alone. Received: filepath={str(filepath)!r}."
            )
        if zipped is False:
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
            return
        with checkpoints.replacing(filepath, ".keras", overwrite, self._saved_variables()) as path:
            super().save(path, overwrite=overwrite, zipped=zipped, **kwargs)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """Saves as `keras.Model.save_weights`, whose arguments it takes, and replaces as `save` does."""
        with checkpoints.replacing(filepath, ".weights.h5", overwrite, self._saved_variables()) as path:
            super().save_weights(path, overwrite=overwrite, max_shard_size=max_shard_size)

    def save_own_variables(self, store):
        random_state.save(store, self.model, self._torch_seed)
        store["num_steps"] = np.array(self._num_steps)
        self._alpha.save(store)

    def load_own_variables(self, store):
        random_state.load(store, self.model, self._torch_seed)
        if "num_steps" in set(store.keys()):
            self._num_steps = int(np.array(store["num_steps"]))
        self._alpha.load(store)

    def get_config(self):
        return {
            "name": self.name,
            "model": _uncompiled(keras.saving.serialize_keras_object(self.model)),
            "alpha": keras.saving.serialize_keras_object(self.alpha),
            "divergence": keras.saving.serialize_keras_object(self.divergence),
            "num_passes": self.num_passes,
            "every": self.every,
            "dropout_rates": self.dropout_rates and list(self.dropout_rates),
            "share": self.share,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        nested = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("alpha", "model", "divergence")
        }
        return cls(**{**config, **nested})

    def _check_steps_per_execution(self):
        if self.every > 1 and self.steps_per_execution > 1:
            raise ValueError(
                "With `every` above 1 `steps_per_execution` must be 1: plain steps and R-Drop's are two programs, "
                "between which an execution of several steps cannot choose. "
                f"Received: every={self.every}, steps_per_execution={self.steps_per_execution}."
            )

    def _warn_of_equal_passes(self, history):
        """Warns, once, if in an epoch of `fit` no pass ever differed from another."""
        values = history.history.get("consistency_loss", [])
        steps = history.params.get("steps") or 0
        # With `every` an epoch may have no step of R-Drop, and then it has 0.
        epochs = values if steps >= self.every else [max(values, default=1.0)]
        if not self._warned_of_equal_passes and 0.0 in epochs:
            self._warned_of_equal_passes = True
            warnings.warn(
                "The passes of R-Drop did not differ: `consistency_loss` was exactly 0 in a whole epoch, and training "
                "was plain training at the price of R-Drop. Is the model's randomness off, or drawn once for the whole "
                "batch? A layer of your own should draw for each row. "
                f"`rdrop_keras.stochastic_layers(model)` lists the layers known to be random. Received: {self.name!r}.",
                stacklevel=3,
            )

    def _saved_variables(self):
        optimizer = getattr(self, "optimizer", None)
        return self.variables + (optimizer.variables if optimizer is not None else [])

    @contextlib.contextmanager
    def _reporting(self, evaluation):
        """While `evaluation`, the logs are those of the wrapped model."""
        before, self._evaluating = self._evaluating, evaluation
        try:
            yield
        finally:
            self._evaluating = before


def _uncompiled(config):
    """The configuration of a model without what it was compiled with, of which its RDropModel has no need."""
    if isinstance(config, dict):
        return {key: _uncompiled(value) for key, value in config.items() if key != "compile_config"}
    return list(map(_uncompiled, config)) if isinstance(config, list) else config


def unwrapped(model):
    """The model inside an `RDropModel`, or the `keras.Model` itself."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    return model.model if isinstance(model, RDropModel) else model
