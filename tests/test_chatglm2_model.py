"""ChatGLM2-6B and ChatGLM3-6B give the numbers of the original code: logits, losses, gradients, ids, files."""

import json

import pytest
import torch
from safetensors import safe_open
from test_chatglm_model import LOGITS, RELATIVE, batch_of, check_logits, gradients, relative_error
from tiny_models import CHATGLM3
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

from common.arguments import PrefixArguments
from common.methods.prefix import PTuning, attach_prefix, load_prefix
from common.models import loss
from common.models.cache import GrowingLayer
from common.models.chatglm2 import ChatGLMConfig, ChatGLMForConditionalGeneration, SwiGLU, inverse_frequencies
from common.models.registry import SPECS

CASES = ["train_b4", "train_rounds", "train_trunc"]
PREFIXES = ["prefix_proj0", "prefix_proj1"]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
only_chatglm3 = pytest.mark.parametrize("spec", [CHATGLM3], ids=["chatglm3-6b"], indirect=True)


def training_batch(goldens: dict, name: str) -> dict:
    return batch_of(goldens, name, "input_ids", "labels", "attention_mask", "position_ids")


def left_padded(goldens: dict) -> dict:
    """Four prompts of different lengths, as generate() takes them."""
    return batch_of(goldens, "leftpad_batch", "input_ids", "attention_mask")


def single_prompts(goldens: dict) -> list:
    """The same prompts, each alone and without pads: [1, s]."""
    batch = left_padded(goldens)
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [input_ids[real][None] for input_ids, real in rows]


def check_training_case(model, goldens: dict, training_goldens: dict, case: str, tuned: str = "") -> None:
    """Compares the loss and the logits of all tokens but the pads."""
    batch = training_batch(goldens, case)
    output = model(**batch)
    check_logits(output.logits, goldens, tuned + case, batch["attention_mask"].bool())
    assert output.loss.item() == pytest.approx(training_goldens[tuned + case]["loss"], rel=1e-4)


def check_gradient_norms(model, goldens: dict, expected: dict, case: str) -> None:
    """Compares the gradient norm of every trainable parameter."""
    model(**training_batch(goldens, case), loss_only=True).loss.backward()
    found = {name: weight.grad.norm().item() for name, weight in model.named_parameters() if weight.requires_grad}
    assert found == pytest.approx(expected["grad_norms"], rel=1e-4)


def check_greedy(model, goldens: dict, expected, **settings) -> None:
    """Compares greedy ids: of the batch, with and without cache, and of each row alone."""
    batch = left_padded(goldens)
    length = batch["input_ids"].shape[1]
    for use_cache in (True, False):
        output = model.generate(**batch, **GREEDY, **settings, use_cache=use_cache)
        assert torch.equal(output[:, length:], expected)
    for input_ids, row in zip(single_prompts(goldens), expected, strict=True):
        assert torch.equal(model.generate(input_ids, **GREEDY, **settings)[0, input_ids.shape[1] :], row)


@pytest.fixture(params=PREFIXES)
def kind(request) -> str:
    return request.param


@pytest.fixture
def prefix_model(kind, spec, fresh_tiny2_model) -> ChatGLMForConditionalGeneration:
    """The tiny model with a prefix of the original, in eval mode, because the goldens have no dropout."""
    load_prefix(fresh_tiny2_model, spec.goldens / kind)
    return fresh_tiny2_model


@pytest.fixture
def lora_model(spec, fresh_tiny2_model):
    """The tiny model with an adapter that the official script saved."""
    from peft import PeftModel  # the import takes seconds

    return PeftModel.from_pretrained(fresh_tiny2_model, spec.goldens / "lora_adapter", is_trainable=True).eval()


# Forward


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_training_rows(tiny2_model, goldens2, training_goldens2, case):
    check_training_case(tiny2_model, goldens2, training_goldens2, case)


@torch.no_grad()
def test_left_padded_batch(tiny2_model, goldens2):
    batch = batch_of(goldens2, "leftpad_batch", "input_ids", "attention_mask", "position_ids")
    check_logits(tiny2_model(**batch).logits, goldens2, "leftpad_batch", batch["attention_mask"].bool())


@torch.no_grad()
def test_single_prompts(tiny2_model, goldens2):
    """Without a mask there are no pads, and positions count from 0."""
    for index, input_ids in enumerate(single_prompts(goldens2)):
        check_logits(tiny2_model(input_ids).logits, goldens2, f"single_{index}")


