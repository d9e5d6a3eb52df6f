# %% [markdown]
# # Translation from scratch
#
# A Transformer learns to translate from pairs of sentences alone: an encoder reads the source, a decoder writes the
# target. Translation is the task on which the paper gains most (section 3.1). Here a translator is trained with R-Drop,
# scored by BLEU, saved and loaded again. R-Drop is one line of that.
#
# In a copy of the repository, this installs what the page needs:
#
#     python -m pip install ".[tensorflow,tasks]"
#
# The page runs on every backend. It downloads 52,000 pairs of sentences from TED talks. The model has the size that the
# paper takes for such talks, so you want a GPU.

# %%
import json

import keras
import keras_hub
import sacrebleu
import tensorflow as tf
import tensorflow_datasets as tfds
import tokenizers

import rdrop_keras

DATASET = "ted_hrlr_translate/pt_to_en"
ALPHA = 5.0  # The weight of R-Drop. 0 is plain training.
EPOCHS = 60
PATIENCE = 5  # Epochs without a lower validation loss, after which training ends.
BATCH_SIZE = 128  # Of all devices together.
LEARNING_RATE = 5e-4
VOCABULARY_SIZE = 10_000
MAX_LENGTH = 64  # In tokens. Longer sentences are cut.
MODEL = {"num_layers": 6, "num_heads": 4, "hidden_dim": 512, "intermediate_dim": 1024, "dropout": 0.3}
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
# ## The data
#
# A row is a sentence and its translation.

# %%
train, validation, test = tfds.load(DATASET, split=["train", "validation", "test"], as_supervised=True)
pairs = [(source.decode(), target.decode()) for source, target in train.as_numpy_iterator()]
print(f"{len(pairs)} pairs to train on. The first: {' → '.join(pairs[0])}")

# %% [markdown]
# Both languages share one vocabulary of word pieces, which is learned from the pairs.

# %%
pieces = tokenizers.ByteLevelBPETokenizer()
special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
texts = (text for pair in pairs for text in pair)
pieces.train_from_iterator(texts, VOCABULARY_SIZE, special_tokens=special_tokens, show_progress=False)
pieces = json.loads(pieces.to_str())["model"]
tokenizer = keras_hub.models.BartTokenizer(pieces["vocab"], [" ".join(merge) for merge in pieces["merges"]])
preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(tokenizer, MAX_LENGTH, MAX_LENGTH)

# %% [markdown]
# ## The model, with R-Drop
#
# KerasHub's BART is the encoder-decoder Transformer that we need. Its weights are random. `RDropModel` wraps it: each
# batch passes through the model twice with different dropout, and the two predictions of every token are pulled
# together. What it returns is compiled and trained as the model would be.

# %%
with strategy.scope():
    backbone = keras_hub.models.BartBackbone(tokenizer.vocabulary_size(), **MODEL, max_sequence_length=MAX_LENGTH)
    translator = keras_hub.models.BartSeq2SeqLM(backbone)
    model = rdrop_keras.RDropModel(translator, alpha=ALPHA)

    num_steps = EPOCHS * (len(pairs) // BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, num_steps - num_steps // 10, warmup_target=LEARNING_RATE, warmup_steps=num_steps // 10
    )
    model.compile(
        keras.optimizers.Adam(learning_rate, beta_2=0.98, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        weighted_metrics=["accuracy"],
    )


# %% [markdown]
# ## Batches
#
# Each sentence is made into tokens once, and not anew in each epoch. Sentences of similar length share a batch, which
# is cut to the longest of them: padding would take half of the time.


# %%
def tokenize(rows):
    rows = rows.map(lambda source, target: {"encoder_text": source, "decoder_text": target})
    return rows.batch(BATCH_SIZE).map(preprocessor).unbatch().cache()


def length(inputs, labels=None, weights=None):
    masks = tf.stack([inputs["encoder_padding_mask"], inputs["decoder_padding_mask"]])
    return tf.reduce_max(tf.reduce_sum(tf.cast(masks, "int32"), axis=-1))


def cut(*batch):
    longest = (length(*batch) + 7) // 8 * 8
    return tf.nest.map_structure(lambda tensor: tensor[:, :longest], batch)


boundaries = list(range(9, MAX_LENGTH, 8))
sizes = [BATCH_SIZE] * (len(boundaries) + 1)
train = tokenize(train).shuffle(len(pairs), seed=SEED)
train = train.bucket_by_sequence_length(length, boundaries, sizes, drop_remainder=True).map(cut)
validation = tokenize(validation).batch(BATCH_SIZE, drop_remainder=True)

# %% [markdown]
# ## Training
#
# `BackupAndRestore` keeps the state of training: after an interruption the same page goes on where it was.
# `val_loss` is that of the translator alone, without R-Drop, so that it can be compared with plain training.

# %%
callbacks = [
    keras.callbacks.BackupAndRestore("translation_backup"),
    keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True, verbose=1),
]
history = model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks)

# %% [markdown]
# ## Translations
#
# The translator has been trained by its wrapper, and nothing of R-Drop is left in it. It takes the most likely token
# each time. `keras_hub.samplers.BeamSampler(5)` looks further ahead.

# %%
if keras.backend.backend() == "jax":
    keras.distribution.set_distribution(None)  # Several devices cannot share a few rows.
translator.preprocessor = preprocessor
translator.compile(sampler="greedy")
sources, references = zip(*[(source.decode(), target.decode()) for source, target in test.as_numpy_iterator()])
translations = translator.generate(list(sources))
bleu = sacrebleu.corpus_bleu(translations, [references])
print(f"BLEU of {len(sources)} test sentences: {bleu.score:.1f}")
for source, reference, translation in list(zip(sources, references, translations))[:5]:
    print(f"\n{source}\n  reference:   {reference}\n  translation: {translation}")

# %% [markdown]
# ## Saving
#
# The saved task is plain Keras and KerasHub. Its file does not hold the lengths of the preprocessor.

# %%
translator.save("translator.keras")
loaded = keras.models.load_model("translator.keras", compile=False)
loaded.preprocessor = preprocessor
loaded.compile(sampler="greedy")
print("\nThe loaded model:", loaded.generate(list(sources[:1]))[0])
