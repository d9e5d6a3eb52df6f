"""One case of `gpu.py`, in a process of its own: builds a network, makes its training step, and times it.

    KERAS_BACKEND=jax python gpu_case.py bert JAX RDropModel --lock FILE

It prints one line of JSON. Processes that compile share the lock; the one that is timed has it alone. It imports
nothing that needs TensorFlow.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import pathlib
import re
import signal
import statistics
import sys
import time

import keras
import numpy as np

import measure
import rdrop_keras
import two_calls
from gpu import DOUBLE, HEAD, LAST_OF_BODY, NETWORKS, PLAIN, RDROP, SNIPPET

SECONDS_TO_PREPARE, SECONDS_TO_TIME = 240, 120  # A process that takes longer is ended.
WARM_UP_STEPS = 3
ROUNDS, SECONDS_OF_A_ROUND, MOST_STEPS = 5, 0.3, 100


# ## Networks
def data(network, rows, sizes):
    """Random inputs and labels."""
    rng = np.random.default_rng(0)
    if "vocabulary" not in sizes:
        images = rng.normal(size=(rows, sizes["size"], sizes["size"], 3)).astype("float32")
        return images, rng.integers(0, sizes["classes"], rows).astype("int32")
    shape = rows, sizes["length"]
    words = rng.integers(1, sizes["vocabulary"], shape).astype("int32")
    inputs = {"token_ids": words, "padding_mask": np.ones(shape, "int32")}
    if network == "gpt2":
        return inputs, rng.integers(1, sizes["vocabulary"], shape).astype("int32")
    return {**inputs, "segment_ids": np.zeros(shape, "int32")}, rng.integers(0, 2, rows).astype("int32")


def bert(num_layers, num_heads, width, length, vocabulary):
    import keras_hub

    backbone = keras_hub.models.BertBackbone(
        vocabulary, num_layers, num_heads, width, 4 * width, max_sequence_length=length
    )
    return keras_hub.models.BertTextClassifier(backbone, 2, dropout=0.1)


def vit(num_layers, num_heads, width, size, patch, classes):
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        (size, size, 3),
        (patch, patch),
        num_layers,
        num_heads,
        width,
        4 * width,
        dropout_rate=0.1,
        attention_dropout=0.1,
        name="backbone",
    )
    return keras_hub.models.ViTImageClassifier(backbone, classes, dropout=0.1)


def gpt2(num_layers, num_heads, width, length, vocabulary):
    import keras_hub

    backbone = keras_hub.models.GPT2Backbone(
        vocabulary, num_layers, num_heads, width, 4 * width, dropout=0.1, max_sequence_length=length
    )
    return keras_hub.models.GPT2CausalLM(backbone)


def resnet(filters, blocks, size, classes):
    import keras_hub

    backbone = keras_hub.models.ResNetBackbone(
        [64],
        [7],
        stackwise_num_filters=list(filters),
        stackwise_num_blocks=list(blocks),
        stackwise_num_strides=[1, 2, 2, 2][: len(filters)],
        block_type="bottleneck_block",
        image_shape=(size, size, 3),
    )
    return keras_hub.models.ResNetImageClassifier(backbone, classes, dropout=0.2)


def keras_model(network, variant, sizes):
    """The compiled model of a variant; for the snippet the bare one, as it compiles by itself."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    task = {"bert": bert, "vit": vit, "gpt2": gpt2, "resnet": resnet}[network](**sizes)
    model = keras.Model(task.inputs, task.outputs)  # Without the preprocessing of a KerasHub task.
    if variant in (RDROP, HEAD):
        share = LAST_OF_BODY[network] if variant == HEAD else "deterministic"
        model = rdrop_keras.RDropModel(model, alpha=two_calls.ALPHA, share=share)
    if variant != SNIPPET:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(two_calls.LEARNING_RATE), loss)
        model.optimizer.build(model.trainable_variables)
    return model


# ## Steps
# Each function returns a step that returns its loss, a function that waits for it, and what there is to say.
def on_jax(network, variant, rows, sizes, lock):
    import jax

    model = keras_model(network, variant, sizes)
    batch = jax.device_put(data(network, rows, sizes))
    if variant == SNIPPET:
        program, state = two_calls.program_on_jax(model)
    else:
        program = model.train_step
        variables = (model.trainable_variables, model.non_trainable_variables)
        variables += (model.optimizer.variables, model.metrics_variables)
        state = tuple([variable.value for variable in each] for each in variables)
    with held(lock, fcntl.LOCK_SH):
        began = time.perf_counter()
        lowered = jax.jit(program, donate_argnums=0).lower(state, batch)
        traced = time.perf_counter()
        compiled = lowered.compile()
        compiled_at = time.perf_counter()
    memory = compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    found = {
        "seconds_to_trace": traced - began,
        "seconds_to_compile": compiled_at - traced,
        "program_MiB": (needed - memory.alias_size_in_bytes) / 2**20,
    }

    def step():
        nonlocal state
        result, state = compiled(state, batch)
        return result["loss"] if isinstance(result, dict) else result

    return step, jax.block_until_ready, found


