"""Which calls of a model run once for all passes, which run for each pass, and whether all passes can run together.

Comes in: the calls of a model, and the shapes of their tensors at two batch sizes. Goes out: marks on the calls. Called
by: `graph.PairedGraph`.
"""

import contextlib
import dataclasses
import difflib
from typing import Any

import keras
from keras import tree

from rdrop_keras import keras_private
from rdrop_keras.passes import randomness

# The batch sizes at which shapes are computed. An axis that follows both is the batch.
BATCH_SIZES = (2, 3)
# Sizes that are tried for axes of unknown size. The first suits a model with a longest sequence; the second can be
# halved. Neither is one of the batch sizes, so that an axis which has to be as long as the batch does not fit.
_UNKNOWN_SIZES = (5, 64)


@dataclasses.dataclass(eq=False)
class LayerCall:
    """One call of one operation.

    Attributes:
        name: The operation's name after those of the nested models that hold it: `"backbone/pooled_dense"`.
        operation: The layer or other `keras.Operation`.
        node: What Keras recorded of the call.
        inputs: `{id of a KerasTensor of the node: slot}`; a slot is a tensor's number in the graph.
        outputs: Slots of the flat outputs.
        repeated: Whether it runs for every pass.
        reason: Why it does, or why it does not.
        origin: The first repeated call that it follows, if it is repeated because of another.
    """

    name: str
    operation: keras.Operation
    node: Any
    inputs: dict[int, int | None]
    outputs: list[int]
    repeated: bool = False
    reason: str = "deterministic"
    origin: "LayerCall | None" = None

    @property
    def weights(self):
        """The weights of the operation, if it is a layer."""
        return getattr(self.operation, "weights", [])

    def repeat(self, reason):
        self.repeated = True
        self.reason = reason

    def follow(self, call):
        """Marks it as repeated because it uses an output of `call`."""
        self.origin = call.origin or call
        self.repeat(f"follows {self.origin.name}")


@dataclasses.dataclass(eq=False)
class Conversion(LayerCall):
    """How the nested model `operation` receives an input: converted to be like `reference`, the input it declares."""

    reference: Any = None


def up_to(share, calls):
    """The calls of the layer named `share`, and all calls on which they depend."""
    named = [call for call in calls if not isinstance(call, Conversion)]
    parts = [call.name.split("/") for call in named]  # The first are those of nested models.
    names = dict.fromkeys("/".join(each[:i]) for each in parts for i in range(1, len(each) + 1))
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
    """What the user may have meant by a name that fits no layer or several."""
    if paths:
        return f"More than one has it: {', '.join(map(repr, paths))}."
    if inside:
        return f"It is a part of {inside[0]!r}, which runs as a whole."
    return f"Close names: {', '.join(map(repr, close)) or 'none'}."


def mark(calls, once, share, known, outputs):
    """Marks which `calls` are repeated, never those in `once`, so that the slots `outputs` exist for every pass."""
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
    batch = {slot for slot, specs in known.items() if _follows_batch(_shapes(specs))}
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


def known_specs(calls, inputs):
    """`{slot: KerasTensors at the two BATCH_SIZES}` for all tensors whose shapes can be computed from `inputs`."""
    first, second = (_specs_at(size, calls, inputs) for size in BATCH_SIZES)
    return {slot: (spec, second[slot]) for slot, spec in first.items() if slot in second}


def _specs_at(batch_size, calls, inputs):
    """`{slot: KerasTensor}`, as layers declare them and operations compute them. An axis of unknown size is None."""
    declared = {None, *(tensor.shape[0] for tensor in inputs.values() if tensor.shape)}

    def resized(tensor):
        first = [batch_size if size in declared else size for size in tensor.shape[:1]]
        return _like(tensor, (*first, *tensor.shape[1:]))

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
            except Exception:  # Of any kind: the shapes of what cannot be run stay unknown.
                continue
        specs.update(zip(call.outputs, outputs))
    return specs


def why_separate(model, calls, known=None):
    """Why the repeated `calls` of `model` must run one pass after another; None if they need not."""
    if randomness.mixes_rows(model):
        return f"{model.name!r} declares rdrop_mixes_rows"
    for call in calls:
        if not call.repeated:
            continue
        randomness.check_stateless(call.operation)
        reason = randomness.why_rows_relate(call.operation)
        if reason is None and known and _relates_rows(call, known):
            reason = f"{call.name!r} relates rows of a batch to each other"
        if reason is not None:
            return reason
    return None


