"""`benchmarks/glue.py`, on rows made here; encoders against BERT written out in NumPy."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import safetensors.numpy

import glue

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
NOUNS = ("film", "book", "song", "play")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", *GOOD, *BAD, *NOUNS]
SIZES = {"train": 192, "dev": 48, "test": 32}
FAST = ("--batch-size", 16, "--max-length", 12, "--learning-rate", 2e-3, "--epochs", 4)
CONFIG = {
    "model_type": "bert",
    "vocab_size": len(VOCABULARY),
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def write_table(path, header, rows):
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [header, *rows]), encoding="utf-8")


@pytest.fixture
def data(tmp_path):
    """A folder of tables for each of `cola` (is it praise?) and `stsb` (how many of three words are the same?)."""
    rng = np.random.default_rng(0)
    for split, size in SIZES.items():
        single, pairs = [], []
        for _ in range(size):
            label = rng.integers(2)
            single.append((label, f"a {rng.choice(GOOD if label else BAD)} {rng.choice(NOUNS)}"))
            first = rng.choice([*GOOD, *BAD], 3)
            same = rng.integers(2, size=3).astype(bool)
            pairs.append((same.sum(), " ".join(first), " ".join(np.where(same, first, rng.choice(NOUNS, 3)))))
        for task, header, rows in (
            ("cola", ("label", "sentence"), single),
            ("stsb", ("score", "sentence1", "sentence2"), pairs),
        ):
            (tmp_path / task).mkdir(exist_ok=True)
            write_table(tmp_path / task / f"{split}.tsv", header, rows)
    return tmp_path


@pytest.fixture
def encoder(tmp_path):
    """A small BERT in Hugging Face's files."""
    rng = np.random.default_rng(1)
    width, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), width),
        "embeddings.position_embeddings.weight": (16, width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "pooler.dense.weight": (width, width),
        "pooler.dense.bias": (width,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(2):
        layer = f"encoder.layer.{i}"
        for name, (rows, columns) in {
            **{f"attention.self.{part}": (width, width) for part in ("query", "key", "value")},
            "attention.output.dense": (width, width),
            "intermediate.dense": (inner, width),
            "output.dense": (width, inner),
        }.items():
            shapes |= {f"{layer}.{name}.weight": (rows, columns), f"{layer}.{name}.bias": (rows,)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    tensors = {name: rng.normal(0, 0.5, shape).astype("float32") for name, shape in shapes.items()}
    folder = tmp_path / "encoder"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder, tensors


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_learns_and_is_scored(run_example, data, capsys):
    flags = ("--task", "cola", "--data", data / "cola", "--preset", "none", *FAST, "--compare", "--dropout", 0.1)
    plain, rdrop = run_example(glue, *flags)
    for run in (plain, rdrop):
        assert run["curves"]["loss"][-1] < run["curves"]["loss"][0]
        assert run["curves"]["val_loss"][-1] < 0.69  # That of guessing.
        assert set(run["scores"]) == {"validation Matthews", "test Matthews"}
        assert run["scores"]["test Matthews"] > 0.5
    assert "consistency_loss" in rdrop["curves"]
    assert "R-Drop (alpha=0.5)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_regression_of_pairs_with_an_encoder(run_example, data, encoder):
    flags = ("--task", "stsb", "--data", data / "stsb", "--encoder", encoder[0], *FAST, "--train-rows", 100)
    (run,) = run_example(glue, *flags, "--learning-rate", 2e-2, "--epochs", 4)
    assert run["curves"]["val_loss"][-1] < run["curves"]["val_loss"][0]
    assert set(run["scores"]) == {
        f"{split} {name}" for split in ("validation", "test") for name in ("Pearson", "Spearman")
    }
    assert run["curves"]["consistency_loss"][0] > 0


def gelu(x):  # KerasHub's, by tanh.
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def norm(x, tensors, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
    return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def bert(tensors, tokens, segments, mask):
    """The hidden states after the embeddings and after each layer, and the pooled output, in float64."""
    tensors = {name: value.astype("float64") for name, value in tensors.items()}
    tables = (f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type"))
    word, position, segment = (tensors[name] for name in tables)
    x = norm(word[tokens] + position[: tokens.shape[1]] + segment[segments], tensors, "embeddings.LayerNorm")
    states = [x]

    def dense(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"encoder.layer.{i}"
        query, key, value = (
            dense(x, f"{layer}.attention.self.{part}").reshape(*tokens.shape, 2, 4).swapaxes(1, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(2, 3) / 2 + np.where(mask, 0, -1e9)[:, None, None]
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ value
        attended = dense(mixed.swapaxes(1, 2).reshape(x.shape), f"{layer}.attention.output.dense")
        x = norm(x + attended, tensors, f"{layer}.attention.output.LayerNorm")
        inner = gelu(dense(x, f"{layer}.intermediate.dense"))
        x = norm(x + dense(inner, f"{layer}.output.dense"), tensors, f"{layer}.output.LayerNorm")
        states.append(x)
    return states, np.tanh(dense(x[:, 0], "pooler.dense"))


def arguments(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["glue.py", *map(str, flags)])
    return glue.parse_arguments()


def load(args):
    return glue.load_classifier(args, glue.load_preprocessor(args, None))


def test_encoder_is_mapped_layer_by_layer(encoder, monkeypatch):
    folder, tensors = encoder
    args = arguments(monkeypatch, "--task", "stsb", "--encoder", folder, "--max-length", 12, "--dropout", 0.25)
    preprocessor = glue.load_preprocessor(args, None)
    classifier = glue.load_classifier(args, preprocessor)
    texts = (["a good film", "a bad a song"], ["a fine book", "poor"])
    inputs, _ = glue.tokenize(preprocessor, texts, np.zeros(2))
    ids = [VOCABULARY.index(word) for word in ["[CLS]", "a", "good", "film", "[SEP]", "a", "fine", "book", "[SEP]"]]
    assert list(inputs["token_ids"][0]) == [*ids, 0, 0, 0]
    assert list(inputs["segment_ids"][0][:10]) == [0] * 5 + [1] * 4 + [0]
    backbone = classifier.backbone
    names = ["embeddings_layer_norm", "transformer_layer_0", "transformer_layer_1"]
    hidden = keras.Model(
        backbone.input, [*(backbone.get_layer(n).output for n in names), backbone.output["pooled_output"]]
    )
    *states, pooled = (keras.ops.convert_to_numpy(x) for x in hidden(inputs))
    mask = inputs["padding_mask"]
    expected, expected_pooled = bert(tensors, inputs["token_ids"], inputs["segment_ids"], mask)
    for ours, theirs in zip(states, expected):
        np.testing.assert_allclose(ours[mask], theirs[mask], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pooled, expected_pooled, rtol=1e-4, atol=1e-4)
    rates = {layer.rate for layer in classifier._flatten_layers() if isinstance(layer, keras.layers.Dropout)}
    assert rates == {0.25}


def test_encoder_with_left_over_parameters_is_refused(encoder, monkeypatch, capsys):
    folder, tensors = encoder
    safetensors.numpy.save_file({**tensors, "extra.weight": np.zeros(3, "float32")}, folder / "model.safetensors")
    with pytest.raises(SystemExit):
        load(arguments(monkeypatch, "--task", "cola", "--encoder", folder))
    assert "Received: 1,563 in 40 tensors" in capsys.readouterr().err


def test_a_preset_of_kerashub(tmp_path, monkeypatch):
    """RoBERTa's, saved here: the class of the classifier and the rates of dropout follow the preset and the flag."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4, "a": 5, "Ġ": 6, "g": 7, "Ġg": 8}
    tokenizer = keras_hub.models.RobertaTokenizer(vocabulary, ["Ġ g"])
    backbone = keras_hub.models.RobertaBackbone(9, 1, 2, 8, 16, max_sequence_length=16)
    preprocessor = keras_hub.models.RobertaTextClassifierPreprocessor(tokenizer, sequence_length=8)
    saved = keras_hub.models.RobertaTextClassifier(backbone, 2, preprocessor=preprocessor)
    saved.save_to_preset(tmp_path / "preset")
    flags = ("--task", "mnli", "--preset", tmp_path / "preset", "--max-length", 10, "--dropout", 0.3)
    classifier = load(arguments(monkeypatch, *flags))
    assert type(classifier) is keras_hub.models.RobertaTextClassifier
    assert (classifier.num_classes, classifier.preprocessor.sequence_length) == (3, 10)
    assert {layer.rate for layer in classifier._flatten_layers() if isinstance(layer, keras.layers.Dropout)} == {0.3}
    np.testing.assert_array_equal(classifier.backbone.get_weights()[0], backbone.get_weights()[0])


@pytest.mark.parametrize("task", sorted(glue.TASKS))
def test_default_data_is_of_tensorflow_datasets(task, monkeypatch):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=6):
        data = glue.load_data(arguments(monkeypatch, "--task", task, "--train-rows", 4))
    assert [len(labels) for _, labels in data.values()] == [4, *[6] * (len(data) - 1)]
    assert set(data) == {"train", "validation", *(["validation mismatched"] if task == "mnli" else [])}
    for texts, labels in data.values():
        assert len(texts) == len(glue.TASKS[task].texts)
        assert all(isinstance(text, str) for column in texts for text in column)
        assert labels.dtype == ("float32" if task == "stsb" else "int32")


def test_scores_against_their_formulas():
    labels, outputs = np.array([0, 1, 1, 0, 1]), np.eye(2)[[0, 1, 0, 1, 1]]
    positive, both, truth = 3, 2, 3
    assert glue.SCORES["accuracy"](labels, outputs) == pytest.approx(3 / 5)
    assert glue.SCORES["F1"](labels, outputs) == pytest.approx(2 * both / (positive + truth))
    assert glue.SCORES["Matthews"](labels, outputs) == pytest.approx((2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2))
    scores, outputs = np.array([0.0, 1.0, 3.0, 5.0]), np.array([[0.5], [0.1], [2.0], [9.0]])
    assert glue.SCORES["Pearson"](scores, outputs) == pytest.approx(np.corrcoef(scores, outputs[:, 0])[0, 1])
    assert glue.SCORES["Spearman"](scores, outputs) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "column, message",
    [
        (["0", "2"], "train split, line 3: expected a class from 0 to 1 as label. Received: 2"),
        (["yes"], "train split, line 2: expected a class from 0 to 1 as label. Received: yes"),
    ],
    ids=["class", "word"],
)
def test_labels_that_are_none(column, message, capsys):
    with pytest.raises(SystemExit):
        glue.read_labels(column, glue.TASKS["cola"], "train")
    assert message in capsys.readouterr().err


def test_scores_that_are_none(capsys):
    with pytest.raises(SystemExit):
        glue.read_labels(["1.5", "nan"], glue.TASKS["stsb"], "test")
    assert "test split, line 3: expected a number as score. Received: nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--task", "wnli"), "invalid choice: 'wnli'"),
        (("--task", "cola", "--max-length", "3"), "--max-length must be ≥ 4. Received: 3"),
        (
            ("--task", "cola", "--encoder", "nowhere"),
            "--encoder must be a folder with config.json, model.safetensors, ",
        ),
        (("--task", "cola", "--preset", "bert", "--encoder", "x"), "not allowed with argument --preset"),
    ],
    ids=["task", "length", "encoder", "both"],
)
def test_bad_flags(monkeypatch, capsys, flags, message):
    with pytest.raises(SystemExit):
        arguments(monkeypatch, *flags)
    assert message in capsys.readouterr().err


def test_encoder_of_another_kind(encoder, monkeypatch, capsys):
    (encoder[0] / "config.json").write_text(json.dumps({**CONFIG, "model_type": "t5"}))
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--task", "cola", "--encoder", encoder[0])
    assert "--encoder must be of model_type bert in its config.json. Received: t5" in capsys.readouterr().err


def test_unknown_preset(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        load(arguments(monkeypatch, "--task", "cola", "--preset", "bert_of_nobody"))
    assert "--preset bert_of_nobody cannot be used as a text classifier" in capsys.readouterr().err


def test_a_task_is_told_by_the_columns_of_its_tables(run_example, data, capsys):
    with pytest.raises(SystemExit):
        run_example(glue, "--task", "rte", "--data", data / "cola", "--preset", "none")
    assert "train.tsv, line 1: expected tab-separated column names with label, sentence1, sentence2" in (
        capsys.readouterr().err
    )
