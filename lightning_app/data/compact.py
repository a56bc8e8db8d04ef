"""Long lists in few arrays: worker processes share those, while each copies a list bit by bit as it reads it."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

__all__ = ['Texts']


class Texts(Sequence[str]):
    """A sequence of texts in one array of bytes.

    Reading an element of a list writes its reference count, so that a forked process copies the memory of a list, and
    of all that is in it, over an epoch: hundreds of megabytes for the paths of ImageNet, in each worker.

    Args:
        texts: The texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        encoded = [text.encode('utf-8', 'surrogateescape') for text in texts]
        self.data: Any = np.frombuffer(b''.join(encoded), dtype=np.uint8)
        self.ends: Any = np.cumsum([len(each) for each in encoded], dtype=np.int64)

    @classmethod
    def of(cls, data: Any, ends: Any) -> Texts:
        """Return the sequence of which `data` and `ends` are the arrays."""
        texts = cls([])
        texts.data, texts.ends = data, ends
        return texts

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return bytes(self.data[start:self.ends[index]]).decode('utf-8', 'surrogateescape')

    def __iter__(self) -> Iterator[str]:
        data, start = self.data.tobytes(), 0  # by `__getitem__` all of ImageNet would take seconds
        for end in self.ends.tolist():
            yield data[start:end].decode('utf-8', 'surrogateescape')
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)
