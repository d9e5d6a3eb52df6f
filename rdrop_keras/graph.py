"""The paired graph: a model that computes once what its passes have in common.

    x (N) → deterministic layers (N) → tile → random layers and all that follows (mN) → P_1 … P_m

It lists the calls that a Functional or Sequential model records, those of nested models in their place, and marks each
to run once or for every pass. It runs the model's own layers and owns nothing: no layer, no variable, no node.
"""

import contextlib
import difflib
import math

import keras
from keras import tree

from rdrop_keras import _keras, pairing, stochastic

# Batch sizes at which shapes are run: an axis that follows both is the batch.
BATCH_SIZES = (2, 3)


class Step:
    """One call of one operation.

    Attributes:
        name: The operation's name after those of the nested models that hold it: `"backbone/pooled_dense"`.
        operation: The layer or other `keras.Operation`.
        node: What Keras recorded of the call.
        inputs: `{id of a KerasTensor of the node: slot}`; a slot is a tensor's number in the graph.
        outputs: Slots of the flat outputs.
        repeated: Whether it runs for every pass.
        reason: Why it does, or does not.
        weights: The weights of the operation, if it is a layer.
    """

    def __init__(self, name, operation, node, inputs, outputs):
        self.name = name
        self.operation = operation
        self.node = node
        self.inputs = inputs
        self.outputs = outputs
        self.repeated = False
        self.reason = "deterministic"

    @property
    def weights(self):
        return getattr(self.operation, "weights", [])

    def repeat(self, reason):
        self.repeated = True
        self.reason = reason


class _Conversion(Step):
    """How the nested model `operation` receives an input: as a tensor of the type it was made for, with its mask."""

    def __init__(self, name, model, reference, inputs, output):
        super().__init__(name, model, None, inputs, [output])
        self.reference = reference


class _Nested:
    """The steps of a nested model, in the scopes that Keras opens around its call."""

    def __init__(self, model, steps):
        self.model = model
        self.steps = steps


