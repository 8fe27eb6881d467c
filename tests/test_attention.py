"""The kernels of attention get no mask where they need none, and a training step never waits for its device."""

from types import SimpleNamespace

import pytest
import torch
from shell import run_here
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from common.data.collator import left_pad, train_batch
from common.methods.prefix import attach_prefix
from common.models import base
from common.models.cache import ROOM, GrowingLayer
from common.training.trainer import FinetuneTrainer

LENGTHS = (9, 6, 7)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """(kind of the mask, is_causal, heads of query and key, query's positions) of each call, filled during a test."""
    seen: list[tuple] = []

    def spy(query, key, value, attn_mask=None, **flags):
        kind = "lower right" if isinstance(attn_mask, CausalBias) else "none" if attn_mask is None else "tensor"
        seen.append((kind, bool(flags.get("is_causal")), query.shape[1], key.shape[1], query.shape[2]))
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **flags)

    monkeypatch.setattr(base, "F", SimpleNamespace(scaled_dot_product_attention=spy, pad=F.pad))
    return seen


def batch_of(model, lengths=LENGTHS) -> dict:
    torch.manual_seed(1)
    rows = [torch.randint(5, 50, (length,)).tolist() for length in lengths]
    if model.config.bos_token_id == 62:  # the ChatGLM-6B of conftest.py: [gMASK] <sop> before the answer
        rows = [[*row[:-3], 61, 62, *row[-3:]] for row in rows]
    return train_batch([{"input_ids": row, "labels": [-100] * (len(row) - 3) + row[-3:]} for row in rows], 3)


def with_mask(batch: dict) -> dict:
    missing = max(LENGTHS) - torch.tensor(LENGTHS)[:, None]
    return batch | {"attention_mask": torch.arange(batch["input_ids"].shape[1], 0, -1) > missing}


def test_right_padded_rows_train_without_a_mask(small2_model, calls):
    """The kernel is told "causal" and shares keys and values; the loss is that of a mask that hides the pads."""
    batch = batch_of(small2_model)
    model = small2_model.train()
    loss = model(**batch).loss
    assert calls == [("none", True, 4, 2, 9)] * 2
    calls.clear()
    assert torch.equal(model(**with_mask(batch)).loss, loss)
    assert {kind for kind, *_ in calls} == {"tensor"}


def test_a_prefix_trains_without_a_mask(small2_model, calls):
    """The causal mask stands at the lower right: the prefix's keys come first, and every position sees them."""
    model = small2_model
    attach_prefix(model, 5)
    model.train().base_model.prefix_encoder.dropout.p = 0
    batch = batch_of(model)
    loss = model(**batch).loss
    assert [call for call in calls if call[0] != "tensor"] == [("lower right", False, 4, 2, 9)] * 2
    torch.testing.assert_close(loss, model(**with_mask(batch)).loss, rtol=1e-6, atol=0)


def test_a_context_keeps_its_mask(small_model, calls):
    """ChatGLM-6B sees the question in both directions; pads at the right change nothing of it."""
    batch = batch_of(small_model)
    model = small_model.train()
    loss = model(**batch).loss
    assert calls == [("tensor", False, 2, 2, 11)] * 2
    torch.testing.assert_close(loss, model(**with_mask(batch)).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["small_model", "small2_model"])
def test_answers_to_rows_without_pads_need_no_mask(kind, request, calls):
    model = request.getfixturevalue(kind)
    prompts = [[5, 6, 7, *([61, 62] if kind == "small_model" else [])]] * 2
    model.generate(**left_pad(prompts, 3), max_new_tokens=3, do_sample=False)
    heads = {"small_model": (2, 2, 1), "small2_model": (2, 2, 2)}[kind]  # grouped heads become positions
    assert [call for call in calls if call[-1] == heads[-1]] == [("none", False, *heads)] * 4
    calls.clear()
    model.generate(**left_pad([prompts[0], prompts[0][1:]], 3), max_new_tokens=3, do_sample=False)
    assert {kind for kind, *_ in calls} == {"tensor"}


def test_kernels_without_shared_keys_get_a_copy_for_each_head(small2_model, calls, monkeypatch):
    """As a card without flash attention takes them, and as float32 does on any card; the numbers are the same."""
    batch = batch_of(small2_model)
    expected = small2_model(**batch).loss
    monkeypatch.setattr(base, "can_share", lambda *args: False)
    calls.clear()
    torch.testing.assert_close(small2_model(**batch).loss, expected, rtol=1e-6, atol=0)
    assert calls == [("none", True, 4, 4, 9)] * 2


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host must know before it can go on."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indices = args[1] if func.name().startswith(("aten::index.", "aten::index_put")) else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        self.count += by_mask or func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("script", "model"), [("ptuning/train.sh", "demo3"), ("lora/train.sh", "demo")])
def test_no_training_step_waits_for_its_device(script, model, tmp_path, monkeypatch):
    """From the first pass of a training to its last one, with clipping, optimizer and scheduler between them."""
    train, step, causal = FinetuneTrainer.train, FinetuneTrainer.training_step, base.causal_lower_right
    mode, counts = Waits(), []

    def watched(*args, **kwargs):
        with mode:
            return train(*args, **kwargs)

    def noted(trainer, *args):
        counts.append(mode.count)
        assert trainer.accelerator.non_blocking  # the copy of a batch to its device, which a CPU has no need of
        return step(trainer, *args)

    def outside(*size):
        with _disable_current_modes():  # torch can't make this mask inside
            return causal(*size)

    monkeypatch.setattr(FinetuneTrainer, "train", watched)
    monkeypatch.setattr(FinetuneTrainer, "training_step", noted)
    monkeypatch.setattr(base, "causal_lower_right", outside)
    flags = ("--max_steps", "3", "--logging_steps", "100", "--save_strategy", "no", "--do_predict", "false")
    run_here(script, *flags, MODEL=model, GRAD_ACCUM="2", EVAL_STEPS="0", BATCH_SIZE="2", OUTPUT_DIR=str(tmp_path))
    assert len(counts) == 6
    assert set(counts) == {counts[0]}


def test_a_cache_grows_in_place():
    """New keys are written behind the others while there is room; those of another order are copied first."""
    drawn = torch.randn(2, 3, 2 * ROOM, 4)
    layer, addresses = GrowingLayer(), []
    for place in range(ROOM + 3):
        keys, values = layer.update(*(2 * [drawn[:, :, place : place + 1]]))
        addresses.append(keys.data_ptr())
        assert torch.equal(keys, drawn[:, :, : place + 1]) and torch.equal(values, keys)
    assert len(set(addresses[: ROOM + 1])) == 1 and addresses[ROOM + 1] != addresses[0]
    assert addresses[ROOM + 1] == addresses[ROOM + 2]
    layer.reorder_cache(torch.tensor([1, 0]))
    keys, _ = layer.update(drawn[:, :, -1:], drawn[:, :, -1:])
    assert torch.equal(keys, torch.cat((drawn[:, :, : ROOM + 3].flip(0), drawn[:, :, -1:]), dim=2))
