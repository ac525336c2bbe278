"""Sparse training by the Trainer of the package `lightning`; that of `pytorch_lightning` has a file of its own."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from .lightning_events import LightningEvents


class SparsifyCallback(LightningEvents, Callback):
    __doc__ = LightningEvents.__doc__
