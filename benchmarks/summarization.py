"""Abstractive summarization with BART, plain and with R-Drop.

The paper's third task (its section 3.3): BART is fine-tuned on the news of CNN/DailyMail with R-Drop, α = 0.7. Here
KerasHub's `BartSeq2SeqLM` is, with the cross-entropy of the next token. It writes the summaries by its own `generate`,
over beams or greedily, and rouge-score scores them.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=0.7)

With a network, weights and data are downloaded by KerasHub and tensorflow-datasets:

    python summarization.py --mixed-precision mixed_bfloat16
    python summarization.py --preset bart_large_en --batch-size 8 --compare

On tables of your own, `train.tsv`, `validation.tsv` and perhaps `test.tsv` (also `.tsv.gz`), with a line of the column
names `document` and `summary` and then one row a line, separated by tabs. `--preset` can be a folder that KerasHub's
`save_to_preset` wrote; with `none` a small BART is trained from scratch, which asks for a higher learning rate:

    python summarization.py --data DIR --preset DIR
    python summarization.py --data DIR --preset none --epochs 10 --batch-size 32 --learning-rate 2e-3 --compare

It needs keras-hub, tokenizers and rouge-score, and tensorflow-datasets without `--data`.
"""

import argparse
import json
import pathlib

import keras
import keras_hub
import numpy as np
import tokenizers
from keras import ops
from rouge_score import rouge_scorer

import experiment
import rdrop_keras
import task_data
from beam_search import BeamSampler

DATASET, DATASET_COLUMNS = "cnn_dailymail", ("article", "highlights")
COLUMNS = ("document", "summary")
# The backbone of `--preset none`, and the flags' defaults for it and for a preset.
SMALL = {"num_layers": 2, "num_heads": 4, "hidden_dim": 128, "intermediate_dim": 512}
SMALL_DEFAULTS = {"vocabulary_size": 6_000, "document_length": 96, "summary_length": 24}
PRESET_DEFAULTS = {"document_length": 1_024, "summary_length": 128}
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
WEIGHT_DECAY = 0.01
CLIP_NORM = 0.1
TOKENIZING_ROWS = 1_000
DECODING_BATCH = 16


# ## The data
#
# Documents and their summaries, as lists of strings. A summary of CNN/DailyMail has one sentence a line.
def load_data(args):
    """`{split: (documents, summaries)}`."""
    if args.data is not None:
        columns, tables = COLUMNS, task_data.read_tables(args.data, COLUMNS)
    else:
        columns = DATASET_COLUMNS
        splits = {split: split for split in ("train", "validation", "test")}
        tables = task_data.read_tfds(DATASET, columns, splits, args.train_rows)
    texts = {split: tuple(table[column] for column in columns) for split, table in tables.items()}
    texts["train"] = tuple(column[: args.train_rows] for column in texts["train"])
    return texts


# ## Tokens
#
# The preprocessor of the preset, or one with a byte-level BPE vocabulary of the training text. It makes the inputs of
# the encoder and of the decoder, the labels, and their weights: padding weighs nothing.
def load_preprocessor(args, texts):
    lengths = {"encoder_sequence_length": args.document_length, "decoder_sequence_length": args.summary_length}
    if args.preset == "none":
        return keras_hub.models.BartSeq2SeqLMPreprocessor(train_tokenizer(texts, args.vocabulary_size), **lengths)
    try:
        return keras_hub.models.BartSeq2SeqLMPreprocessor.from_preset(args.preset, **lengths)
    except (FileNotFoundError, ValueError) as error:
        experiment.fail(f"--preset {args.preset} cannot be used as a BartSeq2SeqLM: {error}")


def train_tokenizer(texts, vocabulary_size):
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        (text for column in texts for text in column),
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    bpe = json.loads(trainer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    return keras_hub.models.BartTokenizer(bpe["vocab"], merges)


def tokenize(texts, preprocessor):
    """Inputs, labels and their weights, as arrays: a dict and two arrays of shape `(n, summary length)`."""
    parts = []
    for first in range(0, len(texts[0]), TOKENIZING_ROWS):  # As lists, all tokens of a corpus would fill the memory.
        documents, summaries = (column[first : first + TOKENIZING_ROWS] for column in texts)
        x, labels, weights = preprocessor({"encoder_text": documents, "decoder_text": summaries})
        x, labels = keras.tree.map_structure(lambda tokens: ops.convert_to_numpy(tokens).astype("int32"), (x, labels))
        parts.append((x, labels, ops.convert_to_numpy(weights).astype("float32")))
    return keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)


# ## The model
#
# A preset has its own rate of dropout; here it is what `--dropout` says, in every layer of the backbone, which is all
# of the model.
def build_summarizer(args, preprocessor):
    if args.preset == "none":
        backbone = keras_hub.models.BartBackbone(
            preprocessor.tokenizer.vocabulary_size(),
            **SMALL,
            dropout=args.dropout,
            max_sequence_length=max(args.document_length, args.summary_length),
        )
    else:
        backbone = keras_hub.models.BartBackbone.from_preset(args.preset, dropout=args.dropout)
    for name in ("document_length", "summary_length"):
        if getattr(args, name) > backbone.max_sequence_length:
            experiment.fail(
                f"--{name.replace('_', '-')} must be ≤ the {backbone.max_sequence_length} tokens of "
                f"--preset {args.preset}. Received: {getattr(args, name)}"
            )
    return keras_hub.models.BartSeq2SeqLM(backbone, preprocessor)


