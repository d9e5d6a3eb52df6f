"""`examples/glue.py`, on data made here."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

pytestmark = pytest.mark.needs("keras_hub", "tensorflow", "tensorflow_datasets")

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")


@pytest.fixture
def glue(load):
    return load("glue")


def write_tables(folder, label, rows, texts):
    folder.mkdir()
    for split, count in (("train", rows), ("dev", 20)):
        rng = np.random.default_rng(count)
        lines = ["\t".join([label, *texts])]
        for _ in range(count):
            good = rng.integers(2)
            words = [f"a {rng.choice(GOOD if good else BAD)} film" for _ in texts]
            lines.append("\t".join([str(good), *words]))
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def printed_score(text, name):
    return float(text.split(f"{name}: ")[1].split()[0])


# On TensorFlow `test_defaults.py` trains on pairs and exports.
@pytest.mark.slow
@pytest.mark.backends("jax")
def test_learns_pairs_and_saves(glue, run, tmp_path):
    data = write_tables(tmp_path / "tables", "label", 160, ["sentence1", "sentence2"])
    text = run(glue, "--task", "rte", "--small", "--data", data, "--epochs", 4)
    assert "consistency_loss" in text
    assert printed_score(text, "rte accuracy") > 0.9
    assert {path.name for path in (tmp_path / "runs" / "rte").iterdir()} == {"logs", "classifier.keras"}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_regresses(glue, run, tmp_path):
    data = write_tables(tmp_path / "tables", "score", 32, ["sentence1", "sentence2"])
    text = run(glue, "--task", "stsb", "--small", "--data", data, "--epochs", 1, "--output", tmp_path / "other")
    assert all(-1 <= printed_score(text, f"stsb {name}") <= 1 for name in ("Pearson", "Spearman"))
    assert (tmp_path / "other" / "stsb" / "served").is_dir()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("task", ["cola", "mnli", "qqp", "stsb"])
def test_reads_tensorflow_datasets(glue, task):
    with tfds.testing.mock_data(num_examples=6):
        splits = glue.load_data(task)
    assert len(splits) == 2
    for texts, labels in splits:
        assert len(texts) == (1 if task == "cola" else 2)
        assert all(len(column) == 6 and isinstance(column[0], str) for column in texts)
        assert labels.dtype == ("float32" if task == "stsb" else "int32")


def test_evaluates_all_rows_once(glue):
    labels = np.arange(20, dtype="int32")
    batches = list(glue.make_batches(([str(i) for i in labels],), labels, training=False))
    weights = np.concatenate([weight for _, _, weight in batches])
    assert [len(y) for _, y, _ in batches] == [16, 16]
    np.testing.assert_array_equal(np.concatenate([y for _, y, _ in batches])[:20], labels)
    np.testing.assert_allclose(weights, [1.6] * 20 + [0] * 12, rtol=1e-6)


def test_training_batches_are_shuffled_anew_in_each_epoch(glue):
    labels = np.arange(40, dtype="int32")
    batches = glue.make_batches(([str(i) for i in labels],), labels, training=True)
    first, second = ([np.array(y) for _, y in batches] for _ in range(2))
    assert [len(y) for y in first] == [16, 16]
    assert not np.array_equal(first, second)
    for (texts,), y in batches:
        assert [int(text) for text in np.array(texts)] == list(np.array(y))


def test_scores(glue):
    labels, outputs = np.array([0, 1, 1, 0, 1]), np.eye(2)[[0, 1, 0, 1, 1]]
    assert glue.score("mrpc", labels, outputs) == pytest.approx({"accuracy": 3 / 5, "F1": 2 / 3})
    assert glue.score("rte", labels, outputs) == pytest.approx({"accuracy": 3 / 5})
    assert glue.score("cola", labels, outputs) == pytest.approx({"Matthews": 1 / 6})
    scores, outputs = np.array([0.0, 1.0, 3.0, 5.0]), np.array([[0.5], [0.1], [2.0], [9.0]])
    pearson = np.corrcoef(scores, outputs[:, 0])[0, 1]
    assert glue.score("stsb", scores, outputs) == pytest.approx({"Pearson": pearson, "Spearman": 0.8})


def test_with_five_classes_of_ones_own(glue, tmp_path, monkeypatch):
    monkeypatch.setitem(glue.TASKS, "mine", (["text"], 5))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.tsv").write_text("label\ttext\n" + "".join(f"{i}\tclass {i}\n" for i in range(5)))
    (texts, labels), _ = glue.load_data("mine", tmp_path)
    assert glue.build_classifier("mine", texts).output.shape == (None, 5)
    ((column,), y) = next(iter(glue.make_batches(texts, labels, training=True)))
    assert len(column) == len(y) == 5


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--task", "wnli"), "invalid choice: 'wnli'"),
        (("--task", "rte", "--alpha", "-1"), "--alpha must be a number ≥ 0. Received: -1.0"),
        (("--task", "rte", "--alpha", "nan"), "--alpha must be a number ≥ 0. Received: nan"),
    ],
    ids=["task", "negative", "nan"],
)
def test_flags_that_are_wrong(glue, run, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(glue, *flags)
    assert message in capsys.readouterr().err


def test_data_that_are_wrong(glue, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--data must be a folder with one of train.tsv, train.tsv.gz. Rec"):
        glue.load_data("rte", tmp_path / "nowhere")
    data = write_tables(tmp_path / "tables", "label", 4, ["sentence"])
    with pytest.raises(ValueError, match=r"train.tsv must have columns sentence1, sentence2, label. Received: \['lab"):
        glue.load_data("rte", data)
    (data / "train.tsv").write_text("label\tsentence\n2\ta\n")
    with pytest.raises(ValueError, match="Labels of cola must be classes from 0 to 1, in the train split"):
        glue.load_data("cola", data)
