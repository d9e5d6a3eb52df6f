"""Language modelling with a decoder Transformer, plain and with R-Drop.

The paper's section 3.4: R-Drop with α = 1 on the Transformer of Baevski & Auli (2019), whose embeddings and softmax
give frequent words more of their parameters. The model is made of KerasHub's layers and trained from scratch, it is
scored by its perplexity a word, and it can go on with a text by KerasHub's samplers.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=1.0)

With a network, on articles of the English Wikipedia (wiki40b), downloaded by tensorflow-datasets. This is the paper's
model, for GPUs: over 100,000 words the logits of both passes of a batch take 6.6 GB, over the paper's 267,735 18 GB.

    python language_model.py
    python language_model.py --train-rows 300000 --vocabulary-size 267735 --batch-size 64 --strategy mirrored

On texts of your own, `train.txt`, `validation.txt` and perhaps `test.txt` (also `.txt.gz`), of words separated by
blanks, such as WikiText-2:

    python language_model.py --data DIR --preset none --compare --generate 20

It needs keras-hub, and tensorflow-datasets without `--data`.
"""

import argparse
import collections
import itertools
import math
import pathlib
import re

import keras
import keras_hub
import numpy as np
from keras import ops

import experiment
import rdrop_keras
import task_data

# The paper's model for WikiText-103, and a small one that trains on a CPU.
PRESETS = {
    "adaptive_wiki103": {"num_layers": 16, "hidden_dim": 1024, "intermediate_dim": 4096, "num_heads": 8},
    "none": {"num_layers": 2, "hidden_dim": 128, "intermediate_dim": 512, "num_heads": 4},
}
VOCABULARY_SIZES = {"adaptive_wiki103": 100_000, "none": 10_000}
BLOCK_LENGTHS = {"adaptive_wiki103": 512, "none": 64}
CUTOFFS = {"adaptive_wiki103": (20_000, 60_000), "none": (2_000, 6_000)}
MOST_CUTOFFS = 3
BAND_FACTOR = 4  # Each band of rarer words has embeddings this many times narrower.
CLIP_NORM = 1.0
DATASET = "wiki40b/en"
TRAIN_ARTICLES, SCORED_ARTICLES = 30_000, 500  # Of 2.9 million and twice 163,000.
PROMPT_WORDS = 10
TOP_K = 20  # Words among which a continuation is drawn.
WORDS_FIRST = ("<unk>", "<eos>")
UNKNOWN, END = range(2)


# ## The data
#
# Lines of words separated by blanks, as WikiText comes. Articles of wiki40b are brought into that form.
def load_data(args):
    """`{split: [line]}`."""
    if args.data is not None:
        splits = task_data.read_texts(args.data)
        splits["train"] = splits["train"][: args.train_rows]
        if not any(line.strip() for line in splits["train"]):
            experiment.fail(f"--train-rows must take in a line with words. Received: {args.train_rows}")
        return splits
    sources = {"train": "train", **{split: f"{split}[:{SCORED_ARTICLES}]" for split in ("validation", "test")}}
    tables = task_data.read_tfds(DATASET, ["text"], sources, args.train_rows or TRAIN_ARTICLES)
    return {split: [line for text in table["text"] for line in article_lines(text)] for split, table in tables.items()}


MARKERS = {"_START_ARTICLE_": "= {} =", "_START_SECTION_": "= = {} = =", "_START_PARAGRAPH_": "{}"}
WORD = re.compile(r"\w+|[^\w\s]")


def article_lines(text):
    """Lines of an article of wiki40b, with headings as WikiText writes them and punctuation as words of its own."""
    lines, form = [], "{}"
    for line in text.split("\n"):
        if line in MARKERS:
            form = MARKERS[line]
        else:
            lines += [form.format(" ".join(words)) for part in line.split("_NEWLINE_") if (words := WORD.findall(part))]
    return lines


# ## The vocabulary
#
# The most frequent words of the training text, the most frequent first, after the unknown word and the end of a line.
def build_vocabulary(lines, size):
    counts = collections.Counter(word for line in lines for word in line.split() if word not in WORDS_FIRST)
    return [*WORDS_FIRST, *(word for word, _ in counts.most_common(size - len(WORDS_FIRST)))]


def encode(lines, vocabulary):
    """The stream of word indices of all lines, each with its end."""
    indices = {word: index for index, word in enumerate(vocabulary)}
    words = (indices.get(word, UNKNOWN) for line in lines for word in [*line.split(), WORDS_FIRST[END]])
    return np.fromiter(words, "int32")


