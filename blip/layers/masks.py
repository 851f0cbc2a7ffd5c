"""Who may attend to whom. Masks are boolean, True = may attend; rows look, columns are seen.

The three masks of the Q-Former (BLIP-2, figure 2), for 2 queries `q` and 3 text tokens `t`, without padding:

    itc: uni-modal            itm: bi-directional       itg: multi-modal causal

          q q  t t t                q q  t t t                q q  t t t
      q   1 1  . . .            q   1 1  1 1 1            q   1 1  . . .
      q   1 1  . . .            q   1 1  1 1 1            q   1 1  . . .
      t   . .  1 1 1            t   1 1  1 1 1            t   1 1  1 . .
      t   . .  1 1 1            t   1 1  1 1 1            t   1 1  1 1 .
      t   . .  1 1 1            t   1 1  1 1 1            t   1 1  1 1 1

Columns of padding are never seen. `itc` splits into two independent passes and `itg` into queries first,
then text over their cached keys and values; the passes use the matching blocks of the same tables.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Objective = Literal["itc", "itm", "itg"]


def padding_mask(text_mask: Tensor) -> Tensor:
    """(B, T) bool, True = real token -> (B, 1, 1, T): everyone sees the real tokens."""
    return text_mask[:, None, None, :]


def causal_mask(text_mask: Tensor, num_prefix: int = 0) -> Tensor:
    """Text that sees a prefix whole and its own past.

    Args:
        text_mask: bool (B, T), True = real token.
        num_prefix: columns before the text that everyone sees (cached queries).

    Returns:
        bool (B, 1, T, num_prefix + T).
    """
    batch, length = text_mask.shape
    past = torch.ones(length, length, dtype=torch.bool, device=text_mask.device).tril()
    text = past & text_mask[:, None, :]  # (B, T, T)
    prefix = text.new_ones(batch, length, num_prefix)
    return torch.cat([prefix, text], dim=2)[:, None]


def qformer_mask(objective: Objective, num_query: int, text_mask: Tensor) -> Tensor:
    """The mask of one Q-Former objective over [queries ; text] (BLIP-2, figure 2).

    Args:
        objective: `itc` queries see queries, text sees text; `itm` everyone sees everyone;
            `itg` queries see queries, text sees queries and its own past.
        num_query: Q.
        text_mask: bool (B, T), True = real token.

    Returns:
        bool (B, 1, Q + T, Q + T); padding columns are False everywhere.
    """
    batch, length = text_mask.shape
    total = num_query + length
    mask = text_mask.new_zeros(batch, 1, total, total)
    mask[:, :, :, :num_query] = True
    mask[:, :, :, num_query:] = padding_mask(text_mask)
    if objective == "itm":
        return mask
    mask[:, :, :num_query, num_query:] = False
    if objective == "itc":
        mask[:, :, num_query:, :num_query] = False
    else:
        mask[:, :, num_query:] = causal_mask(text_mask, num_query)
    return mask
