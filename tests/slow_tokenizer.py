"""A tokenizer that takes its time, so that a build can be killed in the middle; in a module that workers find."""

import time

from bytes_tokenizer import BytesTokenizer


class SlowTokenizer(BytesTokenizer):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        time.sleep(self.seconds)
        return super().encode(text, bos=bos, eos=eos)
