"""Machine translation with an encoder-decoder Transformer, plain and with R-Drop.

The paper's first task (its section 3.1): R-Drop with α = 5 on a Transformer with dropout 0.3 and label smoothing 0.1.
The model is made of KerasHub's layers and trained from scratch, the vocabulary is SentencePiece's, sentences are
decoded by KerasHub's samplers, greedily or over beams, and scored by sacrebleu.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=5.0, divergence=rdrop_keras.Divergence("kl", from_logits=True))

With a network, on TED talks or on WMT14, downloaded by tensorflow-datasets:

    python translation.py
    python translation.py --dataset wmt14_translate/de-en --strategy mirrored --mixed-precision mixed_bfloat16

On tables of your own, `train.tsv`, `validation.tsv` and perhaps `test.tsv` (also `.tsv.gz`), whose first line names the
two languages and whose other lines have a sentence in each, separated by a tab:

    python translation.py --data DIR --preset none --compare

It needs keras-hub, sacrebleu and sentencepiece, and tensorflow-datasets without `--data`.
"""

import argparse
import io
import pathlib

import keras
import keras_hub
import numpy as np
import sacrebleu
import sentencepiece
from keras import ops

import experiment
import rdrop_keras
import task_data
from beam_search import BeamSampler

# The paper's model for IWSLT14, and a small one that trains on a CPU.
PRESETS = {
    "transformer_iwslt_de_en": {"num_layers": 6, "hidden_dim": 512, "intermediate_dim": 1024, "num_heads": 4},
    "none": {"num_layers": 2, "hidden_dim": 128, "intermediate_dim": 512, "num_heads": 4},
}
VOCABULARY_SIZES = {"transformer_iwslt_de_en": 10_000, "none": 4_000}
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0
DECODING_BATCH = 96  # Of all devices, if there are several.
PAD, UNKNOWN, START, END = range(4)


# ## The data
#
# Pairs of sentences, as lists of strings. Which way to translate is a flag.
def load_data(args):
    """`{split: (sources, targets)}`, and the two languages."""
    if args.data is not None:
        tables = task_data.read_tables(args.data)
        languages = list(tables["train"])
    else:
        import tensorflow_datasets as tfds

        languages = list(tfds.builder(args.dataset).info.supervised_keys)
        splits = {split: split for split in ("train", "validation", "test")}
        tables = task_data.read_tfds(args.dataset, languages, splits, args.train_rows)
    source = languages[0] if args.source is None else args.source
    target = languages[1] if args.target is None else args.target
    if not {source, target} <= set(languages) or source == target:
        experiment.fail(
            f"--source and --target must be two of the languages {', '.join(languages)}. "
            f"Received: {source} and {target}"
        )
    pairs = {split: (table[source], table[target]) for split, table in tables.items()}
    pairs["train"] = tuple(texts[: args.train_rows] for texts in pairs["train"])
    return pairs, (source, target)


# ## The vocabulary
#
# One for both languages, so that the encoder, the decoder and the output can share their embeddings.
def train_tokenizer(pairs, vocabulary_size):
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*pairs[0], *pairs[1]]),
            model_writer=proto,
            vocab_size=vocabulary_size,
            model_type="bpe",
            pad_id=PAD,
            unk_id=UNKNOWN,
            bos_id=START,
            eos_id=END,
            minloglevel=2,
        )
    except RuntimeError as error:
        experiment.fail(f"--vocabulary-size {vocabulary_size} does not fit the training text: {error}")
    return proto.getvalue()


def tokenize(pairs, proto, max_length):
    """Token ids of the source and of the decoder's input, both `(n, max_length)`, and the labels with their weights."""
    sources = keras_hub.tokenizers.SentencePieceTokenizer(proto, sequence_length=max_length, add_eos=True)
    targets = keras_hub.tokenizers.SentencePieceTokenizer(
        proto, sequence_length=max_length + 1, add_bos=True, add_eos=True
    )
    source = ops.convert_to_numpy(sources(pairs[0])).astype("int32")
    target = ops.convert_to_numpy(targets(pairs[1])).astype("int32")
    # The decoder reads each word and is to say the next. Padding weighs nothing.
    labels = target[:, 1:]
    return {"source": source, "target": target[:, :-1]}, labels, (labels != PAD).astype("float32")


