# %% [markdown]
# # Fine-tuning BART to write summaries
#
# BART, an encoder-decoder Transformer pretrained on English text, learns to sum up news with R-Drop, as in section 3.3
# of the paper. Its summaries are scored by ROUGE, and it is saved and loaded again. R-Drop is one line of that.
#
# In a copy of the repository, this installs what the page needs:
#
#     python -m pip install ".[tensorflow,tasks]"
#
# The page runs on every backend. It downloads 287,000 articles of CNN and the Daily Mail and the weights of BART, for
# which you want a GPU.

# %%
import keras
import keras_hub
import numpy as np
import tensorflow_datasets as tfds
from rouge_score import rouge_scorer

import rdrop_keras

DATASET, DOCUMENT, SUMMARY = "cnn_dailymail", "article", "highlights"  # And the columns that we need.
PRESET = "bart_base_en"  # Any BART of KerasHub, such as "bart_large_en".
ALPHA = 0.7  # The weight of R-Drop. 0 is plain training.
EPOCHS = 3
PATIENCE = 2  # Epochs without a lower validation loss, after which training ends.
BATCH_SIZE = 16
LEARNING_RATE = 3e-5
DOCUMENT_LENGTH, SUMMARY_LENGTH = 512, 128  # In tokens. Longer texts are cut.
SCORED_ROWS = 1000  # How many summaries are written and scored, which takes long.
SEED = 0

keras.utils.set_random_seed(SEED)

# %% [markdown]
# ## The model, with R-Drop
#
# This is the KerasHub task that you would train without R-Drop. `RDropModel` wraps it: each batch passes through BART
# twice with different dropout, and the two predictions of every token are pulled together. BART comes with dropout of
# 0.1 in every layer.

# %%
preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor.from_preset(
    PRESET, encoder_sequence_length=DOCUMENT_LENGTH, decoder_sequence_length=SUMMARY_LENGTH
)
summarizer = keras_hub.models.BartSeq2SeqLM.from_preset(PRESET, preprocessor=preprocessor)
model = rdrop_keras.RDropModel(summarizer, alpha=ALPHA)

# %% [markdown]
# ## The data
#
# A row is an article and its summary. The batches hold strings, under the names that the KerasHub task asks for. It
# makes tokens of them, and labels, which are the next tokens of the summary.

# %%
train, validation, test = tfds.load(DATASET, split=["train", "validation", "test"])


def batches(rows):
    rows = rows.map(lambda row: {"encoder_text": row[DOCUMENT], "decoder_text": row[SUMMARY]})
    return rows.batch(BATCH_SIZE, drop_remainder=True)


print(f"{len(train)} articles to train on.")
train = batches(train.shuffle(10_000, seed=SEED))
validation, test = batches(validation), batches(test.take(SCORED_ROWS))

# %% [markdown]
# ## Training
#
# What wraps the model is compiled and trained as the model would be. `val_loss` is that of BART alone, without R-Drop,
# so that it can be compared with plain training.

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
    weighted_metrics=["accuracy"],
)

callbacks = [
    keras.callbacks.BackupAndRestore("bart_backup"),  # After an interruption the same page goes on where it was.
    keras.callbacks.EarlyStopping(patience=PATIENCE, restore_best_weights=True, verbose=1),
]
history = model.fit(train, validation_data=validation, epochs=EPOCHS, callbacks=callbacks)

# %% [markdown]
# ## Summaries
#
# The summarizer has been trained by its wrapper, and nothing of R-Drop is left in it. It takes the most likely token
# each time. `keras_hub.samplers.BeamSampler(4)` looks further ahead.
#
# ROUGE counts what a summary shares with its reference: words, pairs of words, and the longest common subsequence. The
# score is the mean F1 over rows, times 100. `rougeLsum` is customary for these data, which have one sentence a line.

# %%
summarizer.compile(sampler="greedy")
rows = list(test.unbatch().as_numpy_iterator())
documents, references = ([row[name].decode() for row in rows] for name in ("encoder_text", "decoder_text"))
summaries = []
for i in range(0, len(documents), BATCH_SIZE):
    summaries += summarizer.generate(documents[i : i + BATCH_SIZE])

scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeLsum"], use_stemmer=True)
scores = [scorer.score(reference, summary) for reference, summary in zip(references, summaries)]
rouge = {name: 100 * np.mean([score[name].fmeasure for score in scores]) for name in scores[0]}
print(f"{len(summaries)} test rows:", ", ".join(f"{name} {value:.1f}" for name, value in rouge.items()))
for document, reference, summary in list(zip(documents, references, summaries))[:3]:
    print(f"\n{document[:500]}\n  reference: {reference}\n  summary:   {summary}")

# %% [markdown]
# ## Saving
#
# The saved task is plain Keras and KerasHub. Its file does not hold the lengths of the preprocessor.

# %%
summarizer.save("summarizer.keras")
loaded = keras.models.load_model("summarizer.keras", compile=False)
loaded.preprocessor = preprocessor
loaded.compile(sampler="greedy")
print("\nThe loaded model:", loaded.generate(documents[:1])[0])
