"""Random numbers that depend on a seed and on what they are for, never on what was drawn before.

Every draw of the training (a crop, a timestep, a noise) comes from a generator seeded by `(seed, purpose, number)`.
So a resumed run continues with the same numbers without any saved state, two processes draw what one would, and a
method that draws more than another does not shift its neighbours.
"""

import hashlib

import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(seed: int, *stream: str | int) -> int:
    """A 63-bit seed for one stream, for example `stream_seed(0, "noise", 12)`.

    Arguments:
        seed: the run's seed, any integer.
        stream: what the numbers are for; equal streams give equal seeds on every machine.
    """
    text = "/".join(map(str, (seed, *stream)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *stream: str | int) -> torch.Generator:
    """A CPU generator for one stream; see `stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(seed, *stream))
