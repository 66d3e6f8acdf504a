"""
Documents of parquet, jsonl and txt files, local or remote, as an IterableDataset of `datasets`, the
library that finds files on the hub, reads parquet and resumes streams. Each row has one value.

jsonl and txt are read here: the library's json reader stops at a damaged line and at a key that the
first lines lack, and its text reader does not know where a document ends.
"""
import io
import json
import re
from contextlib import contextmanager
from itertools import chain, islice

import fsspec
import pyarrow
import pyarrow.dataset
from datasets import Features, IterableDataset, Value, load_dataset, load_dataset_builder

from script import UserError

SUFFIXES = re.compile(r"\.(parquet|jsonl|txt)(\.gz|\.zst)?$")
TEXT_TYPES = re.compile("(dictionary<values=)?(large_)?(string|binary)")   # arrow's names
SEPARATOR = "<|endoftext|>"
BEGINNINGS = tuple(SEPARATOR[:n] for n in range(1, len(SEPARATOR)))
TXT_CHARS = 2**16     # longer txt documents are cut, at the end of a line if possible
BATCH_DOCUMENTS = 500   # in memory at a time


@contextmanager
def reading(name):
    """Report an error of a file system, decoder or parser as one line."""
    try:
        yield
    except (OSError, ValueError, ImportError, pyarrow.ArrowException) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {name}: {reason}") from None


def find_files(source):
    """{URL: bytes} of the files at a path, folder, pattern or URL (s3://, hf://...). A path or
    pattern that matches no known suffix is txt. Raises UserError."""
    with reading(source):
        fs, path = fsspec.url_to_fs(source)
        folder = fs.exists(path) and fs.info(path)["type"] == "directory"
        found = fs.find(path) if folder else fs.glob(path)
        paths = [p for p in found if SUFFIXES.search(p)] or (not folder and found)
        if not paths:
            raise UserError(f"no .parquet, .jsonl or .txt (.gz, .zst) files at {source}; for other "
                            f"text files, give a pattern such as --source='notes/*.md'")
        if ignored := sorted({*found} - {*paths}):
            print(f"ignored {len(ignored)} files with other suffixes:", *ignored[:3])
        return {fs.unstrip_protocol(p): fs.size(p) or 0 for p in paths}


def hub_files(name):
    """{URL: bytes} of the training files of a data set on the Hugging Face hub. If the data set is
    a script, those of the hub's parquet conversion. Raises UserError."""
    with reading(f"{name} from the hub; get its files elsewhere and pass --source=FOLDER"):
        try:
            builder = load_dataset_builder(name)
        except RuntimeError as error:   # datasets 4+ runs no scripts
            print(f"{name}: {error}; reading the hub's parquet conversion instead")
            builder = load_dataset_builder(name, revision="refs/convert/parquet")
    urls = builder.config.data_files["train"]
    if any("/partial-" in url for url in urls):
        print(f"the hub has converted only the first part of {name}")
    return {url: size for path in urls for url, size in find_files(path).items()}


def load_documents(files, field="text"):
    """(IterableDataset, its number of documents if parquet stores it) of files as found above.
    field: the parquet column or json key of the text. Raises UserError."""
    urls = list(files)
    formats = {match[1] if match else "txt" for match in map(SUFFIXES.search, urls)}
    if len(formats) > 1:
        raise UserError(f"the source mixes {' and '.join(sorted(formats))}; choose one with a "
                        f"pattern such as --source='FOLDER/**/*.{min(formats)}'")
    if formats == {"parquet"}:
        with reading(urls[0]):
            fs, _, paths = fsspec.get_fs_token_paths(urls)
            table = pyarrow.dataset.dataset(paths, filesystem=fs)
            check_field(field, {c.name for c in table.schema if TEXT_TYPES.match(str(c.type))})
            features = Features({field: Value("large_binary")})   # strings may be invalid UTF-8
            return load_dataset("parquet", data_files=urls, columns=[field], features=features,
                                split="train", streaming=True), table.count_rows()
    if formats == {"jsonl"}:
        check_field(field, {key for record in islice(read_jsonl(urls), 1000)
                            for key, value in record.items() if isinstance(value, str)})
    read = read_jsonl if formats == {"jsonl"} else read_txt
    return IterableDataset.from_generator(read, gen_kwargs={"urls": urls, "field": field}), None


def check_field(field, fields):
    if field not in fields:
        raise UserError(f"no text in {field!r}; choose with --field among: "
                        f"{', '.join(sorted(fields)) or 'none'}")


def read_lines(url, limit=-1):
    """Yield lines, in parts of about `limit` characters. Invalid UTF-8 becomes lone surrogates."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(url[url.rfind("."):])
    with reading(url), fsspec.open(url) as file:
        if codec:   # fsspec's .zst would end after the first frame
            file = io.BufferedReader(pyarrow.CompressedInputStream(file, codec), 2**20)
        stream = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="\n")
        while line := stream.readline(limit):
            while line.endswith(BEGINNINGS) and (character := stream.read(1)):
                line += character   # a part must not end in a separator
            yield line


def read_jsonl(urls, field=None):
    """Yield the object on each line, {} if there is none, or its field alone."""
    for line in chain.from_iterable(map(read_lines, urls)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        record = record if isinstance(record, dict) else {}
        yield {field: record.get(field)} if field else record


def read_txt(urls, field):
    """Yield documents, cut into pieces of at most TXT_CHARS. No line is cut, unless longer."""
    for url in urls:
        parts, size = [], 0
        for line in read_lines(url, TXT_CHARS - len(SEPARATOR)):
            for i, part in enumerate(line.split(SEPARATOR)):
                if size and (i > 0 or size + len(part) > TXT_CHARS):
                    yield {field: "".join(parts)}
                    parts, size = [], 0
                parts.append(part)
                size += len(part)
        if size:
            yield {field: "".join(parts)}


def read_batches(documents):
    """Yield lists of texts. A document that has none, or invalid UTF-8, is ''."""
    with reading("the documents"):
        for batch in documents.iter(BATCH_DOCUMENTS):
            [values] = batch.values()
            yield [valid_text(value) for value in values]


def valid_text(value):
    try:
        return (value if isinstance(value, bytes) else value.encode()).decode()
    except (UnicodeError, AttributeError):   # AttributeError: not text
        return ""