@torch.no_grad()
def test_text_in_pieces_equals_text_at_once(tiny2_model, goldens2):
    """Positions and the mask continue after the cache."""
    input_ids = single_prompts(goldens2)[0]
    cache, logits = None, []
    for piece in input_ids.split(20, dim=1):
        output = tiny2_model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert len(logits) > 2
    check_logits(torch.cat(logits, dim=1), goldens2, "single_0")


@torch.no_grad()
def test_eager_attention_equals_sdpa(fresh_tiny2_model, goldens2):
    """Its weights also show that no position attends to a pad or to a later position."""
    fresh_tiny2_model.set_attn_implementation("eager")
    batch = batch_of(goldens2, "leftpad_batch", "input_ids", "attention_mask", "position_ids")
    real = batch["attention_mask"].bool()
    output = fresh_tiny2_model(**batch, output_attentions=True)
    check_logits(output.logits, goldens2, "leftpad_batch", real)
    length = real.shape[1]
    visible = torch.ones(length, length).tril().bool() & real[:, None]
    assert len(output.attentions) == 4
    for weights in output.attentions:
        assert weights.shape == (4, 4, length, length)
        seen = weights.transpose(1, 2)[real]  # [tokens, h, t]
        hidden = ~visible[real][:, None].expand_as(seen)
        assert seen[hidden].max() == 0
        torch.testing.assert_close(seen.sum(-1), torch.ones(len(seen), 4))


@torch.no_grad()
def test_hidden_states(tiny2_model, goldens2):
    """The input of the first layer, then the output of each layer; the last is the input of the head."""
    input_ids = single_prompts(goldens2)[0]
    output = tiny2_model(input_ids, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[0], tiny2_model.get_input_embeddings()(input_ids))
    assert torch.equal(tiny2_model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    assert tiny2_model(input_ids).hidden_states is None


@torch.no_grad()
def test_half_precision_is_near_the_original(tiny2_folder, goldens2):
    """The original rounds more in float16 than we do. We differ from it by no more than it differs from float32."""
    model = ChatGLMForConditionalGeneration.from_pretrained(tiny2_folder).eval()
    assert model.dtype == torch.float16  # the dtype of the checkpoint
    batch = training_batch(goldens2, "train_b4")
    logits = model(**{key: value[:1] for key, value in batch.items()}).logits.float()
    difference = logits[..., goldens2["cols"]] - goldens2["half_train_b4/lg_cols"]
    assert difference[batch["attention_mask"][:1].bool()].abs().max() < 0.03


@pytest.mark.parametrize("ratio, base", [(1, 10_000), (50, 500_000)])
def test_rotary_base(ratio, base):
    """rope_ratio multiplies the base."""
    found = inverse_frequencies(ChatGLMConfig(kv_channels=128, rope_ratio=ratio))
    assert found.tolist() == pytest.approx([base ** (-pair / 32) for pair in range(32)], rel=1e-5)


def test_the_long_variant_of_chatglm2_divides_the_positions():
    """ChatGLM2-6B-32k interpolates positions; ChatGLM3-6B-32k raises the base."""
    found = inverse_frequencies(ChatGLMConfig(kv_channels=128, rope_ratio=16, generation="chatglm2"))
    assert found.tolist() == pytest.approx([10000 ** (-pair / 32) / 16 for pair in range(32)], rel=1e-5)


@torch.no_grad()
def test_rope_ratio_of_the_config_is_used(small2_model, tmp_path):
    input_ids = torch.arange(3, 40)[None]
    before = small2_model(input_ids).logits
    small2_model.config.rope_ratio = 50
    stretched = small2_model(input_ids).logits
    assert (stretched - before).abs().max() > 1e-5
    small2_model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids).logits, stretched)


# Training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["train_b4", "train_rounds"])
def test_gradient_norms(fresh_tiny2_model, goldens2, training_goldens2, case, checkpointing):
    model = fresh_tiny2_model.train()
    forwards = []
    model.transformer.encoder.layers[2].mlp.register_forward_pre_hook(lambda *args: forwards.append(1))
    if checkpointing:
        model.gradient_checkpointing_enable()
    assert len(training_goldens2[case]["grad_norms"]) == 31
    check_gradient_norms(model, goldens2, training_goldens2[case], case)
    assert len(forwards) == 1 + checkpointing


