"""`benchmarks/paper.py`: its plan, its arrays, and that a run does not depend on those before it.

`.ci/run` runs all of it with `--tiny`.
"""

import sys

import keras
import numpy as np
import pytest

import paper
from models import mlp


def test_plan():
    runs = paper.plan(3)
    assert len({paper.name_of(run) for run in runs}) == len(runs) == 3 * (4 + 5 * 4)
    assert len(paper.grouped(runs)) == 3 + 5 * 2
    twice = ("multi30k", paper.PLAIN, 0.0, 2, 1)
    assert twice in runs and paper.expected(twice, {}) == 56
    results = {"multi30k | plain, 2E | seed 0": {"seconds": 70.0}, "multi30k | plain, 1E | seed 0": {"seconds": 30.0}}
    assert paper.expected(twice, results) == 70
    assert len(paper.missing(runs, results)) == len(runs) - 2


def test_asks_for_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["paper.py", "--encoder", "folder"])
    with pytest.raises(SystemExit):
        paper.main()
    assert "--arrays, --encoder must be given, or --tiny. Not received: --arrays." in capsys.readouterr().err


# ## Arrays
@pytest.fixture
def tables(tmp_path):
    import paper_data

    paper_data.write_tiny_tables(tmp_path)
    return tmp_path


@pytest.mark.needs("keras_hub")  # Where that is, `tokenizers` is too.
def test_captions_come_back_from_their_tokens(tables):
    import paper_data

    captions = ["Zwei Männer grüßen – „Hallo“ 世界", "Ein Hund."] * 12
    rows = "\n".join(f"{caption}\tA dog." for caption in captions)
    for split in ("train", "valid", "test"):
        with paper_data.gzip.open(tables / "multi30k" / f"{split}.tsv.gz", "wt", encoding="utf-8") as file:
            file.write(f"de\ten\n{rows}\n")
    arrays = paper_data.multi30k(tables)
    assert arrays["train/source"].shape == (24, paper_data.LONGEST_CAPTION)
    assert set(arrays["train/source"][:, 0]) == {paper_data.START}
    texts = [paper_data.text_of(row[1:], arrays["pieces"]) for row in arrays["train/source"]]
    assert texts == captions and list(arrays["test/reference"]) == ["A dog."] * 24


@pytest.mark.needs("keras_hub")
def test_rows_of_glue(tables):
    import paper_data

    arrays = paper_data.glue(tables, "mrpc", tables / "vocab.txt")
    tokens, segments = arrays["train/token_ids"], arrays["train/segment_ids"]
    assert tokens.shape == (24, 1 + 4 + 1 + 4 + 1) and (tokens[:, [0, 5, 10]] == [2, 3, 3]).all()
    np.testing.assert_array_equal(segments, [[0] * 6 + [1] * 5] * 24)
    np.testing.assert_array_equal(arrays["test/label"], [0, 1] * 12)
    # Where there is no test split, rows of training are chosen by, and are trained on no more.
    arrays = paper_data.glue(tables, "cola", tables / "vocab.txt")
    assert [len(arrays[f"{split}/label"]) for split in ("train", "validation", "test")] == [22, 2, 24]


# ## Runs
class Points:
    """A task that takes no time."""

    epochs, batch_size, learning_rate, clipnorm, score_name, divergence = 1, 8, 0.01, 1.0, "zero", "auto"
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def split(self, name):
        x = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
        return x, (x[:, 0] > 0).astype("int32"), None

    def build(self):
        return mlp(rate=0.3)

    def score(self, network):
        return 0.0


@pytest.mark.backends("jax")
@pytest.mark.needs("keras_hub")
@pytest.mark.parametrize("kind", ["plain", "R-Drop", "R-Drop from ½"])
def test_a_run_is_the_same_after_another(kind):
    import paper_run

    trainer = paper_run.Trainer(Points(), kind, tiny=True)
    first, other, again = trainer.run(5.0, 1, 0), trainer.run(1.0, 1, 1), trainer.run(5.0, 1, 0)
    np.testing.assert_array_equal(first["validation losses"], again["validation losses"])
    assert first["validation losses"] != other["validation losses"] and first["loss"] == again["loss"]
    assert ("consistency_loss" in first) == (kind != "plain") and next(iter(first)) == "zero"
    if kind == "R-Drop":  # α is that of the run, in the program of the first.
        assert trainer.model.alpha == 5.0 and other["consistency_loss"] > 0


@pytest.mark.backends("jax")
@pytest.mark.needs("keras_hub")
def test_learning_rate_and_correlation():
    from sklearn.metrics import matthews_corrcoef

    import paper_run

    rates = [paper_run.learning_rate_at(piece, 0.3, 20) for piece in range(20)]
    assert max(rates) == 0.3 and rates[0] < rates[1] < rates[2] and rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.02
    y, guesses = np.random.default_rng(0).integers(0, 2, (2, 50))
    np.testing.assert_allclose(paper_run.correlation(y, guesses), matthews_corrcoef(y, guesses))
    assert paper_run.correlation(y, np.zeros(50)) == 0
    outputs = y + np.random.default_rng(1).normal(size=50).astype("float32")
    np.testing.assert_allclose(paper_run.correlation(y, outputs), np.corrcoef(y, outputs)[0, 1])


@pytest.mark.slow
@pytest.mark.backends("jax")
@pytest.mark.needs("keras_hub")
def test_translations_take_the_likeliest_word(tables):
    import paper_data
    import paper_run

    arrays = tables / "arrays"
    arrays.mkdir()
    np.savez(arrays / "multi30k.npz", **paper_data.multi30k(tables))
    task = paper_run.Multi30k(arrays, None, tiny=True)
    network = task.build()
    for weight in network.trainable_variables:
        weight.assign(keras.random.normal(weight.shape, seed=keras.random.SeedGenerator(len(weight.path))))
    x, _, _ = task.split("test")
    weights = [[v.value for v in vs] for vs in (network.trainable_variables, network.non_trainable_variables)]
    found = np.asarray(paper_run.greedy(network, 6, weights, x["encoder_token_ids"], x["encoder_padding_mask"]))
    target = np.full((24, 6), paper_data.PADDING, "int32")
    target[:, 0] = paper_data.START
    for i in range(1, 6):
        inputs = {**x, "decoder_token_ids": target, "decoder_padding_mask": np.ones_like(target)}
        target[:, i] = network.predict(inputs, verbose=0)[:, i - 1].argmax(axis=-1)
    np.testing.assert_array_equal(found, target)
    assert 0 <= task.score(network) <= 100


def test_table_has_means_over_seeds(capsys):
    run = {"validation loss": 0.5, "seconds": 3.0}
    results = {f"stsb | plain, 1E | seed {seed}": {"Pearson": 0.8 + 0.01 * seed, **run} for seed in range(3)}
    paper.print_table(paper.plan(3), results)
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == ["stsb", "plain,", "1E", "Pearson", "0.81", "±", "0.01", "0.5000", "±", "0.0000", "3.0", "3"]
