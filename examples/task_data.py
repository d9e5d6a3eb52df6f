"""Reading data for the task examples: from local files in plain formats (`--data`), or by tensorflow-datasets.

Tables are UTF-8 text with one line of tab-separated column names and then one row a line; texts are plain UTF-8 lines;
both may be gzipped. Images lie in a folder for each split, with a folder for each class, or in a zip of these. A file
that is not so ends the program with its name, the line and what was expected.
"""

import gzip
import importlib.util
import io
import pathlib
import zipfile

import numpy as np

from experiment import fail

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
IMAGE_ENDINGS = (".jpeg", ".jpg", ".png")


def read_tables(folder, columns=None, required=("train", "validation")):
    """`{split: {column: [text]}}` of the tables in `folder`, such as `train.tsv.gz`.

    Args:
        folder: Where they are.
        columns: Names that each table must have; others are left out. By default all columns of the table.
        required: Splits without which the program ends; the others are left out.
    """
    paths = _find(folder, ".tsv", required)
    return {split: _read_table(path, columns) for split, path in paths.items()}


def read_texts(folder, required=("train", "validation")):
    """`{split: [line]}` of the text files in `folder`, such as `train.txt.gz`."""
    splits = {}
    for split, path in _find(folder, ".txt", required).items():
        splits[split] = _read_lines(path)
        if not any(line.strip() for line in splits[split]):
            fail(f"{path} is empty: expected lines of text")
    return splits


def read_tfds(name, columns, splits, train_rows=None):
    """`{split: {column: [value]}}` of a dataset of tensorflow-datasets, downloaded if it is not yet on this machine.

    Args:
        name: Such as `"glue/cola"`.
        columns: The features to read. Texts are decoded.
        splits: `{split: its name in the dataset}`.
        train_rows: How many rows of the training split to read, all by default.
    """
    if importlib.util.find_spec("tensorflow_datasets") is None:
        fail("without --data, tensorflow-datasets is needed: pip install tensorflow tensorflow-datasets")
    import tensorflow_datasets as tfds

    tables = {}
    for split, source in splits.items():
        if split == "train" and train_rows is not None:
            source = f"{source}[:{train_rows}]"
        try:
            dataset = tfds.load(name, split=source)
        except Exception as error:
            error.add_note(f"{name} could not be loaded. --data reads local files in its place.")
            raise
        rows = [[row[column] for column in columns] for row in tfds.as_numpy(dataset)]
        texts = [[x.decode("utf-8") if isinstance(x, bytes) else x for x in column] for column in zip(*rows)]
        tables[split] = dict(zip(columns, texts))
    return tables


def _find(folder, ending, required):
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        fail(f"--data must be a folder that exists. Received: {folder}")
    paths = {}
    for split, stems in SPLITS.items():
        names = [stem + ending + gz for stem in stems for gz in ("", ".gz")]
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found and split in required:
            fail(f"{folder} has no {split} split: expected one of {', '.join(names)}")
        if len(found) > 1:
            fail(f"{folder} has several {split} splits: {', '.join(path.name for path in found)}")
        if found:
            paths[split] = found[0]
    return paths


def _read_lines(path):
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        return content.decode("utf-8").removesuffix("\n").split("\n")
    except (OSError, EOFError) as error:  # Not gzipped, or cut short.
        fail(f"{path} cannot be read: {error}")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        fail(f"{path}, line {line}: expected UTF-8. Received: byte 0x{content[error.start]:02x}")


def _read_table(path, columns):
    lines = [line.removesuffix("\r").split("\t") for line in _read_lines(path)]
    header = lines[0]
    columns = header if columns is None else columns
    missing = [column for column in columns if column not in header]
    if missing or header == [""]:
        expected = f" with {', '.join(columns)}" if missing else ""
        fail(f"{path}, line 1: expected tab-separated column names{expected}. Received: {', '.join(header) or 'none'}")
    if len(lines) == 1:
        fail(f"{path} is empty: expected rows after the line of column names")
    for number, fields in enumerate(lines[1:], 2):
        if len(fields) != len(header):
            fail(
                f"{path}, line {number}: expected {len(header)} fields separated by tabs ({', '.join(header)}). "
                f"Received: {len(fields)}"
            )
    return {column: [fields[header.index(column)] for fields in lines[1:]] for column in columns}


def read_images(path, size, required=("train", "test")):
    """`{split: (images, labels)}` and the names of the classes, from folders or a zip of `SPLIT/CLASS/IMAGE`.

    Args:
        path: The folder or the zip file.
        size: Height and width that every image is to have.
        required: Splits without which the program ends; the others are left out.

    Returns:
        uint8 images of shape `(n, size, size, 3)` with int32 labels, which number the sorted names, and these names.
    """
    from PIL import Image

    path = pathlib.Path(path)
    if path.is_dir():
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        names = [name.replace("\\", "/") for name in names]

        def read(name):
            return (path / name).read_bytes()

    elif zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        read = archive.read
    else:
        fail(f"--data must be a folder or a zip of images, SPLIT/CLASS/IMAGE. Received: {path}")
    parts = [name.split("/") for name in names]
    stems = {stem: split for split, stems in SPLITS.items() for stem in stems}
    files = {}
    for name, (*_, split, label, file) in zip(names, (["", "", *p] for p in parts)):
        if split in stems and file.lower().endswith(IMAGE_ENDINGS):
            files.setdefault(stems[split], []).append((name, label))
    for split in required:
        if split not in files:
            fail(f"{path} has no {split} images: expected files such as {SPLITS[split][0]}/cat/1.jpg")
    folders = _class_folders(path, names, stems)
    classes = sorted({label for rows in files.values() for _, label in rows} | folders)
    if len(classes) < 2:
        fail(f"{path} must have images of at least two classes. Received: {', '.join(classes)}")
    splits = {}
    for split, rows in files.items():
        empty = sorted(set(classes) - {label for _, label in rows})
        if empty:
            fail(f"{path} has no {split} image of class {empty[0]}: expected some of each of {', '.join(classes)}")
        images = np.empty((len(rows), size, size, 3), "uint8")
        for i, (name, _) in enumerate(rows):
            try:
                image = Image.open(io.BytesIO(read(name))).convert("RGB")
            except OSError as error:
                fail(f"{path}: {name} cannot be read as an image: {error}")
            images[i] = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)
        splits[split] = images, np.array([classes.index(label) for _, label in rows], "int32")
    return splits, classes


def _class_folders(path, names, stems):
    """The classes that have a folder, even an empty one."""
    if not path.is_dir():
        names = zipfile.ZipFile(path).namelist()
        return {
            parts[-2] for name in names if (parts := name.split("/"))[-1] == "" and parts[-3:-2] and parts[-3] in stems
        }
    return {folder.name for folder in path.glob("*/*") if folder.is_dir() and folder.parent.name in stems}