@torch.no_grad()
def test_loss_alone(tiny2_model, goldens2, training_goldens2):
    batch = training_batch(goldens2, "train_rounds")
    output = tiny2_model(**batch, loss_only=True)
    assert output.logits is None
    assert output.loss.item() == pytest.approx(training_goldens2["train_rounds"]["loss"], rel=1e-5)
    counted = int((batch["labels"][:, 1:] != -100).sum())
    for loss_only in (False, True):
        loss = tiny2_model(**batch, loss_only=loss_only, num_items_in_batch=counted).loss
        torch.testing.assert_close(loss, output.loss, **RELATIVE)


def test_micro_batches_sum_to_the_whole_batch(fresh_tiny2_model, goldens2):
    """With num_items_in_batch a token has the same weight in every micro batch."""
    batch = training_batch(goldens2, "train_trunc")
    batch["labels"][0, :-4] = -100
    parts = [{key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1)]
    counts = [int((part["labels"] != -100).sum()) for part in parts]
    assert counts[0] != counts[1]
    whole = gradients(fresh_tiny2_model, batch)
    summed = [gradients(fresh_tiny2_model, part, num_items_in_batch=sum(counts)) for part in parts]
    for name, gradient in whole.items():
        assert relative_error(summed[0][name] + summed[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_left_padded_training_rows_have_finite_gradients(small2_model, attention):
    """A left pad attends to no key; its softmax must not be nan."""
    small2_model.set_attn_implementation(attention)
    input_ids = torch.tensor([[0, 0, 0, 7, 8, 9, 10, 2], [3, 4, 5, 6, 7, 8, 9, 2]])
    labels = torch.where(torch.arange(8) >= 5, input_ids, -100)
    loss = small2_model.train()(input_ids, attention_mask=(input_ids != 0).long(), labels=labels).loss
    loss.backward()
    assert loss.isfinite() and all(parameter.grad.isfinite().all() for parameter in small2_model.parameters())


# Generation


def test_greedy(tiny2_model, goldens2, spec):
    check_greedy(tiny2_model, goldens2, goldens2["generate_base/new"], eos_token_id=spec.stop_ids)


def test_rows_end_at_any_of_the_end_tokens(tiny2_model, goldens2):
    """Two early tokens of the rows become end tokens: each row ends at its first one, and pads follow."""
    expected = goldens2["generate_base/new"].clone()
    ends = torch.stack([expected[0, 4], expected[1, 9]])
    for row in expected:
        index = torch.isin(row, ends).nonzero()[:1, 0]
        for end in index.tolist():
            row[end + 1 :] = 0
    lengths = (expected != 0).sum(1)
    assert lengths[0] <= 5 and lengths[1] <= 10 and lengths.max() > lengths.min()
    batch = left_padded(goldens2)
    output = tiny2_model.generate(**batch, **GREEDY, eos_token_id=[2, *ends.tolist()])
    assert torch.equal(output[:, batch["input_ids"].shape[1] :], expected[:, : lengths.max()])


def test_beam_search_is_equal_batched_and_single(tiny2_model, goldens2):
    batch = left_padded(goldens2)
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    cache = Cache(layer_class_to_replicate=GrowingLayer)
    batched = tiny2_model.generate(**batch, **settings, past_key_values=cache)[:, batch["input_ids"].shape[1] :]
    assert not torch.equal(batched, goldens2["generate_base/new"][:, :8])  # otherwise the test would not test beams
    for input_ids, row in zip(single_prompts(goldens2), batched, strict=True):
        assert torch.equal(tiny2_model.generate(input_ids, **settings)[0, input_ids.shape[1] :], row)


def test_sampling_of_a_padded_batch(tiny2_model, goldens2):
    """Sampling from the best token alone gives the greedy ids for every sequence; from all tokens it gives others."""
    batch = left_padded(goldens2)
    length, expected = batch["input_ids"].shape[1], goldens2["generate_base/new"][:, :4]
    settings = {"do_sample": True, "max_new_tokens": 4, "num_return_sequences": 2}
    best = tiny2_model.generate(**batch, **settings, top_k=1)[:, length:]
    assert torch.equal(best, expected.repeat_interleave(2, dim=0))
    torch.manual_seed(0)
    drawn = tiny2_model.generate(**batch, **settings, top_k=0, temperature=2.0)[:, length:]
    assert drawn.shape == best.shape and not torch.equal(drawn, best)


# Prefix


@pytest.mark.parametrize("case", CASES[:2])
@torch.no_grad()
def test_prefix_logits_and_loss(prefix_model, kind, goldens2, training_goldens2, case):
    check_training_case(prefix_model, goldens2, training_goldens2, case, f"{kind}_")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_gradient_norms(prefix_model, kind, goldens2, training_goldens2, checkpointing):
    prefix_model.train()
    prefix_model.transformer.prefix_encoder.dropout.p = 0.0
    if checkpointing:
        prefix_model.gradient_checkpointing_enable()
    check_gradient_norms(prefix_model, goldens2, training_goldens2[f"{kind}_train_b4"], "train_b4")


def test_prefix_greedy(prefix_model, kind, goldens2, spec):
    check_greedy(prefix_model, goldens2, goldens2[f"generate_{kind}/new"], eos_token_id=spec.stop_ids)


@torch.no_grad()
def test_prefix_does_not_shift_positions(prefix_model, goldens2):
    input_ids = single_prompts(goldens2)[0]
    positions = torch.arange(input_ids.shape[1])[None]
    logits = prefix_model(input_ids).logits
    torch.testing.assert_close(prefix_model(input_ids, position_ids=positions).logits, logits, **LOGITS)
    mask = torch.ones_like(input_ids)
    torch.testing.assert_close(prefix_model(input_ids, attention_mask=mask).logits, logits, **LOGITS)
    assert (prefix_model(input_ids, position_ids=positions + 16).logits - logits).abs().max() > 1


@torch.no_grad()
def test_prefix_stands_in_the_cache_once(prefix_model, goldens2):
    input_ids = single_prompts(goldens2)[0]
    first = prefix_model(input_ids[:, :20], use_cache=True)
    assert first.past_key_values.get_seq_length() == 36
    rest = prefix_model(input_ids[:, 20:], past_key_values=first.past_key_values)
    logits = torch.cat((first.logits, rest.logits), dim=1)
    torch.testing.assert_close(logits, prefix_model(input_ids).logits, **LOGITS)


@torch.no_grad()
def test_without_prefix_is_the_base_model(prefix_model, goldens2):
    input_ids = single_prompts(goldens2)[0]
    tuned = prefix_model(input_ids).logits
    with PTuning(PrefixArguments()).base(prefix_model) as base:
        check_logits(base(input_ids).logits, goldens2, "single_0")
    assert torch.equal(prefix_model(input_ids).logits, tuned)
    assert (tuned[..., goldens2["cols"]] - goldens2["single_0/lg_cols"]).abs().max() > 0.1


@pytest.mark.parametrize("projection", [False, True])
@torch.no_grad()
def test_prefix_save_and_load(small2_model, tmp_path, projection):
    """Names and shapes are the original's: even with projection the embedding is as wide as all keys and values."""
    attach_prefix(small2_model, 5, projection)
    shapes = {"embedding.weight": (5, 64)}
    if projection:
        shapes |= {"trans.0.weight": (32, 64), "trans.0.bias": (32,), "trans.2.weight": (64, 32), "trans.2.bias": (64,)}
    logits = small2_model(torch.arange(9)[None]).logits
    PTuning(PrefixArguments()).save(small2_model, tmp_path)
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    prefix = "transformer.prefix_encoder."
    assert {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in stored.items()} == shapes
    assert all(name.startswith(prefix) for name in stored)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["pre_seq_len"], config["prefix_projection"]) == (5, projection)
    attach_prefix(small2_model, 7)
    load_prefix(small2_model, tmp_path)
    assert torch.equal(small2_model(torch.arange(9)[None]).logits, logits)


# LoRA


@only_chatglm3
def test_official_lora_adapter(lora_model, goldens2, training_goldens2):
    with torch.no_grad():
        check_training_case(lora_model, goldens2, training_goldens2, "train_b4", "lora_")
    check_gradient_norms(lora_model, goldens2, training_goldens2["lora_train_b4"], "train_b4")


@only_chatglm3
def test_official_lora_adapter_greedy(lora_model, goldens2, spec):
    expected = goldens2["generate_lora/new"]
    check_greedy(lora_model, goldens2, expected, eos_token_id=spec.stop_ids)


# Files


def original_tensors(folder) -> dict:
    tensors = {}
    for file in sorted(folder.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    assert len(tensors) == 32
    return tensors


def test_nothing_of_the_checkpoint_folder_is_executed(tiny2_folder, spec):
    """Neither our class nor the Auto class runs it."""
    registered = SPECS[spec.name.removesuffix("-6b")]
    for model_class in (ChatGLMForConditionalGeneration, AutoModelForCausalLM):
        model = model_class.from_pretrained(tiny2_folder)
        assert type(model) is registered.model is ChatGLMForConditionalGeneration
        assert type(model.config) is registered.config is ChatGLMConfig
    assert not (tiny2_folder / "executed").exists()


@torch.no_grad()
def test_save_and_load(tiny2_folder, tiny2_model, goldens2, tmp_path):
    tiny2_model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        saved = set(file.keys())
    assert saved == original_tensors(tiny2_folder).keys() - {"transformer.rotary_pos_emb.inv_freq"}
    config = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((tiny2_folder / "config.json").read_text())
    ignored = {"torch_dtype", "auto_map", "transformers_version", "_name_or_path", "architectures"}
    assert {name for name in original.keys() - ignored if config.get(name) != original[name]} == set()
    assert config["torch_dtype"] == "float32" and "auto_map" not in config
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    input_ids = single_prompts(goldens2)[0]
    assert torch.equal(loaded(input_ids).logits, tiny2_model(input_ids).logits)


def test_original_state_dict_is_the_original_checkpoint(tiny2_folder, tiny2_model):
    original, ours = original_tensors(tiny2_folder), tiny2_model.original_state_dict()
    assert ours.keys() == original.keys()
    for name, tensor in original.items():
        assert ours[name].dtype == torch.float16 and torch.equal(ours[name], tensor), name


def test_swiglu_is_what_autograd_makes_of_its_formula():
    torch.manual_seed(0)
    fused = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    gate, up = fused.chunk(2, dim=-1)
    assert torch.equal(SwiGLU.apply(fused), torch.nn.functional.silu(gate) * up)
    assert torch.autograd.gradcheck(SwiGLU.apply, fused)


def test_the_loss_of_many_positions_is_computed_in_parts(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 64)
    hidden_states = torch.randn(2, 10, 8, requires_grad=True)
    labels = torch.randint(64, (2, 10))
    labels[:, :3] = -100
    whole = loss.next_token_loss(head, hidden_states, labels)
    expected = torch.autograd.grad(whole, (hidden_states, head.weight))
    largest = []
    head.register_forward_hook(lambda module, inputs, logits: largest.append(len(logits)))
    monkeypatch.setattr(loss, "LARGEST_PART", 64 * 4)
    parts = loss.next_token_loss(head, hidden_states, labels)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, (hidden_states, head.weight)), expected)
    assert largest == [4, 4, 4, 2] + [2, 4, 4, 4]  # 14 labelled positions, in the forward and the backward pass
    torch.testing.assert_close(loss.next_token_loss(head, hidden_states, labels, in_parts=False), whole)
    assert largest[8:] == [14]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", [4, 64])