def cut(stream, block_length, multiple=1):
    """Blocks of a stream that the model reads, the words it is to say after each, and what these weigh.

    Each word of the stream is said once: the first after an end of line, all others after the word before. The last
    block is filled up with words that weigh nothing, and the blocks with such blocks to a multiple of `multiple`.

    Returns:
        Three arrays of shape `(blocks, block_length)`.
    """
    num_blocks = -(-len(stream) // (block_length * multiple)) * multiple
    padded = np.full(num_blocks * block_length + 1, END, "int32")
    padded[1 : len(stream) + 1] = stream
    weights = np.arange(num_blocks * block_length) < len(stream)
    return tuple(array.reshape(-1, block_length) for array in (padded[:-1], padded[1:], weights.astype("float32")))


# ## Adaptive embeddings and softmax
#
# Words are cut by frequency into bands. Embeddings of a rarer band are narrower and projected to the model's width. The
# softmax has two steps: over the words of the first band and the other bands, then over the words of a band. As in
# the paper it shares the embeddings and the projections, so both are one layer that goes both ways, as KerasHub's
# `ReversibleEmbedding`. R-Drop is told that it draws no random numbers, as it cannot see that in code of our own.
@keras.saving.register_keras_serializable("language_model")
class AdaptiveEmbedding(keras.layers.Layer):
    """Embeddings of words in bands, and in reverse the log-probabilities of all words.

    With hidden state h and, of band i, embeddings E_i and projection P_i, a word w of the first band and one of band i
    have the log-probabilities

        log softmax([E_0 P_0ᵀ h, C h])_w    and    log softmax([E_0 P_0ᵀ h, C h])_i + log softmax(E_i P_iᵀ h)_w

    where C h has one logit for each band but the first. Log-probabilities are logits of themselves: losses with
    `from_logits=True`, samplers and the divergence of R-Drop take them as they are. They are float32, whatever the
    precision of the model.

    Args:
        vocabulary_size: Number of words, numbered from the most frequent.
        hidden_dim: Width of the model, and of the embeddings of the first band.
        cutoffs: Where each band but the first begins.
    """

    rdrop_stochastic = False

    def __init__(self, vocabulary_size, hidden_dim, cutoffs, **kwargs):
        super().__init__(**kwargs)
        self.vocabulary_size, self.hidden_dim, self.cutoffs = vocabulary_size, hidden_dim, tuple(cutoffs)

    def build(self, input_shape):
        self.tables, self.projections = [], []
        for i, (first, end) in enumerate(self.bands()):
            width = self.hidden_dim // BAND_FACTOR**i
            normal = keras.initializers.RandomNormal(stddev=width**-0.5)
            self.tables.append(self.add_weight((end - first, width), normal, name=f"table_{i}"))
            self.projections.append(self.add_weight((width, self.hidden_dim), "glorot_uniform", name=f"projection_{i}"))
        self.clusters = self.add_weight((self.hidden_dim, len(self.cutoffs)), "glorot_uniform", name="clusters")

    def bands(self):
        return itertools.pairwise([0, *self.cutoffs, self.vocabulary_size])

    def call(self, inputs, reverse=False):
        return self.log_probs(inputs) if reverse else self.embed(inputs)

    def embed(self, words):
        vectors = 0.0
        for (first, end), table, projection in zip(self.bands(), self.tables, self.projections):
            of_band = ops.cast(ops.logical_and(words >= first, words < end), table.dtype)
            rows = ops.take(table, ops.clip(words - first, 0, end - first - 1), axis=0)
            vectors = vectors + ops.matmul(rows * of_band[..., None], projection)
        return vectors

    def log_probs(self, hidden):
        bands = [
            ops.matmul(ops.matmul(hidden, ops.transpose(projection)), ops.transpose(table))
            for table, projection in zip(self.tables, self.projections)
        ]
        head = ops.concatenate([bands[0], ops.matmul(hidden, self.clusters)], axis=-1)
        head = ops.log_softmax(ops.cast(head, "float32"))
        parts = [head[..., : self.cutoffs[0]]]
        for i, band in enumerate(bands[1:], self.cutoffs[0]):
            parts.append(head[..., i : i + 1] + ops.log_softmax(ops.cast(band, "float32")))
        return ops.concatenate(parts, axis=-1)

    def get_config(self):
        config = {"vocabulary_size": self.vocabulary_size, "hidden_dim": self.hidden_dim, "cutoffs": self.cutoffs}
        return {**super().get_config(), **config}


# ## The model
#
# A Functional model of KerasHub's layers, which R-Drop can wrap as it is. As a `CausalLM` it also generates: KerasHub
# compiles `generate_step` and its samplers call the decoder word by word, with the keys and values of the words before
# in a cache.
@keras.saving.register_keras_serializable("language_model")
class LanguageModel(keras_hub.models.CausalLM):
    """A Transformer (pre-layer normalization) from blocks of words to the logits of the next ones."""

    def __init__(
        self,
        vocabulary_size,
        block_length,
        num_layers,
        hidden_dim,
        intermediate_dim,
        num_heads,
        dropout,
        cutoffs=(),
        **kwargs,
    ):
        normal = keras.initializers.RandomNormal(stddev=hidden_dim**-0.5)
        if cutoffs:
            embedding = AdaptiveEmbedding(vocabulary_size, hidden_dim, cutoffs, name="embedding")
        else:
            embedding = keras_hub.layers.ReversibleEmbedding(
                vocabulary_size, hidden_dim, embeddings_initializer=normal, name="embedding"
            )
        positions = keras_hub.layers.PositionEmbedding(block_length, initializer=normal, name="positions")
        decoder = [
            keras_hub.layers.TransformerDecoder(
                intermediate_dim, num_heads, dropout=dropout, normalize_first=True, name=f"decoder_{i}"
            )
            for i in range(num_layers)
        ]
        norm = keras.layers.LayerNormalization(name="norm")

        words = keras.Input((block_length,), dtype="int32", name="words")
        x = embedding(words)
        x = keras.layers.Dropout(dropout, name="dropout")(x + positions(x))
        for layer in decoder:
            x = layer(x)
        super().__init__(words, embedding(norm(x), reverse=True), compile=False, **kwargs)

        self.embedding, self.positions, self.decoder, self.norm = embedding, positions, decoder, norm
        self.config = {
            "vocabulary_size": vocabulary_size,
            "block_length": block_length,
            "num_layers": num_layers,
            "hidden_dim": hidden_dim,
            "intermediate_dim": intermediate_dim,
            "num_heads": num_heads,
            "dropout": dropout,
            "cutoffs": tuple(cutoffs),
        }

    def get_config(self):
        return {**self.config, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def decode(self, words, index, caches):
        """Hidden states of the words from `index` on, and the caches with their keys and values."""
        x = self.embedding(words)
        x = x + self.positions(x, start_index=index)
        updated = []
        for layer, cache in zip(self.decoder, caches):
            x, cache = layer(x, self_attention_cache=cache, self_attention_cache_update_index=index)
            updated.append(cache)
        return self.norm(x), updated

    def generate_step(self, inputs, stop_token_ids=None):
        """Goes on with a batch of texts up to their blocks' ends: what KerasHub compiles for `generate`."""
        words, known = inputs["words"], inputs["known"]
        heads, width = self.config["num_heads"], self.config["hidden_dim"]
        cache = ops.zeros((ops.shape(words)[0], 2, words.shape[1], heads, width // heads), self.compute_dtype)
        _, caches = self.decode(words, 0, [cache] * len(self.decoder))

        def next(words, caches, index):
            word = ops.slice(words, (0, index - 1), (ops.shape(words)[0], 1))
            hidden, caches = self.decode(word, index - 1, caches)
            return self.embedding(hidden, reverse=True)[:, 0], hidden, caches

        return self.sampler(
            next=next,
            prompt=words,
            cache=caches,
            index=ops.min(ops.sum(ops.cast(known, "int32"), axis=1)),
            mask=known,
            stop_token_ids=stop_token_ids,
            model=self,
        )


# ## Training
#
# `run.alpha` is None for plain training. Both compile and fit alike.
def train(run, streams, vocabulary, args):
    x, y, weights = experiment.whole_batches(args, *cut(streams["train"], args.block_length))
    with run.scope():
        language_model = build_language_model(args, len(vocabulary))
        model = experiment.trainable(language_model)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, alpha=run.alpha)
        compile_model(model, experiment.schedule(args, len(y)), run.jit_compile)
    model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=args.batch_size,
        epochs=args.epochs,
        validation_data=cut(streams["validation"], args.block_length, args.batch_size),
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    scores = score(run, language_model, streams, args)
    if args.generate:
        split = "test" if "test" in streams else "validation"
        print(go_on(language_model, streams[split][:PROMPT_WORDS], vocabulary, run.seed, args))
    return language_model, scores


def build_language_model(args, vocabulary_size):
    return LanguageModel(
        vocabulary_size, args.block_length, dropout=args.dropout, cutoffs=args.cutoffs, **PRESETS[args.preset]
    )


def compile_model(model, learning_rate, jit_compile="auto"):
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate, beta_2=0.98, clipnorm=CLIP_NORM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight"),
        jit_compile=jit_compile,
    )


# ## Perplexity
#
# The exponential of the mean negative log-likelihood a word, over all words of a split. A block knows nothing of the
# one before, so that a longer `--block-length` has a lower perplexity.
def score(run, language_model, streams, args):
    with run.scope():
        # With alpha=0 it is the model itself, which can be evaluated on several workers too.
        model = rdrop_keras.RDropModel(experiment.trainable(language_model), alpha=0)
        nll = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="nll")
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), weighted_metrics=[nll])
    scores = {}
    for split in ("validation", "test"):
        if split in streams:
            x, y, weights = cut(streams[split], args.block_length, args.batch_size)
            logs = model.evaluate(
                x, y, sample_weight=weights, batch_size=args.batch_size, verbose=run.verbose, return_dict=True
            )
            scores[f"{split} perplexity"] = perplexity(logs["nll"])
    return scores


