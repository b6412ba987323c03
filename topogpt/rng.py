"""Randomness as a pure function of a key: it depends on no state, so on no number of ranks and no resumption.

Built on Philox's raw stream, which numpy guarantees never to change (NEP 19), unlike `Generator.permutation`.
A key is a tuple of ints and strings, e.g. `permutation(784, seed, "layer.3.mlp")`.
"""

import hashlib

import numpy as np

Key = int | str


def raw(n: int, *key: Key) -> np.ndarray:
    """n uint64 numbers."""
    digest = hashlib.sha256("\0".join(f"{type(k).__name__}:{k}" for k in key).encode()).digest()
    return np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)).random_raw(n)


def permutation(n: int, *key: Key) -> np.ndarray:
    """A random permutation of range(n), int64."""
    return np.argsort(raw(n, *key), kind="stable")


def seed(*key: Key) -> int:
    """A 63-bit seed for torch.manual_seed."""
    return int(raw(1, *key)[0] >> np.uint64(1))
