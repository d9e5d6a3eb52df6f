"""The paired graph: a model as a list of calls, which computes once what its passes have in common.

    x (N) → deterministic layers (N) → tile → random layers and all that follows (mN) → P_1 … P_m

It lists the calls that a Functional or Sequential model records, including those of nested models. It marks each call
to run once or for every pass. It runs the model's own layers and owns nothing: no layer, no variable, no node.

Comes in: a model and `share`; later, batches of N rows. Goes out: marked calls; later, outputs of mN rows. Called by:
`Passes`, and `report` for the marks.
"""

import contextlib
import math
from typing import Any, NamedTuple

import keras
from keras import tree

from rdrop_keras import keras_private
from rdrop_keras.passes import marking, randomness, tiling
from rdrop_keras.passes.added_losses import mean_over
from rdrop_keras.passes.marking import Conversion, LayerCall


class _Nested(NamedTuple):
    """The calls of a nested model, in the scopes that Keras opens around its call."""

    model: keras.Model
    calls: list[Any]


class PairedGraph:
    """The calls of `model`, each marked to run once or for every pass.

    Attributes:
        calls: The calls, a list of `LayerCall`, in an order in which they can run.
        separate: Why the passes must run one after another and not as rows of one batch; None if they need not. Some
            reasons are known only after the first batch.

    Args:
        model: A built `keras.Model`. A model that is no graph of layers shares nothing.
        share: `"deterministic"`, `"nothing"`, or the name of a layer.

    Raises:
        ValueError: If `share` names no layer or several; if it names a layer after which nothing is random, or whose
            output does not have the batch on axis 0; if a layer that runs for every pass keeps a state for each row.
    """

    def __init__(self, model, share):
        self.model = model
        self.share = share
        self._num_slots = 0
        self._functional = keras_private.functional(model)
        if self._functional is None:
            check_has_graph(model, share)
            whole = LayerCall(model.name, model, None, {}, [])
            whole.repeat(f"{type(model).__name__} is no graph of layers: its call is its own")
            self.calls = [whole]
            self.separate = marking.why_separate(model, self.calls)
            self._waits_for_batch = self.separate is None
            return
        self._waits_for_batch = False
        self._inputs = [self._slot() for _ in self._functional.inputs]
        self._program, self._outputs = self._trace(self._functional, self._inputs, "")
        calls = list(_flat(self._program))
        self.calls = [call for call in calls if not isinstance(call, Conversion)]
        known = marking.known_specs(calls, dict(zip(self._inputs, self._functional.inputs)))
        if share == "nothing":
            for call in calls:
                call.repeat("share='nothing'")
        else:
            once = set() if share == "deterministic" else marking.up_to(share, calls)
            marking.mark(calls, once, share, known, self._outputs)
        self.separate = marking.why_separate(model, self.calls, known)

    def examine_batch(self, inputs, training):
        """Finds out what only a batch shows: that the passes must run one after another."""
        sizes = {tensor.shape[0] for tensor in tree.flatten(inputs) if tensor is not None and len(tensor.shape)} - {
            None
        }
        if len(sizes) > 1:  # Such as nodes and edges of a graph: rows of one refer to rows of the other.
            self.separate = self.separate or f"the inputs of {self.model.name!r} have {sorted(sizes)} rows"
        elif self._waits_for_batch:
            self._waits_for_batch = False
            if marking.relates_rows_of(self.model, inputs, training):
                self.separate = f"{self.model.name!r} relates rows of a batch to each other"

    @property
    def knows_layers(self):
        """Whether the model is a graph of layers, and not a single call."""
        return self._functional is not None

    def summary(self):
        """One line on what runs once."""
        repeated = {id(weight) for call in self.calls if call.repeated for weight in call.weights}
        weights = {id(weight): weight for call in self.calls for weight in call.weights}
        total = num_parameters(weights.values())
        once = num_parameters(weight for key, weight in weights.items() if key not in repeated)
        percent = f" ({once / total:.1%} of the parameters)" if total else ""
        count = sum(not call.repeated for call in self.calls)
        separate = f"; the others run for one pass after another: {self.separate}" if self.separate else ""
        return (
            f"{count} of {len(self.calls)} layer calls{percent} run once for all passes, share={self.share!r}{separate}"
        )

    def __call__(self, inputs, num_passes, training, at_rates=None):
        """The outputs of all passes, `(mN, …)`, for `inputs` of N rows.

        Args:
            inputs: What the model is called with.
            num_passes: m.
            training: As for the model.
            at_rates: For each pass a function from an operation to the context in which it is called. The passes then
                run one after another, and batch normalization after the first dropout sees them one by one.
        """
        once = dict(zip(self._inputs, keras_private.standardized(self.model, self._functional, inputs)))
        with keras_private.call_context(self.model, training), keras_private.autocast_scope(self.model):
            self._run(self._program, _Tensors(once, 1), training, repeated=False)
            if at_rates is None:
                return self._run_passes(_Tensors(once, num_passes), training)
            with mean_over(num_passes, self.model):
                passes = [self._run_passes(_Tensors(once, 1), training, at_rate) for at_rate in at_rates]
            return tiling.concatenate(passes)

    def _run_passes(self, tensors, training, at_rate=contextlib.nullcontext):
        self._run(self._program, tensors, training, repeated=True, at_rate=at_rate)
        return keras_private.packed_outputs(self._functional, [tensors.get(slot, True) for slot in self._outputs])

    def _run(self, program, tensors, training, repeated, at_rate=contextlib.nullcontext):
        """Runs the calls that are repeated, or those that are not."""
        for item in program:
            if isinstance(item, _Nested):
                with keras_private.name_scope(item.model), keras_private.autocast_scope(item.model):
                    self._run(item.calls, tensors, training, repeated, at_rate)
            elif item.repeated == repeated:
                values = {tensor: tensors.get(slot, repeated) for tensor, slot in item.inputs.items()}
                if isinstance(item, Conversion):
                    outputs = [
                        keras_private.converted(*values.values(), model=item.operation, reference=item.reference)
                    ]
                else:
                    args, kwargs = item.node.arguments.fill_in(values)
                    with at_rate(item.operation):
                        outputs = tree.flatten(
                            keras_private.operation_fn(item.operation, training=training)(*args, **kwargs)
                        )
                for slot, output in zip(item.outputs, outputs):
                    tensors.put(slot, output, repeated)

    def _slot(self):
        self._num_slots += 1
        return self._num_slots

    def _trace(self, functional, inputs, prefix):
        """The program of `functional` and the slots of its outputs, for `inputs`, the slots of its inputs."""
        slots = {id(tensor): slot for tensor, slot in zip(functional.inputs, inputs)}
        program = []
        for node in keras_private.nodes(functional):
            if any(id(tensor) not in slots for tensor in node.input_tensors):
                continue  # As Keras does: the node belongs to another model.
            name = prefix + node.operation.name
            nested, tensors, masks = _nested_call(node)
            if nested is None:
                consumed = {id(tensor): slots[id(tensor)] for tensor in node.input_tensors}
                outputs = [self._slot() for _ in node.outputs]
                program.append(LayerCall(name, node.operation, node, consumed, outputs))
            else:
                calls, received = [], []
                for tensor, mask, reference in zip(tensors, masks, nested.inputs):
                    received.append(None if tensor is None else self._slot())
                    if tensor is not None:
                        consumed = {id(source): slots[id(source)] for source in (tensor, mask) if source is not None}
                        calls.append(
                            Conversion(name, node.operation, None, consumed, [received[-1]], reference=reference)
                        )
                inner, outputs = self._trace(nested, received, f"{name}/")
                program.append(_Nested(node.operation, calls + inner))
            slots.update((id(tensor), slot) for tensor, slot in zip(node.outputs, outputs))
        return program, [slots[id(tensor)] for tensor in functional.outputs]


