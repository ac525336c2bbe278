"""How much is looked at in one go."""

from __future__ import annotations

# Weights or groups in a part: what is computed of so many stays in the cache.
CHUNK = 131072
