# %% [markdown]
# # Searching for α
#
# α, the dropout rate and `start` belong together: R-Drop acts on what dropout makes different, so the best rate with
# R-Drop is often not the best without, and R-Drop may pay in the last part of training only. KerasTuner searches for
# the three as for any hyperparameter, by the validation loss. With R-Drop that is the plain loss of the wrapped model,
# so all choices can be compared.
#
# In a copy of the repository, this installs what the page needs. The page then takes about a minute on a processor.
#
#     python -m pip install ".[tensorflow,examples]"

# %%
import tempfile

import keras
import keras_tuner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

ALPHAS = (0.0, 0.3, 1.0, 3.0, 5.0)  # The paper's range, and 0, which is plain training.
DROPOUT_RATES = (0.1, 0.2, 0.3, 0.4)
STARTS = (0.0, 0.5, 0.75)  # The part of training after which R-Drop begins. The steps before are plain training.
TRIALS = 12
EPOCHS = 30
BATCH_SIZE = 40
NUM_TRAIN = 400
SEED = 0

keras.utils.set_random_seed(SEED)

# %% [markdown]
# ## The search space
#
# KerasTuner calls this function with the choices of one trial. R-Drop is one line of it. To search for a model of your
# own, put its layers and its `compile` in.


# %%
def build_model(hyperparameters):
    alpha = hyperparameters.Choice("alpha", ALPHAS)
    dropout = hyperparameters.Choice("dropout", DROPOUT_RATES)
    start = hyperparameters.Choice("start", STARTS)
    classifier = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(10),
        ]
    )
    num_steps = EPOCHS * NUM_TRAIN // BATCH_SIZE
    model = rdrop_keras.RDropModel(classifier, alpha=alpha, start=int(start * num_steps))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.optimizer.build(model.trainable_variables)  # KerasTuner loads the optimizer's state into its best model.
    return model


# %% [markdown]
# ## The search
#
# The data are handwritten digits: 400 to train on, 400 to choose by, 997 to test with.

# %%
x, y = load_digits(return_X_y=True)
x_train, x, y_train, y = train_test_split(x / 16.0, y, train_size=NUM_TRAIN, stratify=y, random_state=0)
x_valid, x_test, y_valid, y_test = train_test_split(x, y, train_size=400, stratify=y, random_state=0)

with tempfile.TemporaryDirectory() as folder:  # To go on with a search another time, use a folder that stays.
    tuner = keras_tuner.RandomSearch(
        build_model,
        objective=keras_tuner.Objective("val_loss", "min"),
        max_trials=TRIALS,
        seed=SEED,
        directory=folder,
        project_name="tune_alpha",
    )
    options = {"validation_data": (x_valid, y_valid), "epochs": EPOCHS, "batch_size": BATCH_SIZE, "verbose": 0}
    tuner.search(x_train, y_train, **options)
    best = tuner.get_best_models(1)[0]

# %% [markdown]
# ## The best of them
#
# The best model is tested once.

# %%
print(f"{'alpha':>6} {'dropout':>8} {'start':>6} {'validation loss':>16}")
for trial in tuner.oracle.get_best_trials(TRIALS):
    values = trial.hyperparameters.values
    print(f"{values['alpha']:6} {values['dropout']:8} {values['start']:6} {trial.score:16.4f}")

loss, accuracy = best.evaluate(x_test, y_test, verbose=0)
print(f"\nThe best of them on the test split: loss {loss:.4f}, accuracy {accuracy:.4f}")
