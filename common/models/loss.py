"""The next-token loss that all generations share, computed at labelled positions only, part by part."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LARGEST_PART = 2**25  # logits that are held at once: 0.4 GB, three times in float32, while they are differentiated


def next_token_loss(
    head: nn.Linear,
    hidden_states: Tensor,
    labels: Tensor,
    logits: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    in_parts: bool = True,
) -> Tensor:
    """Cross-entropy in float32 of the tokens that come next; the labels are shifted here.

    hidden_states: [b, s, hidden]; labels: [b, s], -100 = not counted. Without ``logits`` [b, s, v] the head computes
    those of labelled positions, and of many positions it computes them again for the gradients, so that never more than
    a part of them is held. The mean over labels, or their sum divided by ``num_items_in_batch``, the number of labels
    of a whole accumulated batch.

    ``in_parts=False`` calls the head once: where it is sharded, each call gathers it, which all processes must do
    equally often, and their numbers of labels differ.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    labelled = targets != -100
    wanted = targets[labelled]
    if logits is not None:
        total = summed_loss(logits[labelled], wanted)
    else:
        largest = LARGEST_PART // head.out_features if in_parts else len(wanted)
        total = summed_loss_of_head(head, hidden_states[labelled], wanted, largest)
    return total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """logits: [labels, v]; targets: [labels]."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def summed_loss_of_head(head: nn.Linear, hidden_states: Tensor, targets: Tensor, largest: int) -> Tensor:
    """hidden_states: [labels, hidden]; targets: [labels]; largest: labels of a part."""

    def loss_of(rows: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(head(rows), targets)

    if len(targets) <= largest:
        return loss_of(hidden_states, targets)
    parts = zip(hidden_states.split(largest), targets.split(largest), strict=True)
    return torch.stack([checkpoint(loss_of, *part, use_reentrant=False) for part in parts]).sum()
