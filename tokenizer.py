"""
Tokenizers by the name that a data set's meta.json gives: the one place that knows them.
"""
from configurator import UserError


class Bytes:
    """UTF-8 bytes 0-255 and an end-of-text id. No vocabulary to download."""
    name, vocab_size, eot_id = "bytes", 257, 256

    def encode(self, text):
        return list(text.encode("utf-8"))

    def decode(self, ids):
        return bytes(i for i in ids if i != self.eot_id).decode("utf-8", errors="replace")


class GPT2:
    """GPT-2's byte-pair encoding, by tiktoken, which downloads and caches the vocabulary."""
    name, vocab_size, eot_id = "gpt2", 50257, 50256

    def __init__(self):
        import tiktoken  # not needed for bytes
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except OSError as error:   # requests' errors are OSErrors
            raise UserError(f"tiktoken cannot download GPT-2's vocabulary "
                            f"({type(error).__name__}); once, on a machine with a network, or copy "
                            f"its TIKTOKEN_CACHE_DIR here") from None

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eot_id])


TOKENIZERS = {"bytes": Bytes, "gpt2": GPT2}


def get_tokenizer(name):
    """
    A tokenizer: name, vocab_size, eot_id (appended to every document), encode(text) -> list of ids,
    decode(ids) -> text without end-of-text. Raises UserError.
    """
    if name not in TOKENIZERS:
        raise UserError(f"unknown tokenizer {name!r}; there are {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
