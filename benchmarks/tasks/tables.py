"""The tables of texts in a folder of data: GLUE and Multi30k, one gzipped file of tab-separated columns a split."""

import csv
import gzip

import numpy as np

GLUE_PAIRS = ("mrpc", "rte", "stsb")  # Tasks of two sentences; the others have one.


def read(path):
    """The rows of a table whose first line names its columns, as dicts of strings."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def glue(folder, name, split):
    """The texts of `FOLDER/glue/NAME/SPLIT.tsv.gz`, a tuple of one list or two, and its labels."""
    rows = read(folder / "glue" / name / f"{split}.tsv.gz")
    columns = ("sentence1", "sentence2") if name in GLUE_PAIRS else ("sentence",)
    label, dtype = ("score", "float32") if num_outputs(name) == 1 else ("label", "int32")
    return tuple([row[column] for row in rows] for column in columns), np.array([row[label] for row in rows], dtype)


def num_outputs(name):
    """How many numbers a model of the GLUE task returns: those of STS-B's regression, or two classes."""
    return 1 if name == "stsb" else 2


def multi30k(folder, split):
    """The German and the English captions of `FOLDER/multi30k/SPLIT.tsv.gz`."""
    rows = read(folder / "multi30k" / f"{split}.tsv.gz")
    return [row["de"] for row in rows], [row["en"] for row in rows]
