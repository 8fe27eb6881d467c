"""A frozen base in float16, as T4 and 2080 Ti compute: its loss is scaled, so that small gradients do not become 0."""

import pytest
import torch

from common.arguments import FullArguments, LoraArguments
from common.flags import parse_arguments
from common.loading import load_model
from common.memory.fit import setup_of
from common.methods.full import Full
from common.methods.lora import Lora
from common.models.registry import DEMOS, open_model
from common.training.checks import complete

LABELS = 131072.0  # of one step: batches x rows x tokens


def gradient(dtype: torch.dtype, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    """The prefix's gradient by 64 of a step's labels."""
    torch.manual_seed(0)
    model = load_model("demo3", dtype, pre_seq_len=8)
    ids = torch.randint(100, 2000, (2, 32), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    loss = model(**batch, num_items_in_batch=torch.tensor(LABELS), loss_only=True, use_cache=False).loss
    (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.unscale_(torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad]))
    return model.base_model.prefix_encoder.embedding.weight.grad


def test_scaled_gradients_are_right():
    exact = gradient(torch.float32)
    plain, scaled = (
        (gradient(torch.float16, scaler) - exact).norm() / exact.norm()
        for scaler in (None, torch.amp.GradScaler("cpu"))
    )
    assert plain > 0.05
    assert scaled < 0.03


@pytest.mark.parametrize(
    ("method", "flags", "scales"),
    [
        (Lora, "", True),
        (Lora, "--precision fp32", False),
        (Lora, "--fp16", False),  # which asks for autocast; Accelerate then scales by itself
        (Full, "", False),
    ],
)
def test_where_the_base_computes_in_float16_the_loss_is_scaled(method, flags, scales, monkeypatch):
    monkeypatch.setattr("common.arguments.compute_dtype", lambda device: torch.float16)
    kind = LoraArguments if method is Lora else FullArguments
    model_args, method_args, data_args, args = parse_arguments(kind, ["--do_train", *flags.split()])
    complete(method(method_args), model_args, args, open_model(DEMOS["demo3"]))
    assert args.loss_scaling == scales
    assert args.fp16 == (scales or flags == "--fp16")
    setup = setup_of(method(method_args), None, data_args, args)
    assert (setup.autocast is None) == (flags != "--fp16")
    if scales:
        assert (args.mixed_precision, setup.dtype) == ("fp16", torch.float16)
