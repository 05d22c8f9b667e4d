"""Values by key, the ones used last, as many as fit into a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class LRU(Generic[T]):
    """A dictionary that forgets what was not used for longest; for several threads.

    Attributes:
        max_bytes: what its values may take together; a larger value is not kept at all.
        bytes: what they take.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._values: OrderedDict[Hashable, tuple[T, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def get(self, key: Hashable) -> T | None:
        """The value of a key, which counts as used; None where there is none."""
        with self._lock:
            if key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key][0]

    def put(self, key: Hashable, value: T, size: int) -> None:
        """Keep a value of `size` bytes, and forget others where they are too many."""
        with self._lock:
            self.bytes -= self._values.pop(key, (None, 0))[1]
            if size > self.max_bytes:
                return
            self._values[key] = (value, size)
            self.bytes += size
            while self.bytes > self.max_bytes:
                _, (_, freed) = self._values.popitem(last=False)
                self.bytes -= freed

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._values.clear()
            self.bytes = 0
