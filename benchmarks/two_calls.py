"""The README of the official repository: two calls of the model in a step, in a training loop of the backend's own.

On PyTorch it is that README's code; on JAX and TensorFlow, what their users make of it. The layers are those of Keras,
so that all else is what `RDropModel` trains.
"""

import contextlib
import functools

import keras
import numpy as np

ALPHA = 1.0
LEARNING_RATE = 1e-3


def loop(model, x, y):
    """A function that trains `model` for so many steps on the batch `x`, `y`, and returns the last loss."""
    make = {"tensorflow": _on_tensorflow, "jax": _on_jax, "torch": _on_torch}[keras.backend.backend()]
    inputs = keras.tree.map_structure(keras.ops.convert_to_tensor, x)
    step = make(model, inputs, keras.ops.convert_to_tensor(y.astype("int64" if make is _on_torch else "int32")))

    def train(num_steps):
        for _ in range(num_steps):
            loss = step()
        return float(np.asarray(keras.ops.convert_to_numpy(loss)))

    return train


def step_on_torch(forward, parameters, y, context=contextlib.nullcontext):
    """A step of that README: `forward()` returns logits, and is called twice; `context` is around all of the loss."""
    import torch

    F = torch.nn.functional  # noqa: N806 - as in the README, and in all code for PyTorch.
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE)

    def compute_kl_loss(p, q):
        p_loss = F.kl_div(F.log_softmax(p, dim=-1), F.softmax(q, dim=-1), reduction="none")
        q_loss = F.kl_div(F.log_softmax(q, dim=-1), F.softmax(p, dim=-1), reduction="none")
        return (p_loss.sum(-1).mean() + q_loss.sum(-1).mean()) / 2

    def cross_entropy_loss(logits):
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def step():
        with context():
            logits = forward()
            logits2 = forward()
            ce_loss = 0.5 * (cross_entropy_loss(logits) + cross_entropy_loss(logits2))
            loss = ce_loss + ALPHA * compute_kl_loss(logits, logits2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _on_torch(model, x, y):
    return step_on_torch(lambda: model(x, training=True), [variable.value for variable in model.trainable_variables], y)


def program_on_jax(model):
    """A function of `(state, (x, y))` to be compiled, which returns `(loss, state)`, and its first state."""
    import jax
    import jax.numpy as jnp

    def kl_loss(p, q):  # As in optax.
        target = jax.nn.softmax(q)
        logs = jnp.where(target == 0, 0, jnp.log(jnp.where(target == 0, 1, target)))
        return jnp.mean(jnp.sum(target * (logs - jax.nn.log_softmax(p)), axis=-1))

    def cross_entropy_loss(y, logits):
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], axis=-1))

    def loss_of(trainable, others, x, y):
        p, others = model.stateless_call(trainable, others, x, training=True)
        q, others = model.stateless_call(trainable, others, x, training=True)
        kl = (kl_loss(p, q) + kl_loss(q, p)) / 2
        return 0.5 * (cross_entropy_loss(y, p) + cross_entropy_loss(y, q)) + ALPHA * kl, others

    def two_calls(state, data):
        trainable, others = state
        (loss, others), gradients = jax.value_and_grad(loss_of, has_aux=True)(trainable, others, *data)
        return loss, ([w - LEARNING_RATE * g for w, g in zip(trainable, gradients)], others)

    weights = model.trainable_variables, model.non_trainable_variables
    return two_calls, tuple([variable.value for variable in variables] for variables in weights)


def _on_jax(model, x, y):
    import jax

    program, state = program_on_jax(model)
    compiled = jax.jit(program, donate_argnums=0)

    def step():
        nonlocal state
        loss, state = compiled(state, (x, y))
        return loss

    return step


def _on_tensorflow(model, x, y):
    import tensorflow as tf

    optimizer = keras.optimizers.SGD(LEARNING_RATE)

    def kl_loss(p, q):
        target = tf.nn.softmax(q)
        return tf.reduce_mean(tf.reduce_sum(tf.math.xlogy(target, target) - target * tf.nn.log_softmax(p), axis=-1))

    def cross_entropy_loss(y, logits):
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))

    @tf.function
    def step_of(x, y):
        with tf.GradientTape() as tape:
            p, q = model(x, training=True), model(x, training=True)
            kl = (kl_loss(p, q) + kl_loss(q, p)) / 2
            loss = 0.5 * (cross_entropy_loss(y, p) + cross_entropy_loss(y, q)) + ALPHA * kl
        weights = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, [weight.value for weight in weights]), weights))
        return loss

    return functools.partial(step_of, x, y)
