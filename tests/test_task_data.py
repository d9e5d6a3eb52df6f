"""`benchmarks/task_data.py`: tables, texts, and what is said of files that are not so."""

import gzip

import pytest

import task_data

TABLE = "en\tde\na\tb\nc d\té\n"


def write(folder, **files):
    """Files by name, with `_` for `.`; bytes as they are."""
    for name, content in files.items():
        if content is None:
            continue
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("_", ".")).write_bytes(content)


@pytest.mark.parametrize("validation", ["validation", "valid", "dev"])
def test_tables(tmp_path, validation):
    write(tmp_path, train_tsv=TABLE, test_tsv_gz=gzip.compress(TABLE.replace("\n", "\r\n").encode()))
    write(tmp_path, **{f"{validation}_tsv": "de\textra\ten\nb\tx\ta"})
    tables = task_data.read_tables(tmp_path, ("en", "de"))
    assert tables == {
        "train": {"en": ["a", "c d"], "de": ["b", "é"]},
        "validation": {"en": ["a"], "de": ["b"]},
        "test": {"en": ["a", "c d"], "de": ["b", "é"]},
    }
    assert list(task_data.read_tables(tmp_path)["validation"]) == ["de", "extra", "en"]


def test_texts(tmp_path):
    write(tmp_path, train_txt=" a b \n\nc\n", valid_txt_gz=gzip.compress("é\n".encode()))
    assert task_data.read_texts(tmp_path) == {"train": [" a b ", "", "c"], "validation": ["é"]}


NAMES = "tab-separated column names with en, de"


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "has no train split: expected one of train.tsv, train.tsv.gz"),
        ({"train_tsv": TABLE, "dev_tsv": None}, "has no validation split: expected one of validation.tsv, "),
        ({"train_tsv": TABLE, "train_tsv_gz": b""}, "has several train splits: train.tsv, train.tsv.gz"),
        ({"train_tsv": ""}, f"train.tsv, line 1: expected {NAMES}. Received: none"),
        ({"train_tsv": "en\tfr\na\tb\n"}, f"train.tsv, line 1: expected {NAMES}. Received: en, fr"),
        ({"train_tsv": "en\tde\n"}, "train.tsv is empty: expected rows after the line of column names"),
        ({"train_tsv": TABLE + "a\n"}, "train.tsv, line 4: expected 2 fields separated by tabs (en, de). Received: 1"),
        ({"train_tsv": TABLE.encode("latin-1")}, "train.tsv, line 3: expected UTF-8. Received: byte 0xe9"),
        ({"train_tsv_gz": b"plain text"}, "train.tsv.gz cannot be read: Not a gzipped file"),
        ({"train_tsv_gz": gzip.compress(b"text")[:-4]}, "train.tsv.gz cannot be read: Compressed file ended"),
    ],
    ids=["train", "validation", "several", "nothing", "column", "empty", "fields", "encoding", "no gzip", "cut short"],
)
def test_bad_tables(tmp_path, capsys, files, message):
    write(tmp_path, **{"dev_tsv": TABLE, **files})
    with pytest.raises(SystemExit):
        task_data.read_tables(tmp_path, ("en", "de"))
    assert message in capsys.readouterr().err


def test_empty_text(tmp_path, capsys):
    write(tmp_path, train_txt="\n \n", valid_txt="a")
    with pytest.raises(SystemExit):
        task_data.read_texts(tmp_path)
    assert "train.txt is empty: expected lines of text" in capsys.readouterr().err


def test_no_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        task_data.read_tables(tmp_path / "nowhere")
    assert f"--data must be a folder that exists. Received: {tmp_path / 'nowhere'}" in capsys.readouterr().err


def test_without_tensorflow_datasets(monkeypatch, capsys):
    monkeypatch.setattr(task_data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        task_data.read_tfds("glue/cola", ("label",), {"train": "train"})
    assert "pip install tensorflow tensorflow-datasets" in capsys.readouterr().err


@pytest.mark.needs("tensorflow_datasets", "tensorflow")
def test_a_download_that_fails_names_the_other_way(monkeypatch):
    import tensorflow_datasets as tfds

    def fails(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(tfds, "load", fails)
    with pytest.raises(ConnectionError) as error:
        task_data.read_tfds("glue/cola", ("label",), {"train": "train"})
    assert error.value.__notes__ == ["glue/cola could not be loaded. --data reads local files in its place."]
