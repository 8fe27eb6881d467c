"""The next-token loss of all model families, computed at labelled positions only, in parts."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LARGEST_PART = 2**25  # logits in memory at once: 0.4 GB, because their gradients need three copies in float32


def next_token_loss(
    head: nn.Linear,
    hidden_states: Tensor,
    labels: Tensor,
    positions: Tensor | None = None,
    logits: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    in_parts: bool = True,
) -> Tensor:
    """Cross-entropy of the next tokens in float32: the mean over labels, or their sum / ``num_items_in_batch``.

    hidden_states: [b, s, hidden]; labels: [b, s], not shifted, -100 = no loss; logits: [b, s, v]; positions: [n], those
    in the flattened batch that predict a label, as the collator finds them before they would make a GPU wait;
    num_items_in_batch: the number of labels in the whole accumulated batch.

    Without ``logits`` the head computes them for labelled positions. For many positions it computes them in parts,
    and again in the backward pass, so that memory holds only one part.

    ``in_parts=False`` calls the head once. A sharded head needs it: each call gathers the head, all processes must
    call it equally often, and their numbers of labels differ.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    if positions is None:
        positions = (targets != -100).nonzero().squeeze(1)
    predictors = hidden_states if logits is None else logits
    rows, wanted = predictors.flatten(0, 1).index_select(0, positions), targets[positions]
    largest = LARGEST_PART // head.out_features  # labels per part

    def summed_loss(rows: Tensor, targets: Tensor) -> Tensor:
        row_logits = head(rows) if logits is None else rows
        return nn.functional.cross_entropy(row_logits.float(), targets, reduction="sum")

    if logits is not None or not in_parts or len(wanted) <= largest:
        total = summed_loss(rows, wanted)
    else:
        parts = zip(rows.split(largest), wanted.split(largest), strict=True)
        total = torch.stack([checkpoint(summed_loss, *part, use_reentrant=False) for part in parts]).sum()
    return total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)
