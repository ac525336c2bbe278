"""Attentions whose heads together are narrower than their input, for classes whose forward cannot do that.

torch.nn.MultiheadAttention, torchvision's ShiftedWindowAttention and timm's WindowAttention of Swin V2 take the number
of heads times their size for the width of the input. Once heads are removed, it is smaller. The classes here have the
same parameters under the same names and the same arguments, and read all sizes from their weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SmallMultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention with fewer heads. Arguments, results and parameters are the same.

    torch's layers of transformers do not take their fast path with it, as that has the same fixed width.
    """

    @staticmethod
    def take_over(attention: Any) -> None:
        """Make this the class of an attention whose weights have been cut."""
        attention.__class__ = SmallMultiheadAttention
        attention.embed_dim = attention.out_proj.out_features
        attention._is_packed = attention.in_proj_weight is not None
        attention._qkv_same_embed_dim = False  # by which torch's layers decide on the fast path

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As of torch.nn.MultiheadAttention."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is, so pass attn_mask, too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        queries, keys, values = self._projected(query, key, value)
        added = 0  # keys that every query reads, beside those that are given
        if self.bias_k is not None and self.bias_v is not None:
            biases = (bias.expand(len(keys), -1, -1) for bias in (self.bias_k, self.bias_v))
            keys, values = (torch.cat(each, 1) for each in zip((keys, values), biases, strict=True))
            added += 1
        if self.add_zero_attn:
            keys, values = (F.pad(each, (0, 0, 0, 1)) for each in (keys, values))
            added += 1
        queries, keys, values = map(self._in_heads, (queries, keys, values))
        mask = self._mask(key_padding_mask, attn_mask, queries)
        mask = None if mask is None else F.pad(mask, (0, added))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, -1), dropout)
            heads = weights @ values
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            # As in torch, the hint then replaces the mask, also where keys are added behind those that are given.
            hinted = is_causal and key_padding_mask is None
            mask = None if hinted else mask
            heads = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, hinted)
        output = F.linear(heads.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        given = query, key, value
        weights = (
            self.in_proj_weight.chunk(3) if self._is_packed
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )  # fmt: skip
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(*each) for each in zip(given, weights, biases, strict=True)]

    def _in_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, of_keys: Tensor | None, of_scores: Tensor | None, queries: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores: (batch, heads, queries, keys), or fewer axes."""
        masks = []
        if of_scores is not None:
            mask = _added(of_scores, queries.dtype)
            masks.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask)
        if of_keys is not None:
            masks.append(_added(of_keys, queries.dtype)[:, None, None])
        return sum(masks) if masks else None  # type: ignore[return-value]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask that is added to scores; a bool mask is True where a key is left out."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)


class _SmallWindowAttention(nn.Module):
    """Attention within the windows of a Swin transformer, by the parameters of the class that it replaces."""

    num_heads: int
    window_size: Any
    qkv: nn.Linear
    proj: nn.Linear
    logit_scale: nn.Parameter  # of Swin V2

    def _position_bias(self) -> Tensor:
        """What is added to the scores for relative positions: (heads, places, places)."""
        own: Any = self
        is_v2 = hasattr(self, "logit_scale")
        table = own.cpb_mlp(own.relative_coords_table) if is_v2 else own.relative_position_bias_table
        places = math.prod(self.window_size)
        bias = table.reshape(-1, self.num_heads)[own.relative_position_index.flatten()]
        bias = bias.reshape(places, places, self.num_heads).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias) if is_v2 else bias

    def _attended(self, windows: Tensor, qkv_bias: Tensor | None, mask: Tensor | None, dropout: float) -> Tensor:
        """The heads, side by side: (windows, places, heads x size).

        Args:
            windows: (windows, places, channels), all windows of the first picture first.
            qkv_bias: The bias of all three projections.
            mask: (windows of a picture, places, places), which is added to the scores.
            dropout: Dropout of the attention weights.
        """
        projected = F.linear(windows, self.qkv.weight, qkv_bias).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
        if hasattr(self, "logit_scale"):
            scale = self.logit_scale.clamp(max=math.log(100)).exp()
            scores = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).transpose(-2, -1) * scale
        else:
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1])
        scores = scores + self._position_bias()
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = F.dropout(F.softmax(scores, -1), dropout, self.training)
        return (weights @ values).transpose(1, 2).flatten(2)


class SmallWindowAttentionV2(_SmallWindowAttention):
    """timm's WindowAttention of Swin V2 with fewer heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As of timm's class."""
        own: Any = self
        bias = None if own.q_bias is None else torch.cat((own.q_bias, own.k_bias, own.v_bias))
        return own.proj_drop(self.proj(self._attended(x, bias, mask, own.attn_drop.p)))


class SmallShiftedWindowAttention(_SmallWindowAttention):
    """torchvision's ShiftedWindowAttention, of both versions, with fewer heads."""

    shift_size: list[int]
    attention_dropout: float
    dropout: float

    def forward(self, x: Tensor) -> Tensor:
        """As of torchvision's class: pictures of any size, with the channels last."""
        (height, width), (rows, columns) = x.shape[1:3], self.window_size
        padded = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        size = padded.shape[1:3]
        # A window that is as large as the picture is not shifted.
        shift = [0 if window >= full else by for window, full, by in zip(self.window_size, size, self.shift_size,
                                                                         strict=True)]  # fmt: skip
        shifted = padded.roll([-by for by in shift], (1, 2))
        windows = self._split(shifted)
        heads = self._attended(windows, self._bias(), self._mask(shift, size, x), self.attention_dropout)
        output = F.dropout(self.proj(heads), self.dropout, self.training)
        pictures = output.unflatten(1, (rows, columns)).unflatten(0, (-1, size[0] // rows, size[1] // columns))
        joined = pictures.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return joined.roll(shift, (1, 2))[:, :height, :width].contiguous()

    def _split(self, pictures: Tensor) -> Tensor:
        """The windows of pictures: (windows of all pictures, places, channels)."""
        rows, columns = self.window_size
        windows = pictures.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)
        return windows.flatten(3, 4).flatten(0, 2)

    def _bias(self) -> Tensor | None:
        """The bias of the three projections. In Swin V2 that of the keys counts as zero."""
        bias = self.qkv.bias
        if bias is None or not hasattr(self, "logit_scale"):
            return bias
        queries, keys, values = bias.chunk(3)
        return torch.cat((queries, torch.zeros_like(keys), values))

    def _mask(self, shift: list[int], size: Any, like: Tensor) -> Tensor | None:
        """-100 between places that are no neighbours in the picture, but in a window after the shift."""
        if not any(shift):
            return None
        areas = []
        for window, full, by in zip(self.window_size, size, shift, strict=True):
            place = torch.arange(full, device=like.device)
            areas.append((place >= full - window).long() + (place >= full - by) if by else torch.zeros_like(place))
        area = self._split((3 * areas[0][:, None] + areas[1])[None, :, :, None]).squeeze(-1)
        return like.new_zeros(()).masked_fill(area[:, :, None] != area[:, None], -100.0)
