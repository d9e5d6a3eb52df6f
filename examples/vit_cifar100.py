# %% [markdown]
# # Fine-tuning a vision Transformer on CIFAR-100
#
# A ViT that was trained on ImageNet learns the hundred classes of CIFAR-100 with R-Drop, as in section 3.4 of the
# paper. It comes without dropout, as most pretrained models do, and R-Drop needs some: one line gives it. Another is
# R-Drop.
#
# In a copy of the repository, this installs what the page needs:
#
#     python -m pip install ".[tensorflow,tasks]"
#
# The page runs on every backend. It downloads the images and the weights of the ViT, for which you want a GPU.

# %%
import keras
import keras_hub
import tensorflow as tf
import tensorflow_datasets as tfds

import rdrop_keras

DATASET, NUM_CLASSES = "cifar100", 100
PRESET = "vit_base_patch16_224_imagenet"  # Any ViT of KerasHub.
ALPHA = 0.6  # The weight of R-Drop. 0 is plain training.
DROPOUT = 0.1
EPOCHS = 10
PATIENCE = 3  # Epochs without a lower validation loss, after which training ends.
BATCH_SIZE = 128  # Of all devices together.
LEARNING_RATE = 1e-4
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
# ## The model, with dropout and R-Drop
#
# The KerasHub task gets a new head for these classes. `with_dropout` returns the same model, with the same weights and
# dropout at a rate of 0.1 where the ViT has places for it. `RDropModel` wraps that: each batch passes through the
# model twice, and the two predictions of every image are pulled together.

# %%
with strategy.scope():
    classifier = keras_hub.models.ImageClassifier.from_preset(PRESET, num_classes=NUM_CLASSES, activation=None)
    classifier = rdrop_keras.with_dropout(classifier, DROPOUT)
    model = rdrop_keras.RDropModel(classifier, alpha=ALPHA)

print(rdrop_keras.sharing(model).summary)

# %% [markdown]
# ## The data
#
# Of 50,000 images to train on, a tenth is kept for validation. Some are mirrored, here and not in the model: so both
# passes of R-Drop see the same image, and differ by dropout alone. The KerasHub task resizes and scales the images.

# %%
splits = ["train[:90%]", "train[90%:]", "test"]
(train, validation, test), info = tfds.load(DATASET, split=splits, as_supervised=True, with_info=True)
names = info.features["label"].names
print(f"{len(train)} images to train on, of {names[0]}, {names[1]}, {names[2]} …")


def to_float(image, label):
    return tf.cast(image, "float32"), label  # Integers would be rounded when they are resized.


def mirror(image, label):
    return tf.image.random_flip_left_right(image), label


train = train.cache().shuffle(10_000, seed=SEED).map(to_float).map(mirror).batch(BATCH_SIZE, drop_remainder=True)
validation, test = validation.map(to_float).batch(BATCH_SIZE), test.map(to_float).batch(BATCH_SIZE)

# %% [markdown]
# ## Training
#
# What wraps the model is compiled and trained as the model would be. `val_loss` is that of the ViT alone, without
# R-Drop, so that it can be compared with plain training.

# %%
num_steps = EPOCHS * len(train)
learning_rate = keras.optimizers.schedules.CosineDecay(
    0.0, num_steps - num_steps // 10, warmup_target=LEARNING_RATE, warmup_steps=num_steps // 10
)
with strategy.scope():
    model.compile(
        keras.optimizers.AdamW(learning_rate, weight_decay=0.01, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )

callbacks = [
    keras.callbacks.BackupAndRestore("vit_backup"),  # After an interruption the same page goes on where it was.
    keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True, verbose=1),
]
history = model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks)
loss, accuracy = model.evaluate(test, verbose=0)
print(f"{len(list(test.unbatch()))} test images: loss {loss:.3f}, accuracy {accuracy:.3f}.")

# %% [markdown]
# ## Saving
#
# The trained classifier is plain Keras and KerasHub: nothing of R-Drop is left in it. On TensorFlow
# `model.export("vit")` writes it for TensorFlow Serving.

# %%
classifier.save("classifier.keras")
loaded = keras.models.load_model("classifier.keras", compile=False)
if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(None)  # Several devices cannot share a few rows.
images, labels = next(iter(test))
print("Three images are:            ", *(names[label] for label in labels[:3]))
print("They are to the model:       ", *(names[i] for i in classifier.predict(images[:3], verbose=0).argmax(axis=-1)))
print("And to the loaded model:     ", *(names[i] for i in loaded.predict(images[:3], verbose=0).argmax(axis=-1)))
