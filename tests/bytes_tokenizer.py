"""The smallest tokenizer there is: a byte is a token. For tests of what comes after a tokenizer."""

from typing import ClassVar


class BytesTokenizer:
    n_vocab = 258
    bos_id, eos_id = 256, 257
    special_tokens: ClassVar = {"<|begin|>": 256, "<|end|>": 257}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        return [self.bos_id] * bos + list(text.encode("utf-8", "surrogatepass")) + [self.eos_id] * eos

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i for i in ids if i < 256)


class Bare(BytesTokenizer):
    """Without special tokens, and with a vocabulary that needs four bytes an id."""

    n_vocab = 70_000
    bos_id = eos_id = None
    special_tokens: ClassVar = {}

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        assert not bos and not eos
        return [69_000 + b for b in text.encode()]

    def decode_bytes(self, ids: list[int]) -> bytes:
        return bytes(i - 69_000 for i in ids if 69_000 <= i < 69_256)
