"""An example of a few neurons, as those in `benchmarks/` are made."""

import argparse
import time

import keras
import numpy as np

import experiment
import rdrop_keras

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


class Pause(keras.callbacks.Callback):
    """Leaves the time in which a test can kill the process between two epochs."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def on_epoch_end(self, epoch, logs=None):
        time.sleep(self.seconds)


def train(run):
    args = run.args
    with run.scope():
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(2)(keras.layers.Dropout(args.dropout)(inputs))
        model = trained = keras.Model(inputs, outputs)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.Adam(experiment.schedule(args, len(X)))
        model.compile(optimizer, loss, weighted_metrics=["accuracy"])
    x, y = experiment.whole_batches(args, X, Y)
    model.fit(
        x,
        y,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=experiment.filled(args, X[:61], Y[:61]),
        callbacks=[*run.callbacks(), Pause(args.pause)],
        verbose=run.verbose,
    )
    rows, *_ = experiment.filled(args, X, Y)
    outputs = model.predict(rows, batch_size=args.batch_size, verbose=0)[: len(Y)]
    return trained, {"accuracy": float((outputs.argmax(-1) == Y).mean())}


def parse_arguments():
    parser = argparse.ArgumentParser(prog="toy.py")
    parser.add_argument("--pause", type=float, default=0.0)
    experiment.add_flags(parser, alpha=1.0, dropout=0.2, epochs=2, batch_size=16, learning_rate=0.05)
    return experiment.parse(parser)


def main():
    args = parse_arguments()
    experiment.run_all(args, experiment.prepare(args), train)


if __name__ == "__main__":
    main()
