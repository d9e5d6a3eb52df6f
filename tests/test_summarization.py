"""`benchmarks/summarization.py`, on packages made here: a summary says what a document begins with."""

import itertools

import keras
import keras_hub
import numpy as np
import pytest

import experiment
import summarization

KINDS, THINGS = ("fast", "small", "free", "portable"), ("game", "shell", "editor", "player")
SIZES = {"train": 192, "validation": 32, "test": 20}
TINY = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "intermediate_dim": 32}
LENGTHS = ("--document-length", 16, "--summary-length", 8)
FLAGS = (*LENGTHS, "--batch-size", 32, "--learning-rate", 1e-2)
SMALL = ("--preset", "none", "--vocabulary-size", 300, *FLAGS)


def make_texts(size, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(rng.choice(KINDS), rng.choice(THINGS)) for _ in range(size)]
    return [f"It is a {kind} {thing}. More at home." for kind, thing in rows], [" ".join(row) for row in rows]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for seed, (split, size) in enumerate(SIZES.items()):
        lines = ["summary\tdocument"] + [f"{summary}\t{text}" for text, summary in zip(*make_texts(size, seed))]
        (folder / f"{split}.tsv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def parse(monkeypatch):
    def parse(*flags):
        monkeypatch.setattr("sys.argv", ["summarization.py", *map(str, flags)])
        return summarization.parse_arguments()

    return parse


@pytest.fixture
def summarizer(parse, monkeypatch):
    """Not trained, with weights so large, above all where it attends to the document, that it says different things."""
    monkeypatch.setattr(summarization, "SMALL", TINY)
    args = parse(*SMALL)
    summarizer = summarization.build_summarizer(args, summarization.load_preprocessor(args, make_texts(64)))
    for weight in summarizer.trainable_weights:
        if len(weight.shape) > 1:
            weight.assign((100 if "cross_attention" in weight.path else 10) * weight)
    return summarizer


@pytest.fixture
def preset(summarizer, tmp_path):
    """A folder as `--preset`, of a BART with dropout 0.1."""
    summarizer.save_to_preset(str(tmp_path / "preset"))
    return tmp_path / "preset"


def dropout_rates(summarizer):
    return {layer.rate for layer in summarizer._flatten_layers() if isinstance(layer, keras.layers.Dropout)}


# ## Runs
def ngram_f1(reference, summary, n):
    """Of lists of words, by counting."""
    grams = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in (reference, summary)]
    common = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
    return 2 * common / max(1, len(grams[0]) + len(grams[1]))


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_is_scored(run_example, data, monkeypatch, capsys):
    monkeypatch.setattr(summarization, "SMALL", TINY)
    written, summarize = [], summarization.summarize

    def recorded(summarizer, documents, beams):
        written.append(summarize(summarizer, documents, beams))
        return written[-1]

    monkeypatch.setattr(summarization, "summarize", recorded)
    flags = ("--data", data, *SMALL, "--epochs", 12, "--score-rows", 24, "--beams", 2, "--compare", "--alpha", 0.5)
    plain, rdrop = run_example(summarization, *flags)
    for run in (plain, rdrop):
        assert run["curves"]["val_loss"][-1] < 0.5 * run["curves"]["val_loss"][0]
    assert "consistency_loss" in rdrop["curves"] and "consistency_loss" not in plain["curves"]
    references = {split: make_texts(SIZES[split], seed)[1][:24] for split, seed in (("validation", 1), ("test", 2))}
    for run, (split, summaries) in zip((plain, plain, rdrop, rdrop), zip(("validation", "test") * 2, written)):
        assert len(summaries) == {"validation": 24, "test": 20}[split]
        for n in (1, 2):
            scores = [ngram_f1(a.split(), b.split(), n) for a, b in zip(references[split], summaries)]
            assert run["scores"][f"{split} ROUGE-{n}"] == pytest.approx(100 * np.mean(scores))
        assert run["scores"][f"{split} ROUGE-1"] > 30 and f"{split} ROUGE-L" in run["scores"]
    output = capsys.readouterr().out
    assert "Scoring the first 24 of 32 validation rows" in output and "Scoring the first 20 of 20 test rows" in output
    assert "R-Drop (alpha=0.5)" in output
    assert (data.parent / "summarization.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_preset_is_fine_tuned(run_example, data, preset):
    flags = ("--data", data, "--preset", preset, *FLAGS, "--epochs", 2, "--score-rows", 4, "--beams", 1)
    (run,) = run_example(summarization, *flags)
    assert run["alpha"] == 0.7
    assert run["curves"]["loss"][-1] < run["curves"]["loss"][0]


# ## The data and its tokens
def test_default_data_is_of_tensorflow_datasets(parse):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=8):
        texts = summarization.load_data(parse("--train-rows", 5))
    assert {split: (len(a), len(b)) for split, (a, b) in texts.items()} == {
        "train": (5, 5),
        "validation": (8, 8),
        "test": (8, 8),
    }
    assert all(isinstance(text, str) for text in texts["train"][0])