def perplexity(nll):
    return math.inf if nll > 700 else math.exp(nll)  # Of more it would be above the largest float.


# ## Going on with a text
#
# Words are drawn among the likeliest. The batch is that of training, of one text, as it is what the devices can share.
def go_on(language_model, prompt, vocabulary, seed, args):
    """The text of the word indices `prompt` and the `args.generate` words that the model says after them."""
    length = len(prompt) + args.generate
    words = np.full((args.batch_size, length), END, "int32")
    words[:, : len(prompt)] = prompt
    known = np.broadcast_to(np.arange(length) < len(prompt), words.shape)
    sampler = keras_hub.samplers.TopKSampler(k=min(TOP_K, len(vocabulary)), seed=seed)
    language_model.compile(optimizer=None, loss=None, weighted_metrics=None, sampler=sampler)
    text = language_model.generate({"words": words, "known": known}, stop_token_ids=None)[0]
    said = [" ".join(vocabulary[word] for word in part) for part in (text[: len(prompt)], text[len(prompt) :])]
    return f"{said[0]}\n  -> {said[1]}"


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help=f"folder of texts, in place of {DATASET}")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        default="adaptive_wiki103",
        help="size of the model; none is a small one (default: %(default)s)",
    )
    parser.add_argument(
        "--adaptive",
        type=int,
        nargs="*",
        metavar="CUTOFF",
        help="adaptive embeddings and softmax, with bands that begin at these words (default: 20000 60000, or with "
        "--preset none only if the flag is given, 2000 6000)",
    )
    parser.add_argument(
        "--vocabulary-size", type=int, help="words at most, <unk> and <eos> included (default: 100000, or 10000)"
    )
    parser.add_argument("--block-length", type=int, help="words a block (default: 512, or 64 with --preset none)")
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help=f"say N words after the first {PROMPT_WORDS} of the test"
    )
    experiment.add_flags(parser, alpha=1.0, dropout=0.1, epochs=10, batch_size=16, learning_rate=5e-4)
    args = experiment.parse(parser)
    if args.vocabulary_size is None:
        args.vocabulary_size = VOCABULARY_SIZES[args.preset]
    if args.block_length is None:
        args.block_length = BLOCK_LENGTHS[args.preset]
    is_adaptive = args.adaptive is not None or args.preset != "none"
    args.cutoffs = tuple(args.adaptive or CUTOFFS[args.preset]) if is_adaptive else ()
    experiment.check_least(parser, args, vocabulary_size=len(WORDS_FIRST) + 1, block_length=1, generate=0)
    if args.generate and args.generate + PROMPT_WORDS > args.block_length:
        most = max(0, args.block_length - PROMPT_WORDS)
        parser.error(f"--generate must be ≤ {most}, --block-length less {PROMPT_WORDS}. Received: {args.generate}")
    increases = all(a < b for a, b in itertools.pairwise((0, *args.cutoffs)))
    if not increases or len(args.cutoffs) > MOST_CUTOFFS:
        received = " ".join(map(str, args.cutoffs))
        parser.error(f"--adaptive must be 1 to {MOST_CUTOFFS} increasing numbers ≥ 1. Received: {received}")
    return args


def main():
    args = parse_arguments()
    scope = experiment.prepare(args)
    texts = load_data(args)
    vocabulary = build_vocabulary(texts["train"], args.vocabulary_size)
    if args.cutoffs and args.cutoffs[-1] >= len(vocabulary):
        experiment.fail(
            f"--adaptive must have cutoffs below the {len(vocabulary):,} words of the vocabulary. "
            f"Received: {' '.join(map(str, args.cutoffs))}"
        )
    streams = {split: encode(lines, vocabulary) for split, lines in texts.items()}
    sizes = ", ".join(f"{split} {len(stream):,}" for split, stream in streams.items())
    print(f"Words, of {len(vocabulary):,} different ones: {sizes}")
    experiment.run_all(args, scope, lambda run: train(run, streams, vocabulary, args))


if __name__ == "__main__":
    main()
