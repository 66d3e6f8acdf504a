"""
Document sources: Texts, a list of strings, and Files, local or remote parquet, jsonl or txt.

A source has
    identity            hash that tells it from other sources
    text_bytes          estimated size of the text
    files               number of files
    documents(n, skip)  yields the documents of file n as they are stored, after the first `skip`
    text(n, raw)        text of a stored document; ValueError says why it has none
    text_keys           keys that do hold text in a json record whose `field` does not
"""
import hashlib
import io
import json
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice

import pyarrow
from fsspec.core import url_to_fs
from pyarrow.parquet import ParquetFile

from script import UserError

FORMATS = r"\.(parquet|(jsonl|txt)(\.gz|\.zst)?)$"
TEXT_TYPES = r"(dictionary<values=)?(large_)?(string|binary)|null$"   # arrow's type names
SEPARATOR = b"<|endoftext|>"
TXT_BYTES = 2**16        # longer txt documents are cut, at the end of a line if possible
COMPRESSION_RATIO = 3    # guess for .gz and .zst, used by the progress bar and the disk space check


class Texts:
    """A list of strings."""
    files, text_keys = 1, ()

    def __init__(self, texts):
        self.texts = texts
        self.text_bytes = sum(map(len, texts))
        self.identity = hashlib.sha256(repr(texts).encode()).hexdigest()

    def documents(self, file, skip):
        return islice(self.texts, skip, None)

    def text(self, file, raw):
        return raw


class Files:
    """
    Documents in parquet, jsonl and txt files. source: a folder, path, glob pattern or fsspec URL
    (s3://, hf://...), or a list of file URLs. field: the parquet column or json key of the text.
    <|endoftext|> separates documents in txt. Other suffixes are ignored in a folder, and read as
    txt if a path or pattern matches nothing else. Raises UserError.
    """
    text_keys = ()

    def __init__(self, source, field="text"):
        self.field = field
        try:
            if isinstance(source, str):
                self.fs, path = url_to_fs(source)
                paths = self.fs.find(path) if self.fs.exists(path) else self.fs.glob(path)
                any_suffix = not self.fs.isdir(path)
            else:
                filesystems, paths = zip(*map(url_to_fs, source))
                self.fs, any_suffix = filesystems[0], False
            self.paths = [p for p in paths if re.search(FORMATS, p)] or [
                p for p in paths if any_suffix and self.fs.isfile(p)]
            sizes = [self.fs.size(p) for p in self.paths]
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"cannot read {source}: {error}") from None
        if not self.paths:
            raise UserError(f"no .parquet, .jsonl or .txt (.gz, .zst) files at {source}; for other "
                            f"text files, give a pattern such as --source='notes/*.md'")
        matches = [re.search(FORMATS, p) for p in self.paths]
        self.formats = [match[1].split(".")[0] if match else "txt" for match in matches]
        self.files, self.ignored = len(self.paths), sorted(set(paths) - set(self.paths))
        self.identity = hashlib.sha256(repr((self.paths, sizes, field)).encode()).hexdigest()
        with ThreadPoolExecutor(16) as pool:   # each remote parquet footer is a request
            rows, text_bytes = zip(*pool.map(self._measure, self.paths, sizes))
        self.text_bytes = sum(text_bytes)
        self.rows = None if None in rows else sum(rows)

    def _measure(self, path, size):
        """(rows, text bytes) of a file. Only parquet stores its rows; other formats give None."""
        if not path.endswith(".parquet"):
            return None, size * (COMPRESSION_RATIO if path.endswith((".gz", ".zst")) else 1)
        with self._open(path) as stream:
            metadata = self._parquet(path, stream).metadata
        columns = [metadata.row_group(i).column(j) for i in range(metadata.num_row_groups)
                   for j in range(metadata.num_columns)]
        return metadata.num_rows, sum(column.total_uncompressed_size for column in columns
                                      if column.path_in_schema == self.field)

    @contextmanager
    def _open(self, path):
        """Open a file as a decompressed binary stream. A failed read raises UserError."""
        codec = {".gz": "gzip", ".zst": "zstd"}.get(path[path.rfind("."):])
        try:
            with self.fs.open(path, "rb") as stream:
                yield stream if codec is None else io.BufferedReader(
                    pyarrow.CompressedInputStream(stream, codec), 2**20)
        except (OSError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} is damaged or unreachable: {reason}") from None

    def _parquet(self, path, stream):
        table = ParquetFile(stream, buffer_size=2**22)   # streams row groups of any size
        types = {column.name: str(column.type) for column in table.schema_arrow}
        text_columns = [name for name, type in types.items() if re.match(TEXT_TYPES, type)]
        if self.field not in text_columns:
            problem = (f"column {self.field!r} is {types[self.field]}, not text"
                       if self.field in types else f"there is no column {self.field!r}")
            raise UserError(f"{path}: {problem}; choose with --field among the text columns: "
                            f"{', '.join(text_columns) or 'none'}")
        return table

    def count(self, limit):
        """Number of documents, at most `limit`. The pieces of a cut document count."""
        files = (self.documents(file, 0) for file in range(self.files))
        return sum(1 for _ in islice(chain.from_iterable(files), limit))

    def documents(self, file, skip):
        with self._open(self.paths[file]) as stream:
            documents = stream   # jsonl: a document per line
            if self.formats[file] == "parquet":
                table = self._parquet(self.paths[file], stream)
                batches = table.iter_batches(64, columns=[self.field])
                # As bytes, because a column may hold invalid UTF-8.
                documents = (raw for batch in batches for raw in
                             batch.column(0).cast(pyarrow.large_binary()).to_pylist())
            elif self.formats[file] == "txt":
                documents = split_txt(stream)
            yield from islice(documents, skip, None)

    def text(self, file, raw):
        if self.formats[file] == "jsonl":
            line = raw.decode()
            if not line.strip():
                return ""
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError("not JSON") from None
            record = record if isinstance(record, dict) else {}
            raw = record.get(self.field)
            if not isinstance(raw, str):
                self.text_keys = [key for key, value in record.items() if isinstance(value, str)]
        if raw is None:
            raise ValueError(f"without {self.field}")
        if not isinstance(raw, (str, bytes)):
            raise ValueError(f"{self.field} is {type(raw).__name__}, not text")
        return raw.decode() if isinstance(raw, bytes) else raw