def _relates_rows(call, known):
    """Whether an output row of `call` may depend on several rows of the batch, as far as shapes tell."""
    inputs = [slot for slot in call.inputs.values() if slot is not None]
    if not all(slot in known for slot in inputs):
        return False  # An earlier call has unknown outputs.
    pairs = {slot: _shapes(known[slot]) for slot in inputs}
    varying = [slot for slot, (first, second) in pairs.items() if first != second]
    if not varying:
        return False
    if _axis_is_batch(call, pairs):
        return True
    if randomness.treats_rows_alike(call.operation) and all(map(_follows_batch, pairs.values())):
        return False

    # Rows that were cut into equal parts, such as (N · length, channels), are still independent.
    is_vouched_for = randomness.is_vouched_for(call.operation)
    has_unknown_axes = any(None in shape for pair in pairs.values() for shape in pair)
    if (is_vouched_for or not keras_private.declares_shape(call.operation)) and not has_unknown_axes:
        return not all(slot in known and _is_proportional(_shapes(known[slot])) for slot in call.outputs)

    def outputs(specs):
        if is_vouched_for:
            args, kwargs = call.node.arguments.fill_in(dict(zip(call.inputs, specs)))
            return call.operation.compute_output_spec(*args, **kwargs)
        return keras_private.output_spec_of_call(call.node, call.inputs, specs)

    specs = zip(*((None, None) if slot is None else known[slot] for slot in call.inputs.values()))
    return not _are_apart(outputs, list(specs), _is_proportional)


def relates_rows_of(model, inputs, training):
    """Whether an output row of `model`, called as a whole, may depend on several rows, as far as shapes tell."""

    def outputs(specs):
        return keras_private.output_spec(lambda x: keras_private.call(model, x, training), model.variables, specs)

    specs = [
        tree.map_structure(lambda x: None if x is None else _like(x, (size, *x.shape[1:])), inputs)  # noqa: B023
        for size in BATCH_SIZES
    ]
    return not _are_apart(outputs, specs, _follows_batch)


def _are_apart(outputs, specs, follow):
    """Whether all that `outputs` returns has rows that `follow` the rows of a batch.

    Args:
        outputs: A function from KerasTensors to KerasTensors. It runs what is examined, whatever shape that declares.
        specs: The arguments of `outputs` at the two `BATCH_SIZES`.
        follow: A function of a tensor's shapes at both sizes.
    """
    for unknown in _UNKNOWN_SIZES:
        with contextlib.suppress(Exception):  # Of any kind: it does not run at this size.
            flat = [tree.flatten(outputs(_filled(inputs, unknown))) for inputs in specs]
            shapes = [[spec.shape for spec in tensors if spec is not None] for tensors in flat]
            return all(map(follow, zip(*shapes)))
    # What does not run at another batch size cannot run on the rows of all passes. An example is a layer that takes
    # rows and a matrix that tells which of them are neighbours.
    return False


def _axis_is_batch(call, pairs):
    """Whether the operation works along the batch axis of a tensor; `pairs` are the shapes of its inputs."""
    axes = getattr(call.operation, "axis", None)
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    slots = [call.inputs.get(id(tensor)) for tensor in tree.flatten(call.node.arguments.args[:1])]
    ranks = [len(pairs[slot][0]) for slot in slots if slot in pairs and _follows_batch(pairs[slot])]
    return any(axis in (0, -rank) for axis in axes for rank in ranks)


def _is_proportional(pair):
    """Whether axis 0, and no other, grows with the batch. Its size may be unknown, as some layers declare it."""
    first, second = pair
    if not first or first[1:] != second[1:]:
        return False
    if None in (first[0], second[0]):
        return first[0] == second[0]
    return first[0] * BATCH_SIZES[1] == second[0] * BATCH_SIZES[0]


def _follows_batch(pair):
    """Whether axis 0, and no other, is the batch, by a tensor's shapes at the two `BATCH_SIZES`."""
    first, second = pair
    return (first[:1], second[:1]) == tuple((size,) for size in BATCH_SIZES) and first[1:] == second[1:]


def _shapes(specs):
    return tuple(spec.shape for spec in specs)


def _like(tensor, shape):
    return keras.KerasTensor(shape, dtype=tensor.dtype, sparse=getattr(tensor, "sparse", False))


def _filled(specs, size):
    """`specs` with `size` for axes of unknown size."""

    def filled(spec):
        return spec if spec is None else _like(spec, tuple(size if axis is None else axis for axis in spec.shape))

    return tree.map_structure(filled, specs)
