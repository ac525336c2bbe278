"""Sparse training by the Trainer of the package `pytorch_lightning`; that of `lightning` has a file of its own."""

from __future__ import annotations

from pytorch_lightning.callbacks import Callback

from .lightning_events import LightningEvents


class SparsifyCallback(LightningEvents, Callback):
    __doc__ = LightningEvents.__doc__
