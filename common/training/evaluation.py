"""Batched generation of answers to a list of prompts."""

from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common.data.collator import left_pad


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

    Prompts of similar length share a batch, so that little is padded, and the processes divide the batches among
    themselves. ``in_step``: whether they also divide the weights, so that all must generate as long as one does.
    ``generation`` goes to ``model.generate``.
    """
    state = PartialState()
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    batches = [by_length[start : start + batch_size] for start in range(0, len(by_length), batch_size)]
    was_training = model.training
    model.eval()
    answers: list[tuple[int, str]] = []
    bar = tqdm(total=len(prompts), desc=description, unit="row", disable=not state.is_main_process)
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
