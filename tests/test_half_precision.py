"""bfloat16 and float16 follow float32: three steps of training and eight greedy tokens of every method, on the CPU.

The methods with a frozen base run without autocast, here as on a GPU: the base computes in half precision, prefix and
adapter in float32. Full training has float32 weights and is the same
autocast on either device, but for its list of operators: a CPU's has no LayerNorm and softmax in float32, which our
models ask for themselves.
"""

import re
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CHATGLM, CHATGLM2, CHATGLM3
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.arguments import FullArguments, LoraArguments, PrefixArguments
from common.data.collator import train_batch
from common.methods.full import Full
from common.methods.lora import Lora
from common.methods.prefix import PTuning
from common.models.quantization import checkpointing_of
from common.models.registry import SPECS, ModelFolder
from common.models.weights import load_base

MODELS = {spec.name: spec for spec in (CHATGLM, CHATGLM2, CHATGLM3)}
VOCABULARY, STEPS, TOKENS = 512, 3, 8
METHODS = {
    "ptuning": PTuning(PrefixArguments(pre_seq_len=4)),
    "lora": Lora(LoraArguments(lora_dropout=0.0)),
    "full": Full(FullArguments()),
}
SETTINGS = [*((method, bits) for method in ("ptuning", "lora") for bits in (None, 4, 8)), ("full", None)]
SPECIAL = {"mask_token_id": 500, "gmask_token_id": 501, "bos_token_id": 502, "eos_token_id": 503}
ROWS = [[3, 14, 15, 92, 65, 35, 89, 79], [27, 18, 28, 45]], [[31, 41, 59, 26, 53, 58], [97, 93, 23, 84, 62]]

# Twice what was measured, in steps of the dtype (2 ** -7 or 2 ** -10): of each loss, relative; of the gradient, as the
# norm of the difference to the norm; of the logits of greedy tokens to the best ones, in standard deviations. In full
# training the later losses differ more, because Adam moves a weight by the sign of a gradient that is nearly 0.
LOSS = {"ptuning": 0.5, "lora": 0.5, "full": 6}
GRADIENT, ANSWER = 12, 16


class Run(NamedTuple):
    """What a training gave."""

    losses: Tensor  # of each step
    gradient: Tensor  # of the first step, of all trained weights
    model: PreTrainedModel


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@cache
def folder_of(name: str, root: Path) -> ModelFolder:
    """Two layers of the tiny model and the first words of its vocabulary, because float16 is slow on a CPU.

    All three dtypes have its weights exactly, so that they are quantized alike.
    """
    spec, path = MODELS[name], root / name
    path.mkdir()
    weights = {
        name: x for name, x in spec.draw_weights(spec.seed).items() if not re.search(r"inv_freq|s\.[23]\.", name)
    }
    weights = {name: x[:VOCABULARY].bfloat16().half() for name, x in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    known = SPECS[name.removesuffix("-6b")]
    sizes = {"vocab_size": VOCABULARY, **SPECIAL} if spec is CHATGLM else {"padded_vocab_size": VOCABULARY}
    return ModelFolder(
        name, path, known, known.config(**spec.config | sizes | {"num_layers": 2}), None, (path / "model.safetensors",)
    )


def question_of(name: str, ids: list[int]) -> list[int]:
    return [*ids, SPECIAL["gmask_token_id"], SPECIAL["bos_token_id"]] if name == CHATGLM.name else ids


def batch_of(name: str) -> dict[str, Tensor]:
    """Two rows of different lengths, as they are trained."""
    rows = []
    for ids, answer in ROWS:
        question = question_of(name, ids)
        rows.append({"input_ids": question + answer, "labels": [-100] * len(question) + answer})
    return train_batch(rows, pad_token_id=3)


def step(model: PreTrainedModel, name: str, dtype: torch.dtype, autocast: bool) -> Tensor:
    """The loss, after its backward pass."""
    with torch.autocast("cpu", dtype) if autocast else nullcontext():
        loss = model(**batch_of(name), use_cache=False).loss
    loss.backward()
    return loss.detach().float()


@cache
def train(name: str, root: Path, method_name: str, bits: int | None, dtype: torch.dtype, checkpointing: bool) -> Run:
    method = METHODS[method_name]
    model = load_base(folder_of(name, root), torch.float32 if method.trains_base else dtype, bits, "cpu", trained=True)
    torch.manual_seed(0)
    model = method.attach(model)
    answer(name, model)  # the base is scored before a training, and must still pass gradients on
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if checkpointing:
        how = checkpointing_of(bits)
        if how["use_reentrant"]:
            model.enable_input_require_grads()
        model.activation_checkpointing_enable(how)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses, gradient = [], torch.empty(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses.append(step(model, name, dtype, autocast=method.trains_base and dtype != torch.float32))
        if len(losses) == 1:
            gradient = torch.cat([weight.grad.float().flatten() for weight in trained])
        optimizer.step()
    return Run(torch.stack(losses), gradient, model.eval())


def answer(name: str, model: PreTrainedModel) -> Tensor:
    """Greedy tokens, [TOKENS]."""
    question = torch.tensor([question_of(name, ROWS[0][0])])
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return model.generate(input_ids=question, attention_mask=torch.ones_like(question), **how)[0, -TOKENS:]


def margin(name: str, tokens: Tensor, model: PreTrainedModel) -> Tensor:
    """By how much the logits of other tokens exceed those of the chosen ones at most, in standard deviations."""
    question = question_of(name, ROWS[0][0])
    with torch.no_grad():
        logits = model(torch.tensor([question + tokens.tolist()])).logits[0, len(question) - 1 : -1]
    return (logits.max(dim=1).values - logits.gather(1, tokens[:, None])[:, 0]).max() / logits.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("method", "bits"), SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_follows_float32(name, method, bits, dtype, root):
    whole = train(name, root, method, bits, torch.float32, checkpointing=False)
    half = train(name, root, method, bits, dtype, checkpointing=False)
    checkpointed = train(name, root, method, bits, dtype, checkpointing=True)
    assert torch.equal(checkpointed.losses, half.losses) and torch.equal(checkpointed.gradient, half.gradient)
    assert not torch.equal(half.losses, whole.losses)
    step = torch.finfo(dtype).eps  # between 1 and the next number
    torch.testing.assert_close(half.losses, whole.losses, rtol=LOSS[method] * step, atol=0)
    assert (half.gradient - whole.gradient).norm() < GRADIENT * step * whole.gradient.norm()
    step = torch.finfo(torch.bfloat16).eps if bits == 8 else step  # answers round inputs to 8 bit, which is as coarse
    assert margin(name, answer(name, half.model), whole.model) < ANSWER * step
