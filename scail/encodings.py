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

    For one clip at a time. `hits` are the names of what the current clip shares with earlier ones.
    """

    def __init__(self, max_bytes: int) -> None:
        self.hits: list[str] = []
        self._of_this_clip: set[tuple[str, bytes]] = set()
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()

    def begin_clip(self) -> None:
        self.hits, self._of_this_clip = [], set()

    def get(
        self, name: str, encode: Callable[[Content], Tensor], content: Content, *, kind: str | None = None
    ) -> Tensor:
        """The encoding called `name` of `content`, from an earlier clip or by `encode`.

        Args:
            name: What the encoding is to the clip.
            encode: Called if it is not here.
            content: All that decides the result, besides the weights.
            kind: Which encoder it is, if another encoding of the clip comes from the same one; else its name.
        """
        if not self._max_bytes:
            return encode(content)
        key = (kind or name, _digest(content))
        if key in self._entries:
            self._entries.move_to_end(key)
            if key not in self._of_this_clip:
                self.hits.append(name)
            return self._entries[key]
        encoding = encode(content)
        self._of_this_clip.add(key)
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