class _Tensors:
    """The tensors of one run. What was computed once is repeated when a repeated call needs it."""

    def __init__(self, once, num_passes):
        self._once = once
        self._repeated = {}
        self._num_passes = num_passes

    def get(self, slot, repeated):
        if not repeated:
            return self._once.get(slot)
        if slot not in self._repeated:
            self._repeated[slot] = tiling.tile(self._once.get(slot), self._num_passes)
        return self._repeated[slot]

    def put(self, slot, value, repeated):
        (self._repeated if repeated else self._once)[slot] = value


def check_has_graph(model, share):
    """Raises if `share` names a layer and `model` is no graph of layers."""
    if share not in ("deterministic", "nothing") and keras_private.functional(model) is None:
        raise ValueError(
            "`share` can name a layer of a Functional or Sequential model only; the layers of any other run inside its "
            f"`call`. Received: share={share!r} with model={model.name!r} ({type(model).__name__}). Use "
            "'deterministic' or 'nothing'."
        )


def num_parameters(weights):
    """The number of values in all of `weights`."""
    return sum(math.prod(weight.shape) for weight in weights)


def _flat(program):
    for item in program:
        if isinstance(item, _Nested):
            yield from _flat(item.calls)
        else:
            yield item


def _nested_call(node):
    """The Functional model that `node` calls, and the tensors and masks that go in; three Nones if there is none."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    functional = keras_private.functional(node.operation) if isinstance(node.operation, keras.Model) else None
    if functional is None or len(args) != 1 or set(kwargs) - {"mask", "training"}:
        return None, None, None
    tensors = keras_private.reference_order(functional, args[0])
    masks = [None] * len(tensors) if kwargs.get("mask") is None else tree.flatten(kwargs["mask"])
    fits = len(tensors) == len(masks) == len(functional.inputs) and all(
        source is None or isinstance(source, keras.KerasTensor) for source in (*tensors, *masks)
    )
    same_ranks = fits and all(
        tensor is None or len(tensor.shape) == len(reference.shape)
        for tensor, reference in zip(tensors, functional.inputs)
    )
    if not same_ranks or randomness.mixes_rows(node.operation):
        return None, None, None
    return functional, tensors, masks
