"""RDropModel: a Keras model that trains with R-Drop.

Comes in: what the user gives, and the batches of `fit`. Goes out: a trained model and its logs. This module decides
which steps are steps of R-Drop, and what they log. The passes are made in `passes`, and the objective in
`objective.py`. What any wrapper of a Keras model needs is in `wrapper`. Called by: users and Keras.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import keras
from keras import ops, tree

from rdrop_keras import alpha as alphas
from rdrop_keras import divergence_of_output, keras_private
from rdrop_keras.arguments import check_integer
from rdrop_keras.logs import FirstPassMetrics, RowMeans, check_logs, why_no_effect
from rdrop_keras.objective import RDropLoss
from rdrop_keras.passes import Passes, check_dropout_rates, check_share
from rdrop_keras.wrapper import replicas, step
from rdrop_keras.wrapper.wrapper_model import WrapperModel


@keras.saving.register_keras_serializable(package="rdrop_keras")
class RDropModel(WrapperModel):
    """Trains a model with R-Drop: regularized dropout (Liang et al., NeurIPS 2021, arXiv 2106.14448).

    Each batch passes through the model m times with different dropout. Layers before the first dropout run once. A
    consistency term pulls the outputs of the passes together:

        L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

    For m = 2 this is half of the paper's Eq. 4. It has the same α, the same optimum, and the scale of the compiled
    loss. `loss` is the compiled loss with its reduction, weights and masks. `D` (`rdrop_keras.Divergence`) is weighted,
    masked and reduced in the same way. So α means the same for any batch size, sequence length, padding, number of
    classes, reduction or number of replicas. With several outputs, each adds its divergence times its entry in
    `loss_weights`. Weight regularizers, and what layers give to `add_loss`, are added once. A layer of your own should
    give `add_loss` a mean over the batch or a value for each row, since it sees the rows of all passes.

    In everything but training, an `RDropModel` is the wrapped model. `evaluate`, `predict`, `export` and calls make one
    pass, with dropout off, and `val_loss` is the compiled loss alone. `layers`, `inputs`, `get_layer`, `generate` and
    whatever else the wrapper does not have itself are the model's. What is assigned to them reaches the model. After a
    change to the model, compile again. A step of `fit` logs

    - `loss`: L, with what layers add;
    - `task_loss`: the mean over passes of the compiled loss;
    - `consistency_loss`: `1/(m(m−1)) · Σ_{i≠j} D`, without α, so that `loss = task_loss + α/m · consistency_loss`;
    - `alpha`, if it moves;
    - the compiled metrics, of the first pass.

    `alpha` can be assigned as `optimizer.learning_rate` can. `model.alpha = 2.0` holds from the next step, without a
    new program, and is saved with the model. (On JAX it holds from the next epoch, unless it is assigned through a
    callback's `self.model`.) All other arguments are fixed. `compile` starts the optimizer anew and leaves α alone. A
    schedule goes on counting the steps that this `RDropModel` has made, and a `KLBudget` keeps the α that it has found.

    A subclass may override `train_step`. In it `self(x, training=True)` returns the rows of all passes, and
    `self.compute_loss(x, y, outputs, sample_weight)` returns L. `training_step` does the same for loops of one's own.

    Rows of a batch are taken to be independent, except in batch normalization. The passes run one after another where
    shapes show that rows are not independent, such as for similarities of each row with each, and where a layer is
    known to draw one number for the whole batch. That is exact, but not as fast. `rdrop_keras.sharing` tells whether it
    is so. A layer of your own may mix rows without a trace in its shapes, or draw once for all of them. Then declare
    `rdrop_mixes_rows = True` on the layer, its class or the model. `fit` warns if the consistency
    loss of a whole epoch was 0. Augmentation layers inside the model are random layers like others. Each pass gets a
    view of its own, unless `share` names the last of them.

    Args:
        model: The `keras.Model` to train: Sequential, Functional, subclassed, or a KerasHub task. `fit`, `evaluate` and
            `predict` take the raw inputs of a task as the task does. The model is shared, not copied, and is found
            again under `.model`.
        alpha: α. It may be a number ≥ 0. The paper uses 5 for translation, 1 for language modelling, 0.7 for
            summarization, 0.1 to 1 for GLUE and 0.6 for ViT. 0 is plain training, exactly. It may be a
            `LearningRateSchedule`, or any function of `keras.ops` from the training step to a scalar ≥ 0. The step is
            an integer tensor and counts plain steps too. Where the function returns no finite number ≥ 0, α is taken
            for 0, and `fit` warns. It may be a `KLBudget`. An α that moves is logged as `alpha`, its mean over R-Drop's
            steps. Defaults to 1.
        divergence: D. `"auto"`, the default, reads it off the compiled loss of each output: `"kl"` for categorical
            cross-entropies, `"bernoulli_kl"` for binary ones, `"mse"` for regression. It may be one of these names,
            `"js"`, or a `rdrop_keras.Divergence`. It may be a function of your own, which gets the list of the m
            outputs in float32 and returns one value for each element of the batch, of shape `(batch, …)`. The value
            should be the mean over all pairs of passes. A registered function is saved. It may be a dict or list with
            one of these for each output.
        num_passes: m ≥ 2 (section 4.3 of the paper). Defaults to 2.
        every: k ≥ 1 (section 4.2). Steps 0, k, 2k, … of training are steps of R-Drop. The others are plain and have one
            pass. `consistency_loss` is averaged over steps of R-Drop, and is NaN in an epoch without them; `task_loss`
            is averaged over all steps. Not with `steps_per_execution` above 1. Defaults to 1.
        start: s ≥ 0. The steps before step s are plain training at the price of plain training. R-Drop starts at step
            s, from which `every` counts. This helps where R-Drop pays late and its steps cost more. A schedule for
            `alpha` counts from step 0 all the same. Steps are counted over all calls of `fit`, and a loaded file goes
            on with the count. Not with `steps_per_execution` above 1. Defaults to 0.
        dropout_rates: One rate for each pass, from 0 to less than 1 (section 4.4). Pass i runs at rate i all dropout
            layers whose own rate is above 0, attention and recurrent dropout included. A pass at rate 0 is the full
            model. The passes then run one after another, so that batch normalization sees them one by one. `None`, the
            default, leaves the layers their own rates.
        share: What the passes compute once. With `"deterministic"`, the default, it is all layers of a Functional or
            Sequential model, nested ones too, before the first that is random. The passes are the same as without
            sharing, and `rdrop_keras.sharing` tells what is shared and why. With `"nothing"` the inputs are repeated,
            as in the paper. With the name of a layer, `"backbone/pooled_dense"` if nested (or the end of that name),
            this layer and all that it needs are computed once, dropout included. Then only what follows differs
            between passes. That makes R-Drop on the head of a large encoder nearly free.
        name: Name of the wrapper.

    Raises:
        TypeError: If an argument, or an assigned `alpha`, has the wrong type.
        AttributeError: If an argument other than `alpha` is assigned.
        ValueError: If an argument has an impossible value, or `alpha` is changed from or to 0; if no layer of `model`
            is random in training, or none after the layer that `share` names; if a recurrent layer with
            `stateful=True` comes after the first dropout; if `model` was made under another `tf.distribute` strategy;
            if it overrides a step of training that the wrapper replaces.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.1), keras.layers.Dense(3)])
    >>> model = rdrop_keras.RDropModel(model, alpha=5.0)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['accuracy', 'consistency_loss', 'loss', 'task_loss']
    """

    divergence: divergence_of_output.OfModel
    num_passes: int
    every: int
    start: int
    dropout_rates: tuple[float, ...] | None
    share: str

    fixed = ("model", "divergence", "num_passes", "every", "start", "dropout_rates", "share")

    def __init__(
        self,
        model: keras.Model,
        alpha: alphas.Alpha = 1.0,
        divergence: divergence_of_output.OfModel = "auto",
        num_passes: int = 2,
        every: int = 1,
        start: int = 0,
        dropout_rates: Sequence[float] | None = None,
        share: str = "deterministic",
        name: str | None = None,
    ) -> None:
        alphas.check_alpha(alpha)
        divergence_of_output.check(divergence)
        check_integer("num_passes", num_passes, least=2)
        check_integer("every", every, least=1)
        check_integer("start", start, least=0)
        check_dropout_rates(dropout_rates, num_passes)
        check_share(share)
        is_plain = alpha == 0
        super().__init__(model, name, as_is=is_plain)
        self.divergence = divergence
        self.num_passes = int(num_passes)
        self.every = int(every)
        self.start = int(start)
        self.dropout_rates = None if dropout_rates is None else tuple(map(float, dropout_rates))
        self.share = share
        self._alpha = alphas.make(alpha, self)
        self._logs = RowMeans(["task_loss", "consistency_loss"], name="rdrop")
        self._alpha_log = RowMeans(["alpha"], name="rdrop_alpha") if self._alpha.moves else None
        self._logs_are_checked = False
        self._warned_of_no_effect = False
        self._passes: Any = None if is_plain else Passes(model, share, self.dropout_rates)

    @property
    def alpha(self) -> alphas.Alpha:
        return self._alpha.given

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self._alpha.assign(alpha)

    @property
    def passes_of_steps(self) -> tuple[int, ...]:
        if self._as_is:
            return (1,)
        return (self.num_passes, 1) if self.every > 1 or self.start else (self.num_passes,)

    def described_steps(self) -> str:
        return f"every={self.every}, start={self.start}"

    def passes_of_step(self, number: int) -> int:
        since = number - self.start
        paired = not self._as_is and since >= 0 and since % self.every == 0
        return self.num_passes if paired else 1

    def call_in_training(self, inputs: Any, training: bool | None) -> Any:
        made = step.current()
        if made is None or made.num_passes == 1:
            return keras_private.call(self.model, inputs, training)
        return self._passes(inputs, made.num_passes, training)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, *args: Any, **kwargs: Any) -> None:
        """Configures training. It takes the arguments of `keras.Model.compile`.

        Raises:
            ValueError: If there is no `loss`, unless `alpha=0`; if the divergence of an output cannot be told from the
                loss; if `steps_per_execution` is above 1 and `every` is above 1 or `start` above 0.
        """
        if "auto" in [argument for argument in (optimizer, loss) if isinstance(argument, str)]:
            raise ValueError(
                "'auto' is for KerasHub's tasks to choose by; an RDropModel around one must be told: "
                "`compile(keras.optimizers.Adam(5e-5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))` "
                f"is what most classifiers choose. Received: optimizer={optimizer!r}, loss={loss!r}."
            )
        super().compile(optimizer, loss, *args, **kwargs)
        self._logs_are_checked = False
        if self._passes is not None:
            self._passes.refresh()

    def make_loss(self, loss: Any, loss_weights: Any) -> RDropLoss:
        if all(leaf is None for leaf in tree.flatten(loss)):
            raise ValueError(
                "R-Drop needs a compiled `loss`, since it compares the outputs that have one: what a layer adds by "
                "`add_loss` has no outputs. Take the loss out of the layer and compile it, and tell the wrapper what "
                'the outputs are: `RDropModel(model, divergence=rdrop_keras.Divergence("kl", from_logits=True))` for '
                "logits. If it has to stay in the layer, compile "
                "`loss=lambda y, outputs: 0.0 * keras.ops.mean(outputs, axis=-1)`, and give `fit` any `y` of as many "
                f"rows. Without a compiled loss only `alpha=0` can be trained. Received: loss={loss}."
            )
        return RDropLoss(
            loss,
            loss_weights,
            getattr(self, "output_names", None),
            self.divergence,
            alpha=self._alpha,
            logs=self._logs,
            alpha_log=self._alpha_log,
        )

    def make_metrics(self, metrics: Any, weighted_metrics: Any) -> FirstPassMetrics:
        return FirstPassMetrics(metrics, weighted_metrics, output_names=getattr(self, "output_names", None))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Computes the loss of a step; `y_pred` has the rows of all passes. See `keras.Model.compute_loss`."""
        self._check_targets(y)
        made = step.current()
        if made is not None and made.num_passes > 1 and not made.called:
            raise ValueError(
                "In a step of R-Drop the outputs must come from `self(x, training=True)`, which makes all passes; "
                "`self.model(x, training=True)` makes one. Received: outputs made without it."
            )
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if made is not None and not made.loss_made:
            made.loss_made = True
            with replicas.after(loss):
                self._alpha.end_step()
        return loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the compiled metrics with the first pass, and returns them. See `keras.Model.compute_metrics`."""
        self._check_targets(y)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_metrics_result(self) -> dict[str, Any]:
        """Returns the logs; see `keras.Model.get_metrics_result`.

        Raises:
            ValueError: If an output or a metric is logged by one of R-Drop's names.
        """
        if not self._logs_are_checked:
            check_logs(self.metrics, self.training_metrics)
            self._logs_are_checked = True
        return super().get_metrics_result()

    def check_step(self, made: step.Step, error: Exception | None) -> None:
        if not made.called or made.loss_made:
            return
        rows = f"the outputs have the rows of all {made.num_passes} passes"
        if error is None:
            raise RuntimeError(
                f"A training step must take its loss from `self.compute_loss(x, y, y_pred, sample_weight)`: in it "
                f"{rows}, and the loss is that of R-Drop. Received: a step without it, which would have trained "
                f"without R-Drop. A `compute_loss` of your own ends in `super().compute_loss(...)`; a loss of your own "
                "goes to `compile`."
            )
        if made.num_passes > 1 and self._has_own_step():
            raise ValueError(
                f"A training step of your own failed before its `compute_loss`. In a step of R-Drop {rows}: "
                "`self.compute_loss(x, y, y_pred, sample_weight)` takes them as they are, and so does "
                "`self.compute_metrics(x, y, y_pred, sample_weight)`. A loss of your own goes to `compile`; for "
                "anything else the first pass is `y_pred[:batch_size]`. "
                f"Received: {type(error).__name__}: {error}"
            ) from error

    def _has_own_step(self):
        methods = ("train_step", "compute_loss")
        own = [getattr(type(self), name) is not getattr(RDropModel, name) for name in methods]
        return any(own) or any(name in vars(self) for name in methods)

    def _check_targets(self, y):
        if y is None and self._passes is not None:
            raise ValueError(
                "The compiled loss needs targets: `fit(x, y)`, or a dataset of `(x, y)`. Received: no `y`."
            )

    @property
    def training_metrics(self) -> Sequence[keras.Metric]:
        return [self._logs] if self._alpha_log is None else [self._logs, self._alpha_log]

    def jax_state_sync(self) -> None:
        """Gives variables the values in Keras's program for JAX, and α the value that was assigned meanwhile."""
        super().jax_state_sync()
        self._alpha.write()

    def after_fit(self, history: keras.callbacks.History) -> None:
        self._alpha.end_fit()
        if self._passes is None or self._warned_of_no_effect:
            return
        warning = why_no_effect(history.history, self)
        if warning is not None:
            self._warned_of_no_effect = True
            warnings.warn(f"{warning} Received: {self.name!r}.", stacklevel=3)

    def _current_term(self, consistency):
        """What this consistency loss adds to the loss with the current α: `α/m · consistency`, a float."""
        return float(ops.convert_to_numpy(self._alpha.current())) / self.num_passes * consistency

    def summary(
        self, line_length: int | None = None, positions: Any = None, print_fn: Any = None, **kwargs: Any
    ) -> None:
        """Prints `keras.Model.summary` and a line on what the passes share. It takes the same arguments."""
        super().summary(line_length, positions, print_fn, **kwargs)
        if self._passes is not None and self._passes.graph is not None:
            (print_fn or print)(f" R-Drop: {self._passes.graph.summary()}")

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        self._alpha.save(store)

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(store)
        self._alpha.load(store)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "alpha": keras.saving.serialize_keras_object(self.alpha),
            "divergence": keras.saving.serialize_keras_object(self.divergence),
            "num_passes": self.num_passes,
            "every": self.every,
            "start": self.start,
            "dropout_rates": self.dropout_rates and list(self.dropout_rates),
            "share": self.share,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        nested = {
            key: keras.saving.deserialize_keras_object(config[key], custom_objects=custom_objects)
            for key in ("alpha", "divergence")
        }
        # Files of earlier versions have `trained_with` too.
        config = {key: value for key, value in config.items() if key != "trained_with"}
        return super().from_config({**config, **nested}, custom_objects)