@pytest.mark.parametrize("trained", [False, True])
def test_a_plain_head_computes_its_loss_in_one_pass(dtype, part, trained, monkeypatch):
    """The loss and the gradients are those of cross_entropy, also where float16 takes small probabilities for 0."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 4096, bias=False, dtype=dtype).requires_grad_(trained)
    hidden_states = torch.randn(2, 10, 8, dtype=dtype, requires_grad=True)
    labels = torch.randint(4096, (2, 10))
    labels[:, :3] = -100
    inputs = (hidden_states, head.weight) if trained else (hidden_states,)
    rows, targets = hidden_states[:, 2:-1].flatten(0, 1).double(), labels[:, 3:].flatten()
    exact = torch.nn.functional.cross_entropy(rows @ head.weight.double().T, targets)
    expected = torch.autograd.grad(exact, inputs)
    monkeypatch.setattr(loss, "LARGEST_PART", 4096 * part)
    found = loss.next_token_loss(head, hidden_states, labels)
    assert (found.grad_fn.next_functions[0][0].name() == "HeadLossBackward") == loss.fits(head, hidden_states)
    gradients = torch.autograd.grad(2.0**14 * found, inputs)
    assert found.dtype == torch.float32
    error = max(4 * torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(found.double(), exact, rtol=error, atol=0)
    for gradient, wanted in zip(gradients, expected, strict=True):
        limit = {"rtol": error, "atol": error * wanted.abs().max().item()}
        torch.testing.assert_close(gradient / 2.0**14, wanted, **limit)


def test_the_gradient_of_a_head_in_float16_does_not_overflow():
    head = torch.nn.Linear(8, 16, bias=False)
    hidden_states = torch.full((1, 65, 8), 4.0, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss.next_token_loss(head, hidden_states, torch.zeros(1, 65, dtype=torch.long)).backward()
    assert head.weight.grad[0].isfinite().all()
