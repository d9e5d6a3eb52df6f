"""Which calls of a model run once for all passes and which for each, and whether all passes can run together.

Comes in: the calls of a model, and the shapes of their tensors at two batch sizes. Goes out: marks on the calls. Called
by: `graph.PairedGraph`.
"""

import difflib

import keras
from keras import tree

from rdrop_keras import keras_private
from rdrop_keras.passes import randomness

# The batch sizes at which shapes are computed. An axis that follows both is the batch.
BATCH_SIZES = (2, 3)


class LayerCall:
    """One call of one operation.

    Attributes:
        name: The operation's name after those of the nested models that hold it: `"backbone/pooled_dense"`.
        operation: The layer or other `keras.Operation`.
        node: What Keras recorded of the call.
        inputs: `{id of a KerasTensor of the node: slot}`; a slot is a tensor's number in the graph.
        outputs: Slots of the flat outputs.
        repeated: Whether it runs for every pass.
        reason: Why it does, or does not.
        origin: The call that it follows, if it is repeated because of another.
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
        self.origin = None

    @property
    def weights(self):
        return getattr(self.operation, "weights", [])

    def repeat(self, reason):
        self.repeated = True
        self.reason = reason

    def follow(self, call):
        """Repeats it because it uses an output of `call`."""
        self.origin = call.origin or call
        self.repeat(f"follows {self.origin.name}")


class Conversion(LayerCall):
    """How the nested model `operation` receives an input: as a tensor of the type it was made for, with its mask."""

    def __init__(self, name, model, reference, inputs, output):
        super().__init__(name, model, None, inputs, [output])
        self.reference = reference


def up_to(share, calls):
    """The calls that the layer named `share` depends on, and its own."""
    named = [call for call in calls if not isinstance(call, Conversion)]
    names = {call.name: call for call in named}
    for call in named:  # The first part of their names is that of a nested model.
        parts = call.name.split("/")
        names.update(("/".join(parts[:i]), call) for i in range(1, len(parts)))
    paths = sorted(name for name in names if name == share or name.endswith(f"/{share}"))
    if share in paths:
        paths = [share]
    if len(paths) != 1:
        inside = [s.name for s in named if any(share == layer.name for layer in keras_private.all_layers(s.operation))]
        short = {name.rpartition("/")[2]: name for name in names}
        short.update({"deterministic": "deterministic", "nothing": "nothing"})
        close = [short[name] for name in difflib.get_close_matches(share.rpartition("/")[2], short, n=5)]
        raise ValueError(
            "`share` must be 'deterministic', 'nothing' or the name of a layer of the model, written "
            f"'backbone/layer' in a nested one. {_hint(paths, inside, close)} Received: share={share!r}."
        )
    targets = [call for call in calls if f"{call.name}/".startswith(f"{paths[0]}/")]
    producers = {slot: call for call in calls for slot in call.outputs}
    needed, waiting = set(), targets
    while waiting:
        call = waiting.pop()
        if call not in needed:
            needed.add(call)
            waiting.extend(producers[slot] for slot in call.inputs.values() if slot in producers)
    return needed


def _hint(paths, inside, close):
    """What the user may have meant by a name that fits no layer, or several."""
    if paths:
        return f"More than one has it: {', '.join(map(repr, paths))}."
    if inside:
        return f"It is a part of {inside[0]!r}, which runs as a whole."
    return f"Close names: {', '.join(map(repr, close)) or 'none'}."


def mark(calls, once, share, shapes, outputs):
    """Marks the `calls` to repeat, except those in `once`, such that the slots `outputs` exist for every pass."""
    for call in once:
        call.reason = f"up to {share!r}"
    for call in calls:
        why = None if call in once or isinstance(call, Conversion) else randomness.why_stochastic(call.operation)
        if why is not None:
            call.repeat(why)
    if once and not any(call.repeated for call in calls):
        raise ValueError(
            f"Nothing that is random in training comes after the layer that `share` names, so all passes would be "
            f"identical. Received: share={share!r}. Name an earlier layer."
        )
    producers = {slot: call for call in calls for slot in call.outputs}
    batch = {slot for slot, pair in _pairs(shapes) if follows_batch(pair)}
    changed = True
    while changed:
        changed = False
        for call in calls:
            sources = [producers[slot] for slot in call.inputs.values() if slot in producers]
            source = next((source for source in sources if source.repeated), None)
            if source is not None and not call.repeated and call not in once:
                call.follow(source)
        tiled = [slot for call in calls if call.repeated for slot in call.inputs.values()] + outputs
        for slot in tiled:
            source = producers.get(slot)
            if source is None or source.repeated or slot in batch:
                continue
            if source in once:
                raise ValueError(
                    f"`share` ends at a tensor whose axis 0 is not known to be the batch, so it cannot be repeated "
                    f"for every pass: an output of {source.name!r}. Received: share={share!r}."
                )
            source.repeat("axis 0 of its output is not known to be the batch")
            changed = True


def shapes_at(batch_size, calls, inputs):
    """`{slot: shape}`, as far as `calls` can be run symbolically on `inputs`, `{slot: KerasTensor}`.

    None in a shape is an axis of unknown size.
    """
    declared = {None, *(tensor.shape[0] for tensor in inputs.values() if tensor.shape)}

    def resized(tensor):
        first = [batch_size if size in declared else size for size in tensor.shape[:1]]
        return keras.KerasTensor((*first, *tensor.shape[1:]), dtype=tensor.dtype, sparse=tensor.sparse)

    specs = {slot: resized(tensor) for slot, tensor in inputs.items() if tensor.shape}
    for call in calls:
        if not all(slot in specs for slot in call.inputs.values() if slot is not None):
            continue
        values = {tensor: specs.get(slot) for tensor, slot in call.inputs.items()}
        if isinstance(call, Conversion):
            spec = next(iter(values.values()))
            outputs = [keras.KerasTensor(spec.shape, dtype=call.reference.dtype, sparse=spec.sparse)]
        elif randomness.treats_rows_alike(call.operation) and all(
            spec.shape[:1] == (batch_size,) for spec in values.values() if spec is not None
        ):
            outputs = [resized(tensor) for tensor in call.node.outputs]
        else:
            args, kwargs = call.node.arguments.fill_in(values)
            try:
                outputs = tree.flatten(call.operation.compute_output_spec(*args, **kwargs))
            except Exception:  # Any: the shapes of what cannot be run stay unknown.
                continue
        specs.update(zip(call.outputs, outputs))
    return {slot: spec.shape for slot, spec in specs.items()}


def why_separate(calls, shapes=None):
    """Why the repeated `calls` must run one pass after another; None if they need not."""
    known = dict(_pairs(shapes)) if shapes else {}
    for call in calls:
        if not call.repeated:
            continue
        randomness.check_stateless(call.operation)
        layer = randomness.drawing_once_a_batch(call.operation)
        if layer is not None:
            return f"{layer.name!r} draws once for a whole batch"
        if _relates_rows(call, known):
            return f"{call.name!r} relates rows of a batch to each other"
    return None


def _relates_rows(call, known):
    """Whether an output row of `call` depends on several rows of the batch, as far as `known`, `{slot: shapes}`, tells.

    `known` has the shapes at both batch sizes of all tensors whose shapes could be found.
    """
    inputs = [slot for slot in call.inputs.values() if slot is not None]
    varying = [slot for slot in inputs if slot in known and known[slot][0] != known[slot][1]]
    if not varying or not all(slot in known for slot in inputs):
        return False
    if _axis_is_batch(call, known):
        return True
    if randomness.treats_rows_alike(call.operation) and all(follows_batch(known[slot]) for slot in inputs):
        return False
    # Rows that were cut into equal parts, such as (N · length, channels), are still on their own.
    return not all(slot in known and _is_proportional(known[slot]) for slot in call.outputs)


def _axis_is_batch(call, known):
    """Whether the operation works along the batch axis of a tensor."""
    axes = getattr(call.operation, "axis", None)
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    arguments = tree.flatten(call.node.arguments.args[:1]) if call.node is not None else []
    slots = [call.inputs.get(id(tensor)) for tensor in arguments]
    ranks = [len(known[slot][0]) for slot in slots if slot in known and follows_batch(known[slot])]
    return any(axis in (0, -rank) for axis in axes for rank in ranks)


def _is_proportional(pair):
    """Whether axis 0, and no other, grows with the batch. It may be unknown, as some layers declare it."""
    first, second = pair
    if not first or first[1:] != second[1:]:
        return False
    if None in (first[0], second[0]):
        return first[0] == second[0]
    return first[0] * BATCH_SIZES[1] == second[0] * BATCH_SIZES[0]


def follows_batch(pair):
    """Whether axis 0, and no other, is the batch, by a tensor's shapes at the two `BATCH_SIZES`."""
    first, second = pair
    return (first[:1], second[:1]) == tuple((size,) for size in BATCH_SIZES) and first[1:] == second[1:]


def _pairs(shapes):
    """`(slot, its shapes at the two batch sizes)` for all slots that are known at both."""
    first, second = shapes
    return [(slot, (shape, second[slot])) for slot, shape in first.items() if slot in second]
