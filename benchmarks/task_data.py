"""Reading data for the programs: from local files in plain formats (`--data`), or by tensorflow-datasets.

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
        try:
            dataset = tfds.load(name, split=source)
        except Exception as error:
            error.add_note(f"{name} could not be loaded. --data reads local files in its place.")
            raise
        if split == "train" and train_rows is not None:
            dataset = dataset.take(train_rows)
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


def read_images(path, max_size, required=("train",)):
    """`{split: (images, labels)}` and the names of the classes, from files `SPLIT/CLASS/IMAGE` in a folder or a zip.

    Args:
        path: The folder or the zip.
        max_size: All images are cropped to squares of one size: that of the largest of these squares, or this if it is
            less.
        required: Splits without which the program ends; the others are left out.

    Returns:
        uint8 images of shape `(n, size, size, 3)` with int32 labels, which number the sorted names, and these names.
    """
    if importlib.util.find_spec("PIL") is None:
        fail("images are read by Pillow: pip install pillow")
    path = pathlib.Path(path)
    if path.is_dir():
        root = path
    elif zipfile.is_zipfile(path):
        root = zipfile.Path(path)
    else:
        fail(f"--data must be a folder or a zip of images. Received: {path}")
    files = {}
    for split, stems in SPLITS.items():
        found = [stem for stem in stems if (root / stem).is_dir()]
        if len(found) > 1:
            fail(f"{path} has several {split} splits: {', '.join(found)}")
        if found:
            files[split] = _image_files(root / found[0])
        elif split in required:
            fail(f"{path} has no {split} split: expected images such as {stems[0]}/cat/1.jpg")
    classes = sorted({label for by_class in files.values() for label in by_class})
    if len(classes) < 2:
        fail(f"{path} must have images of at least two classes. Received: {', '.join(classes) or 'none'}")
    for split, by_class in files.items():
        for label in classes:
            if not by_class.get(label):
                endings = ", ".join(IMAGE_ENDINGS)
                fail(f"{path} has no {split} image of class {label}: expected files that end in {endings}")
    squares = {
        split: [_read_square(file, max_size) for label in classes for file in by_class[label]]
        for split, by_class in files.items()
    }
    size = max(image.width for images in squares.values() for image in images)
    splits = {}
    for split, images in squares.items():
        counts = [len(files[split][label]) for label in classes]
        labels = np.repeat(np.arange(len(classes), dtype="int32"), counts)
        splits[split] = np.stack([np.asarray(image.resize((size, size))) for image in images]), labels
    return splits, classes


def _image_files(folder):
    """`{class: [file]}` of the folders in `folder`, a path or a `zipfile.Path`; both sorted by name."""
    folders = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    return {
        folder.name: sorted(
            (entry for entry in folder.iterdir() if entry.name.lower().endswith(IMAGE_ENDINGS)),
            key=lambda entry: entry.name,
        )
        for folder in folders
    }


def _read_square(file, max_size):
    """The middle of an image, as large a square as fits, made smaller if its side is above `max_size`."""
    from PIL import Image, ImageOps

    try:
        image = Image.open(io.BytesIO(file.read_bytes())).convert("RGB")
    except (OSError, zipfile.BadZipFile) as error:
        fail(f"{file} cannot be read as an image: {error}")
    size = min(max_size, *image.size)
    return ImageOps.fit(image, (size, size))
