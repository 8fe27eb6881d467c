"""The next-token loss that all generations share, computed at labelled positions only."""

from torch import Tensor, nn


def next_token_loss(
    head: nn.Module,
    hidden_states: Tensor,
    labels: Tensor,
    logits: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy in float32 of the tokens that come next; the labels are shifted here.

    hidden_states: [b, s, hidden]; labels: [b, s], -100 = not counted. Without ``logits`` [b, s, v] the head computes
    those of labelled positions. The mean over labels, or their sum divided by ``num_items_in_batch``, the number of
    labels of a whole accumulated batch.
    """
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    labelled = targets != -100
    scored = head(hidden_states[labelled]) if logits is None else logits[labelled]  # [labels, v]
    total = nn.functional.cross_entropy(scored.float(), targets[labelled], reduction="sum")
    return total / (labelled.sum() if num_items_in_batch is None else num_items_in_batch)
