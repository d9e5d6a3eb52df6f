# %% [markdown]
# # Fine-tuning GPT-2 on Wikipedia
#
# A language model tells which word comes next. GPT-2, pretrained on pages of the web, learns the language of Wikipedia
# with R-Drop, as in section 3.5 of the paper. It is scored by its perplexity, continues a text, and is saved and loaded
# again. R-Drop is one line of that.
#
# In a copy of the repository, this installs what the page needs:
#
#     python -m pip install ".[tensorflow,tasks]"
#
# The page runs on every backend. It downloads articles and the weights of GPT-2, for which you want a GPU.

# %%
import math
import re

import keras
import keras_hub
import tensorflow as tf
import tensorflow_datasets as tfds

import rdrop_keras

DATASET = "wiki40b/en"
SPLITS = ["train[:30000]", "validation[:500]", "test[:500]"]  # Articles, of 2.9 million and twice 163,000.
PRESET = "gpt2_base_en"  # Any GPT-2 of KerasHub, such as "gpt2_medium_en".
ALPHA = 1.0  # The weight of R-Drop. 0 is plain training.
EPOCHS = 3
PATIENCE = 2  # Epochs without a lower validation loss, after which training ends.
BATCH_SIZE = 16
LEARNING_RATE = 5e-5
WORDS = 100  # Of a row of text.
SEQUENCE_LENGTH = 192  # In tokens. Longer rows are cut.
PROMPT = "The film was released in"
SEED = 0

keras.utils.set_random_seed(SEED)

# %% [markdown]
# ## The model, with R-Drop
#
# This is the KerasHub task that you would train without R-Drop. `RDropModel` wraps it: each batch passes through GPT-2
# twice with different dropout, and the two predictions of every token are pulled together. GPT-2 comes with dropout of
# 0.1 in every layer.

# %%
preprocessor = keras_hub.models.CausalLMPreprocessor.from_preset(PRESET, sequence_length=SEQUENCE_LENGTH)
language_model = keras_hub.models.CausalLM.from_preset(PRESET, preprocessor=preprocessor)
model = rdrop_keras.RDropModel(language_model, alpha=ALPHA)

# %% [markdown]
# ## The data
#
# A row is a hundred words of an article. The marks between the parts of an article are left out. The batches hold
# strings, of which the KerasHub task makes tokens, and labels, which are the next tokens.


# %%
def rows_of(articles):
    text = " ".join(article["text"].decode() for article in articles.as_numpy_iterator())
    words = re.sub(r"_(START_[A-Z]+|NEWLINE)_", " ", text).split()
    return tf.data.Dataset.from_tensor_slices([" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)])


train, validation, test = map(rows_of, tfds.load(DATASET, split=SPLITS))
print(f"{len(train)} rows to train on. The first: {next(train.as_numpy_iterator()).decode()[:300]}")

train = train.shuffle(len(train), seed=SEED).batch(BATCH_SIZE, drop_remainder=True)
validation, test = validation.batch(BATCH_SIZE), test.batch(BATCH_SIZE)

# %% [markdown]
# ## Training
#
# What wraps the model is compiled and trained as the model would be. The loss is a mean over the tokens that are not
# padding. The metric `nll` is the same mean over all batches together, and the perplexity its exponential. `val_loss`
# is that of GPT-2 alone, without R-Drop, so that it can be compared with plain training.

# %%
num_steps = EPOCHS * len(train)
learning_rate = keras.optimizers.schedules.CosineDecay(
    0.0, num_steps - num_steps // 10, warmup_target=LEARNING_RATE, warmup_steps=num_steps // 10
)
optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.01, clipnorm=1.0)
optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
model.compile(
    optimizer,
    keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
    weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")],
)

callbacks = [
    keras.callbacks.BackupAndRestore("gpt2_backup"),  # After an interruption the same page goes on where it was.
    keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True, verbose=1),
]
history = model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks)
perplexity = math.exp(model.evaluate(test, verbose=0, return_dict=True)["nll"])
print(f"Perplexity of a token of the test articles: {perplexity:.2f}")

# %% [markdown]
# ## A text
#
# The language model has been trained by its wrapper, and nothing of R-Drop is left in it. It generates as it always
# does: here it draws each token among the twenty most likely.

# %%
language_model.compile(sampler=keras_hub.samplers.TopKSampler(20, seed=SEED))
print(language_model.generate(PROMPT, max_length=SEQUENCE_LENGTH // 2))

# %% [markdown]
# ## Saving
#
# The file holds the tokenizer too.

# %%
language_model.save("language_model.keras")
loaded = keras.models.load_model("language_model.keras", compile=False)
loaded.compile(sampler="greedy")
print("The loaded model:", loaded.generate(PROMPT, max_length=20))
