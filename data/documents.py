"""
Where documents come from: parquet, jsonl and txt files, here or at the hub; or a list of texts.

A source has
    identity            tells it from another source
    text_bytes          how much text there is, an estimate
    files               how many files
    documents(n, skip)  yields (raw, read) for file n without its first `skip` documents: the
                        document as it is stored, and the bytes read for it, out of text_bytes
    text(n, raw)        that document as text; ValueError says what is wrong with it
    text_keys           names under which documents without text do hold text, as far as is known
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
from itertools import islice

from script import UserError

FORMATS = r"\.(parquet|(jsonl|txt)(\.gz|\.zst)?)$"
TEXT_TYPES = r"(dictionary<values=)?(large_)?(string|binary)|null$"   # arrow's names of them
SEPARATOR = b"<|endoftext|>"
TXT_BYTES = 2**16   # a longer document of a .txt is cut, at a line's end if there is one
COMPRESSION = 3     # text bytes in a byte of .gz or .zst, a guess for the progress bar


class Texts:
    """A list of str."""
    files, text_keys = 1, ()

    def __init__(self, texts):
        self.texts = texts
        self.text_bytes = sum(map(len, texts))
        self.identity = hashlib.sha256(repr(texts).encode()).hexdigest()

    def documents(self, file, skip):
        for text in islice(self.texts, skip, None):
            yield text, len(text)

    def text(self, file, raw):
        return raw


class Files:
    """
    Files of a folder, a pattern or one path, here or at a URL that fsspec knows (s3://, hf://...),
    or a list of such files. field: the parquet column or json key that holds the text. In a .txt,
    documents are separated by <|endoftext|>. Files with other suffixes are read as .txt if the path
    or pattern names no others; in a folder, they are passed over. Raises UserError.
    """
    text_keys = ()

    def __init__(self, source, field="text"):
        from fsspec.core import url_to_fs  # slow to import
        self.field = field
        try:
            if isinstance(source, str):
                self.fs, path = url_to_fs(source)
                paths = self.fs.find(path) if self.fs.exists(path) else self.fs.glob(path)
                named = not self.fs.isdir(path)
            else:
                found = [url_to_fs(url) for url in source]
                self.fs, paths, named = found[0][0], [path for _, path in found], False
            self.paths = [p for p in paths if re.search(FORMATS, p)] or [
                p for p in paths if named and self.fs.isfile(p)]
            sizes = [self.fs.size(p) for p in self.paths]
        except (OSError, ImportError, ValueError) as error:
            raise UserError(f"cannot read {source}: {error}") from None
        if not self.paths:
            raise UserError(f"no .parquet, .jsonl or .txt (.gz, .zst) at {source}; for text files "
                            f"of another suffix, give a pattern, such as --source='notes/*.md'")
        self.passed_over = sorted(set(paths) - set(self.paths))
        self.files = len(self.paths)
        self.identity = hashlib.sha256(repr((self.paths, sizes, field)).encode()).hexdigest()
        with ThreadPoolExecutor(16) as pool:   # at the hub, every footer is a request
            measured = list(pool.map(self._measure, self.paths, sizes))
        self.text_bytes = sum(size for _, size in measured)
        self.rows_of = [rows for rows, _ in measured]
        self.rows = None if None in self.rows_of else sum(self.rows_of)   # known if all is parquet

    def _measure(self, path, size):
        """(rows, bytes of text), None for rows that nobody has counted."""
        if not path.endswith(".parquet"):
            return None, size * (COMPRESSION if path.endswith((".gz", ".zst")) else 1)
        with self.fs.open(path, "rb") as file:
            table = self._parquet(path, file)
            groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            size = sum(column.total_uncompressed_size for column in columns
                       if column.path_in_schema == self.field)
            return table.metadata.num_rows, size

    def count(self, enough):
        """Number of documents, at most `enough`; a long text that will be cut is one document."""
        found = 0
        for path, rows in zip(self.paths, self.rows_of):
            found += rows or 0
            if found >= enough:
                return enough
            if rows is None:
                with self._opened(path) as stored:
                    stream, rest = decompressed(path, stored), b""
                    if kind(path) == "jsonl":
                        found += sum(1 for _ in islice(stream, enough))
                        continue
                    found += 1
                    while found < enough and (block := stream.read(2**20)):
                        found += (rest + block).count(SEPARATOR)
                        rest = (rest + block)[1 - len(SEPARATOR):]
        return min(found, enough)

    def _parquet(self, path, file):
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
        try:
            table = ParquetFile(file, buffer_size=2**22)   # stream a row group, whatever its size
        except (OSError, ArrowException) as error:
            raise damaged(path, error) from None
        types = {field.name: str(field.type) for field in table.schema_arrow}
        text = [name for name, type in types.items() if re.match(TEXT_TYPES, type)]
        if self.field not in text:
            wrong = (f"column {self.field!r} is {types[self.field]}, not text"
                     if self.field in types else f"there is no column {self.field!r}")
            raise UserError(f"{path}: {wrong}; choose with --field among the columns of text: "
                            f"{', '.join(text) or 'none'}")
        return table

    @contextmanager
    def _opened(self, path):
        from pyarrow import ArrowException
        try:
            with self.fs.open(path, "rb") as stored:
                yield stored
        except (OSError, ArrowException) as error:
            raise damaged(path, error) from None

    def documents(self, file, skip):
        path = self.paths[file]
        with self._opened(path) as stored:
            read = self._rows if path.endswith(".parquet") else self._pieces
            yield from read(path, stored, skip)

    def _rows(self, path, stored, skip):
        import pyarrow
        table = self._parquet(path, stored)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if skip < rows:
                column = (raw for batch in table.iter_batches(64, [group], [self.field])
                          for raw in batch.column(0).cast(pyarrow.large_binary()).to_pylist())
                for raw in islice(column, skip, None):
                    yield raw, len(raw or b"")
            skip = max(skip - rows, 0)

    def _pieces(self, path, stored, skip):
        stream = decompressed(path, stored)
        ratio, position = 1 if stream is stored else COMPRESSION, 0
        for raw in islice(stream if kind(path) == "jsonl" else split_txt(stream), skip, None):
            yield raw, stored.tell() * ratio - position
            position = stored.tell() * ratio

    def text(self, file, raw):
        if kind(self.paths[file]) == "jsonl":
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


def standard_input():
    """Files of one .txt, made of what comes from standard input and deleted with this process."""
    try:
        file = tempfile.NamedTemporaryFile(suffix=".txt")
        shutil.copyfileobj(sys.stdin.buffer, file)
        file.seek(0)
    except OSError as error:
        raise UserError(f"cannot store standard input in {tempfile.gettempdir()}: {error}; set "
                        f"TMPDIR to a folder on another disk") from None
    source = Files(file.name)
    source.identity = hashlib.file_digest(file, "sha256").hexdigest()
    source.file = file   # to close it is to delete it
    return source


def kind(path):
    found = re.search(FORMATS, path)
    return found[1].split(".")[0] if found else "txt"


def decompressed(path, stored):
    """stored, an open file, without the compression that its path names."""
    if not path.endswith((".gz", ".zst")):
        return stored
    import pyarrow
    codec = "gzip" if path.endswith(".gz") else "zstd"
    return io.BufferedReader(pyarrow.CompressedInputStream(stored, codec), 2**20)


def damaged(path, error):
    return UserError(f"{path} is damaged or out of reach: {str(error).splitlines()[0]}")


def split_txt(stream):
    """Documents of a text file, as bytes, none longer than TXT_BYTES."""
    rest = b""
    while block := stream.read(TXT_BYTES):
        *whole, rest = (rest + block).split(SEPARATOR)
        for document in whole:
            yield from cut(document)
        if len(rest) > 2 * TXT_BYTES:
            end = rest[-len(SEPARATOR):]   # may be the beginning of a separator
            *whole, rest = cut(rest[:-len(SEPARATOR)])
            yield from whole
            rest += end
    yield from cut(rest)


def cut(document):
    """document in pieces of TXT_BYTES at most, none of which ends within a character."""
    while len(document) > TXT_BYTES:
        end = document.rfind(b"\n", 0, TXT_BYTES) + 1 or TXT_BYTES
        for _ in range(3):
            end -= document[end] & 0xC0 == 0x80
        yield document[:end]
        document = document[end:]
    if document:
        yield document


def hub_files(name, config=None):
    """URLs of the files of a data set's training split at the Hugging Face hub, of the revision
    that is there now; a local folder of the same layout works too. Of a data set that is a script,
    they are those of the hub's own conversion. Raises UserError."""
    from datasets import load_dataset_builder  # slow to import
    try:
        try:
            return list(load_dataset_builder(name, config).config.data_files["train"])
        except RuntimeError as error:   # datasets 4+ runs no scripts
            print(f"{name}: {error}; reading the hub's own conversion to parquet")
        converted = load_dataset_builder(name, data_dir=config, revision="refs/convert/parquet")
        urls = list(converted.config.data_files["train"])
        if any("/partial-" in url for url in urls):
            print(f"the hub has converted only the first part of {name}")
        return urls
    except (OSError, ValueError) as error:
        raise UserError(f"{str(error).splitlines()[0]}; fetch its parquet files where there is a "
                        f"network and pass --source=FOLDER") from None