class PairedGraph:
    """The calls of `model`, each marked to run once or for every pass.

    Attributes:
        steps: The calls, a list of `Step`, in an order in which they can run.
        separate: Why the passes must run one after another and not as rows of one batch; None if they need not.

    Args:
        model: A built `keras.Model`. Of one that is no graph of layers, nothing is shared.
        share: `"deterministic"`, `"nothing"`, or the name of a layer.

    Raises:
        ValueError: If `share` names no layer or more than one, or leaves nothing random or no batch after it; if a
            layer that runs for every pass keeps a state for each row.
    """

    def __init__(self, model, share):
        self.model = model
        self.share = share
        self._num_slots = 0
        self._functional = _keras.functional(model)
        if self._functional is None:
            if share not in ("deterministic", "nothing"):
                raise ValueError(
                    "`share` can name a layer of a Functional or Sequential model only; the layers of any other run "
                    f"inside its `call`. Received: share={share!r} with model={model.name!r} "
                    f"({type(model).__name__}). Use 'deterministic' or 'nothing'."
                )
            whole = Step(model.name, model, None, {}, [])
            whole.repeat(f"{type(model).__name__} is no graph of layers: its call is its own")
            self.steps = [whole]
            self.separate = self._why_separate(None)
            return
        self._inputs = [self._slot() for _ in self._functional.inputs]
        self._program, self._outputs = self._trace(self._functional, self._inputs, "")
        steps = list(_flat(self._program))
        self.steps = [step for step in steps if not isinstance(step, _Conversion)]
        shapes = [self._shapes(steps, size) for size in BATCH_SIZES]
        if share == "nothing":
            for step in steps:
                step.repeat("share='nothing'")
        else:
            self._mark(steps, set() if share == "deterministic" else self._up_to(steps, share), shapes)
        self.separate = self._why_separate(shapes)

    @property
    def knows_layers(self):
        """Whether the model is a graph of layers, and not one step as a whole."""
        return self._functional is not None

    @property
    def shares(self):
        """Whether any step runs once for all passes."""
        return not all(step.repeated for step in self.steps)

    def summary(self):
        """One line on what runs once."""
        repeated = {id(weight) for step in self.steps if step.repeated for weight in step.weights}
        weights = {id(weight): weight for step in self.steps for weight in step.weights}
        total = num_parameters(weights.values())
        once = num_parameters(weight for key, weight in weights.items() if key not in repeated)
        percent = f" ({once / total:.1%} of the parameters)" if total else ""
        count = sum(not step.repeated for step in self.steps)
        separate = f"; the others run for one pass after another: {self.separate}" if self.separate else ""
        return (
            f"{count} of {len(self.steps)} layer calls{percent} run once for all passes, share={self.share!r}{separate}"
        )

    def __call__(self, inputs, num_passes, training, at_rates=None):
        """The model's outputs over `inputs`, `(N, …)`, of all passes: `(mN, …)`.

        Args:
            inputs: What the model is called with.
            num_passes: m.
            training: As of the model.
            at_rates: For each pass a function from an operation to a context in which its calls run. The passes then
                run one after another, and batch normalization behind the first dropout sees them one by one.
        """
        once = dict(zip(self._inputs, _keras.standardized(self.model, self._functional, inputs)))
        with _keras.call_context(self.model, training), _keras.autocast_scope(self.model):
            self._run(self._program, _Tensors(once, 1), training, repeated=False)
            if at_rates is None:
                return self._run_passes(_Tensors(once, num_passes), training)
            return pairing.concatenate([self._run_passes(_Tensors(once, 1), training, at_rate) for at_rate in at_rates])

    def _run_passes(self, tensors, training, at_rate=contextlib.nullcontext):
        self._run(self._program, tensors, training, repeated=True, at_rate=at_rate)
        return _keras.packed_outputs(self._functional, [tensors.get(slot, True) for slot in self._outputs])

    def _run(self, program, tensors, training, repeated, at_rate=contextlib.nullcontext):
        """Runs the steps that are, or are not, repeated."""
        for item in program:
            if isinstance(item, _Nested):
                with _keras.name_scope(item.model), _keras.autocast_scope(item.model):
                    self._run(item.steps, tensors, training, repeated, at_rate)
            elif item.repeated == repeated:
                values = {tensor: tensors.get(slot, repeated) for tensor, slot in item.inputs.items()}
                if isinstance(item, _Conversion):
                    outputs = [_keras.converted(*values.values(), model=item.operation, reference=item.reference)]
                else:
                    args, kwargs = item.node.arguments.fill_in(values)
                    with at_rate(item.operation):
                        outputs = tree.flatten(_keras.operation_fn(item.operation, training=training)(*args, **kwargs))
                for slot, output in zip(item.outputs, outputs):
                    tensors.put(slot, output, repeated)

    def _slot(self):
        self._num_slots += 1
        return self._num_slots

    def _trace(self, functional, inputs, prefix):
        """The program of `functional`, whose inputs are the slots `inputs`, and the slots of its outputs."""
        slots = {id(tensor): slot for tensor, slot in zip(functional.inputs, inputs)}
        program = []
        for node in _keras.nodes(functional):
            if any(id(tensor) not in slots for tensor in node.input_tensors):
                continue  # As Keras does: the node belongs to another model.
            name = prefix + node.operation.name
            nested, tensors, masks = _nested_call(node)
            if nested is None:
                consumed = {id(tensor): slots[id(tensor)] for tensor in node.input_tensors}
                outputs = [self._slot() for _ in node.outputs]
                program.append(Step(name, node.operation, node, consumed, outputs))
            else:
                steps, received = [], []
                for tensor, mask, reference in zip(tensors, masks, nested.inputs):
                    received.append(None if tensor is None else self._slot())
                    if tensor is not None:
                        consumed = {id(source): slots[id(source)] for source in (tensor, mask) if source is not None}
                        steps.append(_Conversion(name, node.operation, reference, consumed, received[-1]))
                inner, outputs = self._trace(nested, received, f"{name}/")
                program.append(_Nested(node.operation, steps + inner))
            slots.update((id(tensor), slot) for tensor, slot in zip(node.outputs, outputs))
        return program, [slots[id(tensor)] for tensor in functional.outputs]

    def _up_to(self, steps, share):
        """The steps that the layer called `share` needs, its own among them."""
        names = {step.name: step for step in self.steps}
        for step in self.steps:  # A nested model has the name that its steps share.
            parts = step.name.split("/")
            names.update(("/".join(parts[:i]), step) for i in range(1, len(parts)))
        paths = sorted(name for name in names if name == share or name.endswith(f"/{share}"))
        if share in paths:
            paths = [share]
        if len(paths) != 1:
            inside = [
                s.name for s in self.steps if any(share == layer.name for layer in _keras.all_layers(s.operation))
            ]
            short = {name.rpartition("/")[2]: name for name in names}
            short.update({"deterministic": "deterministic", "nothing": "nothing"})
            close = [short[name] for name in difflib.get_close_matches(share.rpartition("/")[2], short, n=5)]
            hint = (
                f"More than one has it: {', '.join(map(repr, paths))}."
                if paths
                else f"It is a part of {inside[0]!r}, which runs as a whole."
                if inside
                else f"Close names: {', '.join(map(repr, close)) or 'none'}."
            )
            raise ValueError(
                "`share` must be 'deterministic', 'nothing' or the name of a layer of the model, written "
                f"'backbone/layer' in a nested one. {hint} Received: share={share!r}."
            )
        targets = [step for step in steps if f"{step.name}/".startswith(f"{paths[0]}/")]
        producers = {slot: step for step in steps for slot in step.outputs}
        needed, waiting = set(), targets
        while waiting:
            step = waiting.pop()
            if step not in needed:
                needed.add(step)
                waiting.extend(producers[slot] for slot in step.inputs.values() if slot in producers)
        return needed

    def _mark(self, steps, once, shapes):
        """Marks the steps to repeat; those in `once` are not."""
        for step in once:
            step.reason = f"up to {self.share!r}"
        for step in steps:
            why = None if step in once or isinstance(step, _Conversion) else stochastic.why_stochastic(step.operation)
            if why is not None:
                step.repeat(why)
        if once and not any(step.repeated for step in steps):
            raise ValueError(
                f"Nothing that is random in training comes after the layer that `share` names, so all passes would be "
                f"identical. Received: share={self.share!r}. Name an earlier layer."
            )
        producers = {slot: step for step in steps for slot in step.outputs}
        batch = {slot for slot, pair in _pairs(shapes) if follows_batch(pair)}
        changed = True
        while changed:
            changed = False
            for step in steps:
                sources = [producers[slot] for slot in step.inputs.values() if slot in producers]
                source = next((source for source in sources if source.repeated), None)
                if source is not None and not step.repeated and step not in once:
                    step.repeat(source.reason if source.reason.startswith("follows") else f"follows {source.name}")
            tiled = [slot for step in steps if step.repeated for slot in step.inputs.values()] + self._outputs
            for slot in tiled:
                source = producers.get(slot)
                if source is None or source.repeated or slot in batch:
                    continue
                if source in once:
                    raise ValueError(
                        f"`share` ends at a tensor whose axis 0 is not known to be the batch, so it cannot be repeated "
                        f"for every pass: an output of {source.name!r}. Received: share={self.share!r}."
                    )
                source.repeat("axis 0 of its output is not known to be the batch")
                changed = True

    def _shapes(self, steps, batch_size):
        """`{slot: shape}` as far as the steps can be run symbolically; None in a shape is an axis of unknown size."""
        declared = {None, *(tensor.shape[0] for tensor in self._functional.inputs if tensor.shape)}

        def resized(tensor):
            first = [batch_size if size in declared else size for size in tensor.shape[:1]]
            return keras.KerasTensor((*first, *tensor.shape[1:]), dtype=tensor.dtype, sparse=tensor.sparse)

        specs = {slot: resized(tensor) for slot, tensor in zip(self._inputs, self._functional.inputs) if tensor.shape}
        for step in steps:
            if not all(slot in specs for slot in step.inputs.values() if slot is not None):
                continue
            values = {tensor: specs.get(slot) for tensor, slot in step.inputs.items()}
            if isinstance(step, _Conversion):
                spec = next(iter(values.values()))
                outputs = [keras.KerasTensor(spec.shape, dtype=step.reference.dtype, sparse=spec.sparse)]
            elif stochastic.treats_rows_alike(step.operation) and all(
                spec.shape[:1] == (batch_size,) for spec in values.values() if spec is not None
            ):
                outputs = [resized(tensor) for tensor in step.node.outputs]
            else:
                args, kwargs = step.node.arguments.fill_in(values)
                try:
                    outputs = tree.flatten(step.operation.compute_output_spec(*args, **kwargs))
                except Exception:  # Of any kind: what cannot be run is not proven.
                    continue
            specs.update(zip(step.outputs, outputs))
        return {slot: spec.shape for slot, spec in specs.items()}

    def _why_separate(self, shapes):
        """Why the steps that run for every pass must do so one pass after another; None if they need not."""
        known = dict(_pairs(shapes)) if shapes else {}
        for step in self.steps:
            if not step.repeated:
                continue
            stochastic.check_stateless(step.operation)
            layer = stochastic.drawing_once_a_batch(step.operation)
            if layer is not None:
                return f"{layer.name!r} draws once for a whole batch"
            if _relates_rows(step, known):
                return f"{step.name!r} relates rows of a batch to each other"
        return None