def test_tables_are_read_by_their_columns(parse, data):
    texts = summarization.load_data(parse("--data", data, *SMALL, "--train-rows", 7))
    for seed, (split, size) in enumerate({**SIZES, "train": 7}.items()):
        expected = make_texts(SIZES[split], seed)
        assert texts[split] == tuple(column[:size] for column in expected)


def test_vocabulary_is_of_the_training_text():
    tokenizer = summarization.train_tokenizer(make_texts(64), 300)
    assert [tokenizer.token_to_id(token) for token in summarization.SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    assert tokenizer.vocabulary_size() == 300
    tokens = {i: token for token, i in tokenizer.vocabulary.items()}
    ids = np.asarray(tokenizer("It is a free game.")).tolist()
    assert "".join(tokens[i] for i in ids).replace("Ġ", " ") == "It is a free game."
    assert len(ids) < len("It is a free game.") / 2  # Of 300 tokens 39 are more than a byte.
    assert tokenizer.detokenize(tokenizer("naïve ∑ 字")) == "naïve ∑ 字"


def test_arrays_are_those_of_bart(summarizer, monkeypatch):
    """The decoder reads `</s> <s> words </s>` and is to say what comes next; padding weighs nothing."""
    texts = make_texts(5)
    texts[1][2] = " ".join(KINDS * 3)  # Too long.
    tokenizer = summarizer.preprocessor.tokenizer
    monkeypatch.setattr(summarization, "TOKENIZING_ROWS", 2)
    x, labels, weights = summarization.tokenize(texts, summarizer.preprocessor)
    for row, (document, summary) in enumerate(zip(*texts)):
        ids = np.asarray(tokenizer(document)).tolist()[:14]
        expected = [0, *ids, 2]
        padding = 16 - len(expected)
        assert x["encoder_token_ids"][row].tolist() == expected + [1] * padding
        assert x["encoder_padding_mask"][row].tolist() == [1] * len(expected) + [0] * padding
        ids = np.asarray(tokenizer(summary)).tolist()[:6]
        expected = [2, 0, *ids, 2]
        padding = 9 - len(expected)
        assert (padding == 0) == (row == 2)
        words = expected + [1] * padding
        assert x["decoder_token_ids"][row].tolist() == words[:-1]
        assert x["decoder_padding_mask"][row].tolist() == ([1] * len(expected) + [0] * padding)[:-1]
        assert labels[row].tolist() == words[1:]
        assert weights[row].tolist() == [1.0] * (len(expected) - 1) + [0.0] * padding


# ## The model and its loss
def test_dropout_is_that_of_the_flag(parse, preset, summarizer):
    assert dropout_rates(summarizer) == {0.1}
    args = parse("--preset", preset, *LENGTHS, "--dropout", 0.25)
    loaded = summarization.build_summarizer(args, summarization.load_preprocessor(args, None))
    assert dropout_rates(loaded) == {0.25}
    for ours, theirs in zip(loaded.get_weights(), summarizer.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    args = parse(*SMALL, "--dropout", 0.3)
    assert dropout_rates(summarization.build_summarizer(args, summarizer.preprocessor)) == {0.3}


def test_loss_is_the_mean_over_tokens(summarizer):
    x, labels, weights = summarization.tokenize(make_texts(6), summarizer.preprocessor)
    model = experiment.trainable(summarizer)
    summarization.compile_model(model, 1e-3)
    logits = model.predict(x, batch_size=6, verbose=0).astype("float64")
    log_probs = logits - np.log(np.exp(logits - logits.max()).sum(axis=-1, keepdims=True)) - logits.max()
    of_labels = np.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    expected = -(of_labels * (labels != 1)).sum() / (labels != 1).sum()
    loss = model.evaluate(x, labels, sample_weight=weights, batch_size=6, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(expected, rel=1e-4)


# ## Summaries and their score
def test_greedy_summaries_are_those_of_the_model(summarizer, monkeypatch):
    """Each token from the whole model, without a cache; three documents in batches of two."""
    monkeypatch.setattr(summarization, "DECODING_BATCH", 2)
    documents = ["It is a free game.", "A small editor, fast.", "shell"]
    x, _, _ = summarization.tokenize((documents, [""] * 3), summarizer.preprocessor)
    tokens = np.full((3, 8), 1, "int32")
    tokens[:, :2] = 2, 0
    for i in range(2, 8):
        logits = summarizer({**x, "decoder_token_ids": tokens, "decoder_padding_mask": np.ones_like(tokens)})
        tokens[:, i] = keras.ops.convert_to_numpy(logits)[:, i - 1].argmax(axis=-1)
    expected = []
    for row in tokens[:, 2:].tolist():
        row = row[: row.index(2) if 2 in row else None]
        expected.append(summarizer.preprocessor.tokenizer.detokenize([token for token in row if token > 2]))
    assert len(set(expected)) == 3
    assert summarization.summarize(summarizer, documents) == expected


def test_beams_find_the_best_mean_log_probability():
    """Of all sequences of three tokens, each drawn by the one before. KerasHub's own sampler finds others."""
    vocabulary, pad, end = 6, 1, 2
    tables = np.random.default_rng(0).normal(0, 2, (8, vocabulary, vocabulary)).astype("float32")
    log_probs = tables - np.log(np.exp(tables).sum(axis=-1, keepdims=True))
    means = []  # Of each row: `{tokens: mean}`. An ended sequence goes on with padding, for nothing.
    for table in log_probs:
        means.append({})
        for tokens in itertools.product(range(vocabulary), repeat=3):
            words = tokens[: tokens.index(end) + 1] if end in tokens else tokens
            if set(tokens[len(words) :]) <= {pad}:
                total = sum(table[before, word] for before, word in zip((0, *words), words))
                means[-1][tokens] = total / max(1, sum(word != pad for word in words))
    best = [max(row.values()) for row in means]
    ended = [end in max(row, key=row.get)[:2] for row in means]
    assert any(ended) and not all(ended)

    def next(prompt, cache, index):
        last = keras.ops.take(prompt, index - 1, axis=1)
        return keras.ops.take_along_axis(cache, last[:, None, None], axis=1)[:, 0], None, cache

    def means_found(sampler):
        found = sampler(
            next,
            prompt=np.array([[end, 0, pad, pad, pad]] * len(tables), "int32"),
            cache=tables,
            index=2,
            mask=np.array([[True, True, False, False, False]] * len(tables)),
            stop_token_ids=(end,),
        )
        found = keras.ops.convert_to_numpy(found).tolist()
        return np.array([row.get(tuple(tokens[2:]), -np.inf) for row, tokens in zip(means, found)])

    np.testing.assert_allclose(means_found(summarization.BeamSampler(vocabulary**3, pad)), best, rtol=1e-5)
    assert (means_found(keras_hub.samplers.BeamSampler(vocabulary**3)) < np.array(best) - 0.1).any()


def test_rouge():
    """By hand. First row: words a b c d against a c d e, of which 3 of 4 and 3 of 4 are common, so are `c d` of 3
    pairs each, and both sequences of lines: a c | d. Second row: the plural counts, by its stem; 1 of 1 and 1 of 2."""
    scores = summarization.rouge(["aa bb cc\ndd", "games"], ["aa cc\ndd ee", "game shell"])
    f1 = 2 * 1 * 0.5 / 1.5
    assert scores == {
        "ROUGE-1": pytest.approx(100 * (3 / 4 + f1) / 2),
        "ROUGE-2": pytest.approx(100 * (1 / 3 + 0) / 2),
        "ROUGE-L": pytest.approx(100 * (3 / 4 + f1) / 2),
    }
    # Lines in another order: of one sequence 2 of 4 words would be common.
    assert summarization.rouge(["aa bb\ncc dd"], ["cc dd\naa bb"])["ROUGE-L"] == pytest.approx(100)
    assert summarization.rouge(["aa bb cc dd"], ["cc dd aa bb"])["ROUGE-L"] == pytest.approx(50)


# ## Errors
@pytest.mark.parametrize(
    "flags, message",
    [
        (("--vocabulary-size", 260), "--vocabulary-size must be ≥ 261. Received: 260"),
        (("--document-length", 2), "--document-length must be ≥ 3. Received: 2"),
        (("--summary-length", 3), "--summary-length must be ≥ 4. Received: 3"),
        (("--beams", 0), "--beams must be ≥ 1. Received: 0"),
        (("--score-rows", 0), "--score-rows must be ≥ 1. Received: 0"),
        (("--preset", "bart_base_en"), "--vocabulary-size is for --preset none: --preset bart_base_en has its own"),
        (("--data", "nowhere"), "--data must be a folder that exists. Received: nowhere"),
        (("--batch-size", 512), "--batch-size must be ≤ the 192 rows to train on. Received: 512"),
    ],
    ids=["vocabulary", "document", "summary", "beams", "rows", "vocabulary of a preset", "data", "batch"],
)
def test_bad_flags(run_example, data, capsys, flags, message):
    with pytest.raises(SystemExit):
        run_example(summarization, "--data", data, *SMALL, *flags)
    assert message in capsys.readouterr().err


def test_bad_table(run_example, data, capsys):
    (data / "train.tsv").write_text("document\ttitle\na\tb\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        run_example(summarization, "--data", data, *SMALL)
    message = "train.tsv, line 1: expected tab-separated column names with document, summary. Received: document, title"
    assert message in capsys.readouterr().err


def test_bad_presets(run_example, data, preset, tmp_path, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    bert = keras_hub.models.BertBackbone(len(words), num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4)
    bert.save_to_preset(str(tmp_path / "bert"))
    keras_hub.models.BertTokenizer(words).save_to_preset(str(tmp_path / "bert"))
    for flags, message in (
        (("--preset", "bart_huge"), "--preset bart_huge cannot be used as a BartSeq2SeqLM: Unknown preset identifier"),
        (("--preset", tmp_path / "bert"), "cannot be used as a BartSeq2SeqLM: Unable to find a subclass"),
        (("--preset", data), "cannot be used as a BartSeq2SeqLM: "),
        (("--preset", preset, "--summary-length", 17), "--summary-length must be ≤ the 16 tokens of --preset"),
    ):
        with pytest.raises(SystemExit):
            run_example(summarization, "--data", data, *FLAGS, *flags)
        assert message in capsys.readouterr().err