def read_stdin():
    """Standard input as Files, stored in a temporary txt file until the process exits."""
    try:
        file = tempfile.NamedTemporaryFile(suffix=".txt")
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.seek(0)
    except OSError as error:
        raise UserError(f"cannot store standard input in {tempfile.gettempdir()}: {error}; set "
                        f"TMPDIR to a folder on another disk") from None
    source = Files(file.name)
    source.identity = hashlib.file_digest(file, "sha256").hexdigest()
    source.file = file   # closing it would delete it
    return source


def split_txt(stream):
    """Yield the documents of a text file as bytes, cut into pieces of at most TXT_BYTES."""
    rest = b""
    while block := stream.read(TXT_BYTES):
        *documents, rest = (rest + block).split(SEPARATOR)
        for document in documents:
            yield from cut(document)
        if len(rest) > 2 * TXT_BYTES:
            end = rest[-len(SEPARATOR):]   # may hold the beginning of a separator
            *pieces, rest = cut(rest[:-len(SEPARATOR)])
            yield from pieces
            rest += end
    yield from cut(rest)


def cut(document):
    """Yield pieces of at most TXT_BYTES. No piece ends within a UTF-8 character."""
    while len(document) > TXT_BYTES:
        end = document.rfind(b"\n", 0, TXT_BYTES) + 1 or TXT_BYTES
        for _ in range(3):
            end -= document[end] & 0xC0 == 0x80
        yield document[:end]
        document = document[end:]
    if document:
        yield document


def hub_files(name):
    """URLs of the training files of a data set on the Hugging Face hub. If the data set is a
    script, URLs of the hub's parquet conversion. Raises UserError."""
    from datasets import load_dataset_builder  # slow to import
    try:
        try:
            builder = load_dataset_builder(name)
        except RuntimeError as error:   # datasets 4+ runs no scripts
            print(f"{name}: {error}; reading the hub's parquet conversion instead")
            builder = load_dataset_builder(name, revision="refs/convert/parquet")
        urls = list(builder.config.data_files["train"])
        if any("/partial-" in url for url in urls):
            print(f"the hub has converted only the first part of {name}")
        return urls
    except (OSError, ValueError) as error:
        raise UserError(f"{str(error).splitlines()[0]}; download the parquet files elsewhere and "
                        f"pass --source=FOLDER") from None