def _relates_rows(step, known):
    """Whether an output row of `step` depends on several rows of the batch, as far as `known`, `{slot: shapes}`, tells.

    `known` has the shapes at both batch sizes of all tensors whose shapes could be found.
    """
    inputs = [slot for slot in step.inputs.values() if slot is not None]
    varying = [slot for slot in inputs if slot in known and known[slot][0] != known[slot][1]]
    if not varying or not all(slot in known for slot in inputs):
        return False
    if _axis_is_batch(step, known):
        return True
    if stochastic.treats_rows_alike(step.operation) and all(follows_batch(known[slot]) for slot in inputs):
        return False
    # A batch of rows that were cut into equal parts is one too, such as (N · length, channels).
    return not all(slot in known and _is_proportional(known[slot]) for slot in step.outputs)


def _axis_is_batch(step, known):
    """Whether the operation works along axis 0 of a tensor on which that is the batch."""
    axes = getattr(step.operation, "axis", None)
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    arguments = tree.flatten(step.node.arguments.args[:1]) if step.node is not None else []
    slots = [step.inputs.get(id(tensor)) for tensor in arguments]
    ranks = [len(known[slot][0]) for slot in slots if slot in known and follows_batch(known[slot])]
    return any(axis in (0, -rank) for axis in axes for rank in ranks)