# ## Training
#
# `run.alpha` is None for plain training. Both compile and fit alike.
def train(run, arrays, texts, preprocessor, args):
    x, labels, weights = experiment.whole_batches(args, *arrays["train"])
    with run.scope():
        summarizer = build_summarizer(args, preprocessor)
        model = experiment.trainable(summarizer)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha)
        compile_model(model, experiment.schedule(args, len(labels)), run.jit_compile)
    model.fit(
        x,
        labels,
        sample_weight=weights,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=experiment.filled(args, *arrays["validation"]),
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    return summarizer, score(summarizer, texts, args)


def compile_model(model, learning_rate, jit_compile="auto"):
    model.compile(
        optimizer=keras.optimizers.AdamW(learning_rate, weight_decay=WEIGHT_DECAY, global_clipnorm=CLIP_NORM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
    )


# ## Writing summaries
#
# `generate` takes texts and gives texts.
def summarize(summarizer, documents, beams=1):
    """Summaries of documents, as texts."""
    if beams == 1:
        sampler = keras_hub.samplers.GreedySampler()
    else:
        sampler = BeamSampler(beams, summarizer.preprocessor.tokenizer.pad_token_id)
    summarizer.compile(optimizer=None, loss=None, weighted_metrics=None, sampler=sampler)
    bar = experiment.progress(len(documents), "document")
    summaries = []
    for first in range(0, len(documents), DECODING_BATCH):
        batch = documents[first : first + DECODING_BATCH]
        num_rows = len(batch)
        # All batches have one shape, and are compiled once: the last is filled up with its first document.
        batch = batch + batch[:1] * (DECODING_BATCH - num_rows)
        summaries += summarizer.generate(batch)[:num_rows]
        bar.update(first + num_rows)
    return summaries


# ## Their score
#
# ROUGE F1 × 100, with stemming, averaged over the documents. ROUGE-L is rouge-score's `rougeLsum`, customary for
# CNN/DailyMail: the longest common subsequences of each line of one summary with the lines of the other, together. For
# summaries of one line it is `rougeL`. Writing takes long, so only the first `--score-rows` rows of a split are scored.
def score(summarizer, texts, args):
    scores = {}
    for split in ("validation", "test"):
        if split in texts:
            documents, references = (column[: args.score_rows] for column in texts[split])
            print(f"Scoring the first {len(documents):,} of {len(texts[split][0]):,} {split} rows")
            summaries = summarize(summarizer, documents, args.beams)
            for name, value in rouge(references, summaries).items():
                scores[f"{split} {name}"] = value
            example = f"{documents[0][:500]}\n  -> {summaries[0]}"
    print(example)
    return scores


def rouge(references, summaries):
    kinds = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeLsum"}
    scorer = rouge_scorer.RougeScorer(list(kinds.values()), use_stemmer=True)
    rows = [scorer.score(reference, summary) for reference, summary in zip(references, summaries)]
    return {name: 100 * float(np.mean([row[kind].fmeasure for row in rows])) for name, kind in kinds.items()}


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of tables, in place of CNN/DailyMail")
    parser.add_argument(
        "--preset",
        default="bart_base_en",
        help="of KerasHub, such as bart_large_en, or the folder of one; none is a small BART, not pretrained "
        "(default: %(default)s)",
    )
    parser.add_argument("--vocabulary-size", type=int, help="of --preset none (default: 6000)")
    parser.add_argument("--document-length", type=int, help="tokens (default: 1024, or 96 with --preset none)")
    parser.add_argument("--summary-length", type=int, help="tokens (default: 128, or 24 with --preset none)")
    parser.add_argument("--beams", type=int, default=4, help="1 decodes greedily (default: %(default)s)")
    parser.add_argument(
        "--score-rows", type=int, default=1_000, metavar="N", help="score the first N of a split (default: %(default)s)"
    )
    experiment.add_flags(parser, alpha=0.7, dropout=0.1, epochs=3, batch_size=16, learning_rate=3e-5)
    args = experiment.parse(parser)
    if args.preset != "none" and args.vocabulary_size is not None:
        parser.error(f"--vocabulary-size is for --preset none: --preset {args.preset} has its own vocabulary")
    for name, value in (SMALL_DEFAULTS if args.preset == "none" else PRESET_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    # At least all bytes and special tokens; and a token between those of the start and of the end.
    experiment.check_least(parser, args, vocabulary_size=256 + len(SPECIAL_TOKENS), document_length=3, summary_length=4)
    experiment.check_least(parser, args, beams=1, score_rows=1)
    return args


def main():
    args = parse_arguments()
    scope = experiment.prepare(args)
    texts = load_data(args)
    sizes = ", ".join(f"{split} {len(columns[0]):,}" for split, columns in texts.items())
    print(f"Documents with a summary: {sizes}")
    preprocessor = load_preprocessor(args, texts["train"])
    print(f"Tokenizing, with {preprocessor.tokenizer.vocabulary_size():,} tokens")
    arrays = {split: tokenize(columns, preprocessor) for split, columns in texts.items() if split != "test"}
    experiment.run_all(args, scope, lambda run: train(run, arrays, texts, preprocessor, args))


if __name__ == "__main__":
    main()
