"""Text to be continued or translated: a small GPT-2 on WikiText-2, and a small BART on Multi30k, both from scratch."""

import gzip
import json

import numpy as np

from tasks import tables
from tasks.task import Task, crossentropy, perplexity, without_preprocessing

VOCABULARY_SIZE = 1000


def byte_pairs(texts, size, special_tokens=()):
    """Vocabulary and merges of byte-level byte-pair encoding, learned from `texts`."""
    import tokenizers

    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, size, special_tokens=list(special_tokens), show_progress=False)
    pieces = json.loads(trainer.to_str())["model"]
    return pieces["vocab"], [" ".join(pair) for pair in pieces["merges"]]


def rows_with_weights(preprocessor, texts):
    """What a KerasHub preprocessor makes of texts, as arrays."""
    x, y, weights = preprocessor(texts)
    return (
        {name: np.array(value, "int32") for name, value in x.items()},
        np.array(y, "int32"),
        np.array(weights, "float32"),
    )


def language_model(folder):
    """A GPT-2 of two layers on WikiText-2's validation text, in rows of 24 words."""
    import keras_hub

    length, num_words = 32, 24
    rows = {}
    for split, name, most in (("train", "train", 4000), ("validation", "valid", 400), ("test", "test", 800)):
        with gzip.open(folder / "wikitext2" / f"{name}.txt.gz", "rt", encoding="utf-8") as file:
            words = file.read().split()
        rows[split] = [" ".join(words[i : i + num_words]) for i in range(0, len(words), num_words)][:most]
    pieces, merges = byte_pairs(rows["train"], VOCABULARY_SIZE - 1)
    tokenizer = keras_hub.models.GPT2Tokenizer({**pieces, "<|endoftext|>": len(pieces)}, merges)
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=length)

    def build(dropout):
        backbone = keras_hub.models.GPT2Backbone(
            tokenizer.vocabulary_size(), 2, 2, 64, 128, dropout, max_sequence_length=length
        )
        return without_preprocessing(keras_hub.models.GPT2CausalLM(backbone))

    return Task(
        title="WikiText-2, GPT-2 from scratch",
        data={split: rows_with_weights(preprocessor, texts) for split, texts in rows.items()},
        build=build,
        loss=crossentropy("mean_with_sample_weight"),
        score=perplexity,
        batch_size=16,
        pilot_steps=1500,
        learning_rates=(1e-3, 2e-3, 4e-3),
        dropouts=(0.1, 0.2, 0.3),
        alphas=(0.1, 0.3, 1.0),
        shared={"half depth": "transformer_layer_0"},
        num_seeds=3,
    )


def translation(folder):
    """A BART of one layer in encoder and decoder on 3,000 captions of Multi30k, German to English."""
    import keras_hub

    length = 16
    texts = {}
    for split, name, most in (("train", "train", 3000), ("validation", "valid", 500), ("test", "test", None)):
        german, english = (column[:most] for column in tables.multi30k(folder, name))
        texts[split] = {"encoder_text": german, "decoder_text": english}
    specials = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    both = texts["train"]["encoder_text"] + texts["train"]["decoder_text"]
    tokenizer = keras_hub.models.BartTokenizer(*byte_pairs(both, VOCABULARY_SIZE, specials))
    preprocessor = keras_hub.models.BartSeq2SeqLMPreprocessor(tokenizer, length, length)

    def build(dropout):
        backbone = keras_hub.models.BartBackbone(
            tokenizer.vocabulary_size(), 1, 4, 64, 128, dropout, max_sequence_length=length
        )
        return without_preprocessing(keras_hub.models.BartSeq2SeqLM(backbone))

    return Task(
        title="Multi30k, BART from scratch",
        data={split: rows_with_weights(preprocessor, columns) for split, columns in texts.items()},
        build=build,
        loss=crossentropy("mean_with_sample_weight"),
        score=perplexity,
        batch_size=16,
        pilot_steps=2000,
        learning_rates=(1e-3, 2e-3),
        dropouts=(0.1, 0.2, 0.3),
        alphas=(0.3, 1.0, 3.0),
        num_seeds=2,
    )
