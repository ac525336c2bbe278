"""The size of the chunks in which long tensors are processed."""

from __future__ import annotations

# Number of weights or groups in a chunk, few enough for what is computed of them to stay in the cache of a CPU.
CHUNK = 131072