def on_torch(network, variant, rows, sizes, lock):
    import torch

    model = keras_model(network, variant, sizes)
    batch = keras.tree.map_structure(keras.ops.convert_to_tensor, data(network, rows, sizes))
    if variant == SNIPPET:
        x, y = batch
        weights = [variable.value for variable in model.trainable_variables]
        step = two_calls.step_on_torch(lambda: model(x, training=True), weights, y.long())
    else:

        def step():
            return model.train_step(batch)["loss"]

    return step, wait_for_torch(torch), {}


def hugging_face(network, variant, rows, sizes, lock):
    """BERT or GPT-2 of `transformers` in a loop of PyTorch's own, under autocast."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"vocab_size": sizes["vocabulary"], "num_hidden_layers": sizes["num_layers"]}
    options |= {"num_attention_heads": sizes["num_heads"], "hidden_size": sizes["width"]}
    options |= {"max_position_embeddings": sizes["length"], "pad_token_id": 0}
    if network == "bert":
        config = transformers.BertConfig(**options, intermediate_size=4 * sizes["width"])
        model = transformers.BertForSequenceClassification(config)
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options, use_cache=False))
    model.to(device).train()
    x, y = data(network, rows, sizes)
    inputs = {
        name: torch.tensor(x[key], device=device)
        for key, name in (("token_ids", "input_ids"), ("padding_mask", "attention_mask"))
    }
    y = torch.tensor(y, device=device).long()

    def forward():
        return model(**inputs).logits

    autocast = functools.partial(torch.autocast, device, torch.bfloat16)
    if variant == SNIPPET:
        return two_calls.step_on_torch(forward, model.parameters(), y, autocast), wait_for_torch(torch), {}
    optimizer = torch.optim.SGD(model.parameters(), two_calls.LEARNING_RATE)

    def step():
        with autocast():
            loss = torch.nn.functional.cross_entropy(forward().flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, wait_for_torch(torch), {}


def wait_for_torch(torch):
    return lambda loss: torch.cuda.synchronize() if torch.cuda.is_available() else None


ENGINES = {"JAX": on_jax, "PyTorch": on_torch, "Hugging Face": hugging_face}


# ## Timing
@contextlib.contextmanager
def held(path, kind):
    """Holds the lock, alone or shared. Nothing limits the time that this waits for others."""
    left = signal.alarm(0)
    with path.open("w") as file:
        fcntl.flock(file, kind)
        signal.alarm(left)
        yield


def timed(step, wait, tiny):
    """The first step's seconds, and the median and quartiles of a step's over rounds of several."""

    def seconds_of(num_steps):
        began = time.perf_counter()
        for _ in range(num_steps):
            loss = step()
        wait(loss)
        if not abs(float(loss)) < float("inf"):
            raise ValueError(f"The loss must stay finite. Received: {float(loss)}.")
        return (time.perf_counter() - began) / num_steps

    first = seconds_of(1)
    seconds_of(1 if tiny else WARM_UP_STEPS)
    num_steps = 1 if tiny else min(MOST_STEPS, 1 + int(SECONDS_OF_A_ROUND / seconds_of(1)))
    rounds = [seconds_of(num_steps) for _ in range(2 if tiny else ROUNDS)]
    return {
        "seconds": statistics.median(rounds),
        "quartiles": statistics.quantiles(rounds, n=4, method="inclusive")[::2],
        "seconds_of_first_step": first,
    }


def peak_memory():
    """In MiB: of the device where it tells, else of the host."""
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    if "jax" in sys.modules:
        of_device = sys.modules["jax"].local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in of_device:
            return of_device["peak_bytes_in_use"] / 2**20
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("variant", choices=(PLAIN, DOUBLE, RDROP, HEAD, SNIPPET))
    parser.add_argument("--tiny", action="store_true", help="small networks, for a processor")
    parser.add_argument("--lock", type=pathlib.Path, required=True, metavar="FILE")
    args = parser.parse_args()
    if not args.tiny and " cores of " in measure.hardware():
        raise RuntimeError(
            f"{args.engine} must find a GPU. Received: {measure.hardware()}. With `--tiny` a processor will do."
        )
    # KerasHub would import it where it is, which takes seconds and a part of the card.
    sys.modules |= dict.fromkeys(("tensorflow", "tensorflow_text"))
    signal.alarm(SECONDS_TO_PREPARE)
    network = NETWORKS[args.network]
    rows = (2 if args.tiny else network["rows"]) * (2 if args.variant == DOUBLE else 1)
    sizes = network["tiny" if args.tiny else "sizes"]
    step, wait, found = ENGINES[args.engine](args.network, args.variant, rows, sizes, args.lock)
    with held(args.lock, fcntl.LOCK_EX):
        signal.alarm(SECONDS_TO_TIME)
        result = {**timed(step, wait, args.tiny), **found, "peak_MiB": peak_memory()}
    result = {name: measure.rounded(value) for name, value in result.items()}
    print(json.dumps({"rows": rows, **result, "provenance": measure.provenance()}))


if __name__ == "__main__":
    main()
