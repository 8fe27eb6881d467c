"""Batched generation of answers to a list of prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.data.collator import left_pad


class PackedLinear(nn.Module):
    """A Linear without bias whose weight was brought into the order in which oneDNN reads it, once for all calls.

    For the few rows of a generation step and a large vocabulary that takes half the time of a plain Linear on a CPU.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, None, "none", [], "")


@contextmanager
def packed_head(model: PreTrainedModel, rows: int) -> Iterator[None]:
    """On a CPU, the model with a packed output layer, for generation in batches of ``rows``."""
    head = model.get_output_embeddings()
    packable = type(head) is nn.Linear and head.bias is None and torch.backends.mkldnn.is_available()
    whole = packable and type(head.weight) is nn.Parameter and head.weight.ndim == 2  # no shard of it
    if not whole or head.weight.device.type != "cpu" or head.weight.dtype != torch.float32:
        yield
        return
    model.set_output_embeddings(PackedLinear(head, rows))
    try:
        yield
    finally:
        model.set_output_embeddings(head)


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    description: str = "generating",
    in_step: bool = False,
    **generation,
) -> list[str]:
    """The answer to each prompt (token ids), in their order, on every process.

    Prompts of like length share a batch, so that little is padded; processes share the batches. ``in_step``: whether
    they share the weights too, so that all generate as long as one does. ``generation`` goes to ``model.generate``.
    """
    state = PartialState()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    was_training = model.training
    model.eval()
    answers: list[tuple[int, str]] = []
    bar = tqdm(total=len(prompts), desc=description, unit="row", disable=not state.is_main_process)
    with packed_head(model, batch_size):
        for start in range(0, len(batches), state.num_processes):
            # Processes that share the weights must generate equally often: the last batch is done again by some.
            batch = batches[min(start + state.process_index, len(batches) - 1)]
            inputs = left_pad([prompts[i] for i in batch], tokenizer.pad_token_id)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            output = model.generate(**inputs, use_cache=True, synced_gpus=in_step, **generation)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if start + state.process_index < len(batches):
                answers += zip(batch, (text.strip() for text in texts), strict=True)
            bar.update(len(batch) * state.num_processes)
    bar.close()
    model.train(was_training)
    return [text for _, text in sorted(gather_object(answers))]
