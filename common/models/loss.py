"""The next-token loss of all model families, computed at labelled positions only, in parts."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LARGEST_PART = 2**25  # logits in memory at once: 0.4 GB where their gradients need three copies in float32
UPSCALE = 2.0**10  # of probabilities, most of which float16 would take for 0


class HeadLoss(torch.autograd.Function):
    """The summed cross-entropy behind a head, from rows [n, hidden], its weight [v, hidden] and targets [n].

    The forward pass computes the gradients of rows and weight beside the loss, in the memory of the logits: nothing is
    computed twice, and no copy of the logits is kept. ``largest``: labels per part.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, largest: int) -> Tensor:
        total = torch.zeros((), device=rows.device)
        of_rows, of_weight = [], None
        for part, wanted in zip(rows.split(largest), targets[:, None].split(largest), strict=True):
            computed = nn.functional.linear(part, weight)
            dtype, logits = computed.dtype, computed.float()
            del computed
            logits -= logits.amax(-1, keepdim=True)
            at_target = logits.gather(1, wanted)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += (sums.log() - at_target).sum()
            logits *= UPSCALE / sums
            logits.scatter_add_(1, wanted, torch.full_like(at_target, -UPSCALE))
            of_rows.append((logits.to(weight.dtype) @ weight).div_(UPSCALE))
            if ctx.needs_input_grad[1]:
                product = logits.to(dtype).T @ part.to(dtype)
                of_weight = product.to(weight.dtype) if of_weight is None else of_weight.add_(product)
        ctx.save_for_backward(torch.cat(of_rows), of_weight if of_weight is None else of_weight.div_(UPSCALE))
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        of_rows, of_weight = ctx.saved_tensors
        # In place: the weight's is as large as the weight.
        of_weight = of_weight if of_weight is None else of_weight.mul_(gradient)
        return (of_rows.float() * gradient).to(of_rows.dtype), of_weight, None, None


def fits(head: nn.Module, rows: Tensor) -> bool:
    """Whether ``HeadLoss`` computes this head. In float16 the upscaled gradient of a weight would overflow."""
    if type(head) is not nn.Linear or head.bias is not None or not (rows.requires_grad and torch.is_grad_enabled()):
        return False
    return not head.weight.requires_grad or computed_dtype(head.weight) != torch.float16


def computed_dtype(weight: Tensor) -> torch.dtype:
    """Of products with a weight, which autocast may cast."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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

    Without ``logits`` the head computes them for labelled positions; of many positions in parts, so that memory holds
    only one of them. ``HeadLoss`` does that for a plain head; another one computes them again in the backward pass.

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

    if logits is None and in_parts and fits(head, rows):
        total = HeadLoss.apply(rows, head.weight, wanted, largest)
    elif logits is not None or not in_parts or len(wanted) <= largest:
        total = summed_loss(rows, wanted)
    else:
        parts = zip(rows.split(largest), wanted.split(largest), strict=True)
        total = torch.stack([checkpoint(summed_loss, *part, use_reentrant=False) for part in parts]).sum()
    return total / (len(wanted) if num_items_in_batch is None else num_items_in_batch)
