"""Encodings of prompts, references and poses that the next clip may share, found by the content they were made of.

Encoders are deterministic: a tensor from here is the tensor that encoding anew would give.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Content = TypeVar("Content", str, Tensor)


class EncodingCache:
    """The encodings used last, up to a number of bytes; it holds tensors on the device on which they were made.

    For one clip at a time. `hits` are the names of what the current clip did not have to encode.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits: list[str] = []
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def begin_clip(self) -> None:
        self.hits = []

    def get(self, name: str, encode: Callable[[Content], Tensor], content: Content) -> Tensor:
        """The encoding called `name` of `content`, from an earlier clip or by `encode`.

        Args:
            name: Of the kind of encoding; the same content may be encoded by several encoders.
            encode: Called if it is not here.
            content: All that decides the result, besides the weights.
        """
        if not self._max_bytes:
            return encode(content)
        key = (name, _digest(content))
        if key in self._entries:
            self._entries.move_to_end(key)
            self.hits.append(name)
            return self._entries[key]
        encoding = encode(content)
        if encoding.nbytes <= self._max_bytes:
            self._entries[key] = encoding
            self._num_bytes += encoding.nbytes
        while self._num_bytes > self._max_bytes:
            self._num_bytes -= self._entries.popitem(last=False)[1].nbytes
        return encoding


def _digest(content: str | Tensor) -> bytes:
    if isinstance(content, str):
        return hashlib.blake2b(content.encode(), digest_size=20).digest()
    array = content.cpu().contiguous().numpy()
    return hashlib.blake2b(array.data, digest_size=20, person=f"{array.shape}"[:16].encode()).digest()