def _is_proportional(pair):
    """Whether axis 0, and no other, grows with the batch, or is of unknown size, as some layers declare theirs."""
    first, second = pair
    if not first or first[1:] != second[1:]:
        return False
    if None in (first[0], second[0]):
        return first[0] == second[0]
    return first[0] * BATCH_SIZES[1] == second[0] * BATCH_SIZES[0]


def follows_batch(pair):
    """Whether of the shapes of a tensor at the two `BATCH_SIZES` axis 0, and no other, is the batch."""
    first, second = pair
    return (first[:1], second[:1]) == tuple((size,) for size in BATCH_SIZES) and first[1:] == second[1:]


def _pairs(shapes):
    """`(slot, shapes at the two batch sizes)` of all slots known at both."""
    first, second = shapes
    return [(slot, (shape, second[slot])) for slot, shape in first.items() if slot in second]


class _Tensors:
    """The tensors of one run, computed once or for every pass; the first are repeated when a pass needs them."""

    def __init__(self, once, num_passes):
        self._once = once
        self._repeated = {}
        self._num_passes = num_passes

    def get(self, slot, repeated):
        if not repeated:
            return self._once.get(slot)
        if slot not in self._repeated:
            self._repeated[slot] = pairing.tile(self._once.get(slot), self._num_passes)
        return self._repeated[slot]

    def put(self, slot, value, repeated):
        (self._repeated if repeated else self._once)[slot] = value


def num_parameters(weights):
    return sum(math.prod(weight.shape) for weight in weights)


def _flat(program):
    for item in program:
        if isinstance(item, _Nested):
            yield from _flat(item.steps)
        else:
            yield item


def _nested_call(node):
    """The Functional model that `node` calls, and the node's tensors for its inputs and their masks; else Nones."""
    args, kwargs = node.arguments.args, node.arguments.kwargs
    functional = _keras.functional(node.operation) if isinstance(node.operation, keras.Model) else None
    if functional is None or len(args) != 1 or set(kwargs) - {"mask", "training"}:
        return None, None, None
    tensors = _keras.reference_order(functional, args[0])
    masks = [None] * len(tensors) if kwargs.get("mask") is None else tree.flatten(kwargs["mask"])
    fits = len(tensors) == len(masks) == len(functional.inputs) and all(
        source is None or isinstance(source, keras.KerasTensor) for source in (*tensors, *masks)
    )
    same_ranks = fits and all(
        tensor is None or len(tensor.shape) == len(reference.shape)
        for tensor, reference in zip(tensors, functional.inputs)
    )
    if not same_ranks or node.operation.activity_regularizer is not None:
        return None, None, None
    return functional, tensors, masks