# ## The model
#
# A Functional model of KerasHub's layers, which R-Drop can wrap as it is. As a `Seq2SeqLM` it also generates: KerasHub
# compiles `generate_step` and its samplers call the decoder word by word, with the keys and values of the words before
# in a cache.
@keras.saving.register_keras_serializable("translation")
class Translator(keras_hub.models.Seq2SeqLM):
    """A Transformer (pre-layer normalization) from source tokens and target tokens to the logits of the next ones."""

    def __init__(
        self, vocabulary_size, max_length, num_layers, hidden_dim, intermediate_dim, num_heads, dropout, **kwargs
    ):
        embedding = keras_hub.layers.TokenAndPositionEmbedding(
            vocabulary_size,
            max_length,
            hidden_dim,
            embeddings_initializer=keras.initializers.RandomNormal(stddev=hidden_dim**-0.5),
            name="embedding",
        )
        block = {
            "intermediate_dim": intermediate_dim,
            "num_heads": num_heads,
            "dropout": dropout,
            "normalize_first": True,
        }
        encoder = [keras_hub.layers.TransformerEncoder(**block, name=f"encoder_{i}") for i in range(num_layers)]
        decoder = [keras_hub.layers.TransformerDecoder(**block, name=f"decoder_{i}") for i in range(num_layers)]
        encoder_norm = keras.layers.LayerNormalization(name="encoder_norm")
        decoder_norm = keras.layers.LayerNormalization(name="decoder_norm")

        source = keras.Input((max_length,), dtype="int32", name="source")
        target = keras.Input((max_length,), dtype="int32", name="target")
        words = ops.not_equal(source, PAD)  # The decoder needs no mask: its padding comes last, and weighs nothing.
        x = keras.layers.Dropout(dropout, name="source_dropout")(embedding(source))
        for layer in encoder:
            x = layer(x, padding_mask=words)
        x = encoder_norm(x)
        y = keras.layers.Dropout(dropout, name="target_dropout")(embedding(target))
        for layer in decoder:
            y = layer(y, x, encoder_padding_mask=words)
        logits = embedding.token_embedding(decoder_norm(y), reverse=True)
        super().__init__({"source": source, "target": target}, logits, compile=False, **kwargs)

        self.embedding, self.encoder, self.decoder = embedding, encoder, decoder
        self.encoder_norm, self.decoder_norm = encoder_norm, decoder_norm
        self.config = {
            "vocabulary_size": vocabulary_size,
            "max_length": max_length,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "dropout": dropout,
            "intermediate_dim": intermediate_dim,
            "num_heads": num_heads,
        }

    def get_config(self):
        return {**self.config, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def encode(self, source):
        x = self.embedding(source)
        for layer in self.encoder:
            x = layer(x, padding_mask=source != PAD)
        return self.encoder_norm(x)

    def decode(self, token, index, encoded, source, caches, cross_index):
        """Logits of what follows the token at `index`, and the caches with its keys and values."""
        y = self.embedding(token, start_index=index)
        updated = []
        for layer, (self_cache, cross_cache) in zip(self.decoder, caches):
            y, self_cache, cross_cache = layer(
                y,
                encoded,
                encoder_padding_mask=source != PAD,
                self_attention_cache=self_cache,
                self_attention_cache_update_index=index,
                cross_attention_cache=cross_cache,
                cross_attention_cache_update_index=cross_index,
            )
            updated.append((self_cache, cross_cache))
        return self.embedding.token_embedding(self.decoder_norm(y), reverse=True), updated

    def generate_step(self, inputs, stop_token_ids=None):
        """Translates a batch: what KerasHub compiles for `generate`."""
        source, prompt = inputs["source"], inputs["target"]
        encoded = self.encode(source)
        heads, width = self.config["num_heads"], self.config["hidden_dim"]
        cache = ops.zeros((ops.shape(source)[0], 2, source.shape[1], heads, width // heads), encoded.dtype)
        # One pass over the prompt, which is the start symbol alone, computes the keys and values of the source.
        _, caches = self.decode(prompt[:, :1], 0, encoded, source, [(cache, cache)] * len(self.decoder), 0)

        def next(prompt, state, index):
            encoded, source, caches = state
            token = ops.slice(prompt, (0, index - 1), (ops.shape(prompt)[0], 1))
            logits, caches = self.decode(token, index - 1, encoded, source, caches, None)
            return logits[:, 0], token, (encoded, source, caches)

        return self.sampler(
            next=next,
            prompt=prompt,
            cache=(encoded, source, caches),
            index=1,
            mask=prompt != PAD,
            stop_token_ids=stop_token_ids,
            model=self,
        )


# ## The loss
#
# Label smoothing over word indices. It is not one of Keras's losses, so R-Drop is told what the outputs are.
@keras.saving.register_keras_serializable("translation")
class SmoothedCrossentropy(keras.losses.Loss):
    """Cross-entropy with labels of `1 - smoothing` on the word and `smoothing` spread over the vocabulary."""

    def __init__(self, smoothing=LABEL_SMOOTHING, reduction="mean_with_sample_weight", name="smoothed", **kwargs):
        super().__init__(reduction=reduction, name=name, **kwargs)
        self.smoothing = smoothing

    def call(self, y_true, y_pred):
        log_probs = ops.log_softmax(y_pred)
        of_word = ops.take_along_axis(log_probs, ops.expand_dims(ops.cast(y_true, "int32"), -1), axis=-1)[..., 0]
        return -(1 - self.smoothing) * of_word - self.smoothing * ops.mean(log_probs, axis=-1)

    def get_config(self):
        return {**super().get_config(), "smoothing": self.smoothing}


# ## Training
#
# `run.alpha` is None for plain training. Both compile and fit alike.
def train(run, tokens, texts, proto, args):
    x, y, weights = experiment.whole_batches(args, *tokens["train"])
    with run.scope():
        translator = build_translator(args)
        model = experiment.trainable(translator)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha, rdrop_keras.Divergence("kl", from_logits=True))
        compile_model(model, experiment.schedule(args, len(y)), run.jit_compile)
    model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=experiment.filled(args, *tokens["validation"]),
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    return translator, score(translator, tokens, texts, proto, args)


def build_translator(args):
    return Translator(args.vocabulary_size, args.max_length, dropout=args.dropout, **PRESETS[args.preset])


def compile_model(model, learning_rate, jit_compile="auto"):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate, beta_2=0.98, epsilon=1e-9, clipnorm=CLIP_NORM),
        loss=SmoothedCrossentropy(),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
    )


