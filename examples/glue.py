# %% [markdown]
# # Fine-tuning BERT on GLUE
#
# GLUE is a benchmark of tasks on English sentences. In MRPC a model is given two, and tells whether they say the same.
# Here a pretrained BERT learns it with R-Drop, as in section 3.2 of the paper, is scored as GLUE does, saved and
# loaded again. R-Drop is one line of that.
#
# In a copy of the repository, this installs what the page needs:
#
#     python -m pip install ".[tensorflow,tasks]"
#
# The page runs on every backend. It downloads the sentences and the weights of BERT, and on a GPU it takes minutes.

# %%
import keras
import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from sklearn import metrics

import rdrop_keras

TASK = "glue/mrpc"
TEXTS = ("sentence1", "sentence2")
NUM_CLASSES = 2
PRESET = "bert_base_en"  # Any BERT or RoBERTa of KerasHub, such as "roberta_base_en".
ALPHA = 1.0  # The weight of R-Drop. The paper chooses among 0.1, 0.5 and 1 for each task. 0 is plain training.
EPOCHS = 4
BATCH_SIZE = 32  # Of all devices together.
LEARNING_RATE = 3e-5
SEQUENCE_LENGTH = 128  # In tokens. Longer texts are cut.
SEED = 0

keras.utils.set_random_seed(SEED)

# %% [markdown]
# This cell lets all devices share each batch: on JAX GPUs or TPUs, on TensorFlow GPUs. On one device it changes
# nothing. [Distributed training](../distributed.md) has more ways.

# %%
if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(keras.distribution.DataParallel())
several = keras.backend.backend() == "tensorflow" and len(tf.config.list_logical_devices("GPU")) > 1
strategy = tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()

# %% [markdown]
# ## The model, with R-Drop
#
# This is the KerasHub task that you would train without R-Drop. `RDropModel` wraps it: each batch passes through BERT
# twice with different dropout, and the two predictions of every row are pulled together. BERT comes with dropout of
# 0.1. To a model that comes without, `rdrop_keras.with_dropout` gives some.

# %%
with strategy.scope():
    preprocessor = keras_hub.models.TextClassifierPreprocessor.from_preset(PRESET, sequence_length=SEQUENCE_LENGTH)
    classifier = keras_hub.models.TextClassifier.from_preset(PRESET, num_classes=NUM_CLASSES, preprocessor=preprocessor)
    model = rdrop_keras.RDropModel(classifier, alpha=ALPHA)

print(rdrop_keras.sharing(model).summary)

# %% [markdown]
# ## The data
#
# A row is two sentences and a label. The batches hold strings, which the KerasHub task makes into tokens.

# %%
train, validation = tfds.load(TASK, split=["train", "validation"])
train = train.map(lambda row: (tuple(row[name] for name in TEXTS), row["label"]))
validation = validation.map(lambda row: (tuple(row[name] for name in TEXTS), row["label"]))
(first, second), label = next(train.as_numpy_iterator())
print(f"{len(train)} rows to train on. The first, of class {label}:\n{first.decode()}\n{second.decode()}")

train = train.cache().shuffle(10_000, seed=SEED).batch(BATCH_SIZE, drop_remainder=True)
validation = validation.batch(BATCH_SIZE)

# %% [markdown]
# ## Training
#
# What wraps the model is compiled and trained as the model would be. The loss tells R-Drop to compare two passes by the
# KL divergence of their classes. Of a model that predicts a number, as for STS-B, with `NUM_CLASSES = 1` and the loss
# `"mean_squared_error"`, it compares the numbers. `val_loss` is that of BERT alone, without R-Drop, so that it can be
# compared with plain training.

# %%
learning_rate = keras.optimizers.schedules.PolynomialDecay(LEARNING_RATE, EPOCHS * len(train), 0.0)
with strategy.scope():
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.01, clipnorm=1.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])

callbacks = [
    keras.callbacks.BackupAndRestore("glue_backup"),  # After an interruption the same page goes on where it was.
    keras.callbacks.EarlyStopping(patience=EPOCHS, restore_best_weights=True, verbose=1),
]
history = model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks)

# %% [markdown]
# ## The score
#
# GLUE scores MRPC by accuracy and F1. `metrics.matthews_corrcoef` is its score of CoLA.

# %%
labels = np.array([label for _, label in validation.unbatch().as_numpy_iterator()])
classes = model.predict(validation).argmax(axis=-1)
accuracy, f1 = metrics.accuracy_score(labels, classes), metrics.f1_score(labels, classes)
print(f"Accuracy {accuracy:.3f} and F1 {f1:.3f} on {len(labels)} rows.")

# %% [markdown]
# ## Saving
#
# The trained classifier is plain Keras and KerasHub: nothing of R-Drop is left in it. Its file holds the tokenizer too.
# `model.export("bert")` writes it for TensorFlow Serving.

# %%
classifier.save("classifier.keras")
loaded = keras.models.load_model("classifier.keras", compile=False)
if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(None)  # Several devices cannot share a few rows.
pair = ["The company said profits rose by a third."], ["Profits are up 33 percent, the company said."]
print("Class by the model:", classifier.predict(pair, verbose=0).argmax(), end=", ")
print("by the loaded one:", loaded.predict(pair, verbose=0).argmax())
