"""Searching for α, the dropout rate and `start` with KerasTuner, as one searches for any hyperparameter.

The three belong together: R-Drop acts on what dropout makes different, so the best rate with R-Drop is often not the
best without, and it may pay in the last part of training only. A random search trains a small classifier of handwritten
digits with one choice of the three at a time, and compares choices by the validation loss. With R-Drop that is the
plain loss of the wrapped model, so choices are comparable. The best model is then tested once.

It needs keras-tuner and scikit-learn, and takes about a minute on two CPU cores:

    python tune_alpha.py
    python tune_alpha.py --trials 30
"""

import argparse
import functools
import math
import pathlib
import tempfile

import keras
import keras_tuner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

NUM_TRAIN = 400
NUM_VALIDATION = 400
SPLIT_SEED = 0
BATCH_SIZE = 40
EPOCHS = 30
TRIALS = 12

# What is searched: the paper's range of α, and 0, which is plain training.
ALPHAS = (0.0, 0.3, 1.0, 3.0, 5.0)
DROPOUT_RATES = (0.1, 0.2, 0.3, 0.4)
# After which part of the steps R-Drop starts. The steps before are plain training.
STARTS = (0.0, 0.5, 0.75)


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16.0).astype("float32")
    x_train, x_rest, y_train, y_rest = train_test_split(
        images, labels, train_size=NUM_TRAIN, stratify=labels, random_state=SPLIT_SEED
    )
    x_validation, x_test, y_validation, y_test = train_test_split(
        x_rest, y_rest, train_size=NUM_VALIDATION, stratify=y_rest, random_state=SPLIT_SEED
    )
    return (x_train, y_train), (x_validation, y_validation), (x_test, y_test)


# ## The search space
#
# KerasTuner calls this function with the choices of one trial. R-Drop is one line of it. To search for your own model,
# copy the function and put your layers and your `compile` in.
def build_model(hyperparameters, num_steps):
    """The model of one trial, which is trained for `num_steps` steps."""
    dropout = hyperparameters.Choice("dropout", DROPOUT_RATES)
    alpha = hyperparameters.Choice("alpha", ALPHAS)
    start = hyperparameters.Choice("start", STARTS)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )
    model = rdrop_keras.RDropModel(model, alpha=alpha, start=int(start * num_steps))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.optimizer.build(model.trainable_variables)  # KerasTuner loads the state of the optimizer into its best model.
    return model


def main():
    parser = argparse.ArgumentParser(description="Searches for alpha, dropout and start.")
    parser.add_argument("--trials", type=int, default=TRIALS, help="choices tried (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    args = parser.parse_args()
    for name in ("trials", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be ≥ 1. Received: {getattr(args, name)}")

    train, validation, test = load_data()
    keras.utils.set_random_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:  # To be able to continue the search, use a folder that stays.
        tuner = keras_tuner.RandomSearch(
            functools.partial(build_model, num_steps=args.epochs * math.ceil(NUM_TRAIN / BATCH_SIZE)),
            objective=keras_tuner.Objective("val_loss", "min"),
            max_trials=args.trials,
            seed=args.seed,
            directory=str(pathlib.Path(folder)),
            project_name="tune_alpha",
        )
        tuner.search(*train, batch_size=BATCH_SIZE, epochs=args.epochs, validation_data=validation, verbose=0)

        print(f"\n{'alpha':>6} {'dropout':>8} {'start':>6} {'validation loss':>16}")
        for trial in tuner.oracle.get_best_trials(args.trials):
            values = trial.hyperparameters.values
            print(f"{values['alpha']:6} {values['dropout']:8} {values['start']:6} {trial.score:16.4f}")

        best = tuner.get_best_models(1)[0]
        loss, accuracy = best.evaluate(*test, verbose=0)
        print(f"\nThe best of them on the test split: loss {loss:.4f}, accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