# ## Translating, and its score
#
# Greedily, or with beams ranked by their mean log-probability a word. BLEU is sacrebleu's, of plain text.
def score(translator, tokens, texts, proto, args):
    scores = {}
    for split in ("validation", "test"):
        if split in texts:
            translations = translate(translator, tokens[split][0]["source"], proto, args.beams)
            scores[f"{split} BLEU"] = sacrebleu.corpus_bleu(translations, [texts[split][1]]).score
            example = f"{texts[split][0][0]}\n  -> {translations[0]}"
    print(example)
    return scores


def translate(translator, source, proto, beams=1):
    """Texts of source tokens `(n, max_length)`."""
    sampler = keras_hub.samplers.GreedySampler() if beams == 1 else BeamSampler(beams, PAD)
    translator.compile(optimizer=None, loss=None, weighted_metrics=None, sampler=sampler)
    prompt = np.zeros((DECODING_BATCH, source.shape[1]), "int32")
    prompt[:, 0] = START
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=proto)
    bar = experiment.progress(len(source), "sentence")
    translations = []
    for first in range(0, len(source), DECODING_BATCH):
        batch = source[first : first + DECODING_BATCH]
        num_rows = len(batch)
        # All batches have one shape, and are compiled once: the last is filled up with its first sentence.
        batch = np.concatenate([batch, np.repeat(batch[:1], DECODING_BATCH - num_rows, axis=0)])
        tokens = translator.generate({"source": batch, "target": prompt}, stop_token_ids=(END,))
        for row in np.asarray(tokens)[:num_rows].tolist():
            row = row[1 : row.index(END) if END in row else None]
            translations.append(tokenizer.decode([token for token in row if token != PAD]))
        bar.update(first + num_rows)
    return translations


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="folder of tables, in place of --dataset")
    parser.add_argument(
        "--dataset",
        default="ted_hrlr_translate/pt_to_en",
        help="a translation dataset of tensorflow-datasets, such as wmt14_translate/de-en (default: %(default)s)",
    )
    parser.add_argument("--source", help="language to translate from (default: the first of the data)")
    parser.add_argument("--target", help="language to translate into (default: the second)")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="transformer_iwslt_de_en",
        help="size of the model; none is a small one (default: %(default)s)",
    )
    parser.add_argument("--vocabulary-size", type=int, help="(default: 10000, or 4000 with --preset none)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a sentence (default: %(default)s)")
    parser.add_argument("--beams", type=int, default=5, help="1 decodes greedily (default: %(default)s)")
    experiment.add_flags(parser, alpha=5.0, dropout=0.3, epochs=60, batch_size=128, learning_rate=5e-4)
    args = experiment.parse(parser)
    if args.vocabulary_size is None:
        args.vocabulary_size = VOCABULARY_SIZES[args.preset]
    experiment.check_least(parser, args, vocabulary_size=5, max_length=2, beams=1)
    return args


def main():
    args = parse_arguments()
    scope = experiment.prepare(args)
    texts, (source, target) = load_data(args)
    sizes = ", ".join(f"{split} {len(pairs[0]):,}" for split, pairs in texts.items())
    print(f"Translating {source} to {target}. Sentences: {sizes}")
    proto = train_tokenizer(texts["train"], args.vocabulary_size)
    tokens = {split: tokenize(pairs, proto, args.max_length) for split, pairs in texts.items()}
    experiment.run_all(args, scope, lambda run: train(run, tokens, texts, proto, args))


if __name__ == "__main__":
    main()
