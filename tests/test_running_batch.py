"""Requests that join and leave a running batch get the answers that they get alone."""

import pytest
import torch
from transformers import GlmConfig, PreTrainedModel

from common.arguments import LoraArguments
from common.chat.batches import RunningBatch
from common.encoding import encode_chat
from common.loading import load_model, load_tokenizer
from common.methods.lora import attach_lora
from common.methods.prefix import attach_prefix
from common.models.glm4 import GlmForCausalLM

QUESTIONS = (
    *("类型#裙*颜色#白色*风格#甜美", "你好", "类型#裤*裤型#阔腿裤"),
    "类型#上衣*材质#棉*图案#条纹*衣样式#衬衫*衣领型#翻领",
)
TOKENS = 24


def tuned(model: PreTrainedModel, method: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if method == "prefix":
        attach_prefix(model, 5)
        model.base_model.prefix_encoder.eval()
    if method == "lora":
        model = attach_lora(model, LoraArguments(lora_dropout=0.0)).eval()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
    return model


def alone(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """The greedy tokens and their logits, [TOKENS, v]."""
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1}
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **how
    )
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits)


@pytest.mark.parametrize("method", ["base", "prefix", "lora"])
@pytest.mark.parametrize("name", ["demo", "demo3"])
def test_rows_that_join_and_leave_answer_as_alone(name, method):
    tokenizer, model = load_tokenizer(name), tuned(load_model(name), method)
    check_rows(model, [encode_chat(tokenizer, question) for question in QUESTIONS])


def test_rows_of_glm_4_answer_as_alone():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = GlmConfig(vocab_size=200, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **sizes)
    check_rows(GlmForCausalLM(config).eval(), [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 9], [3] * 5, [4, 4]])


def check_rows(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    expected = [alone(model, prompt) for prompt in prompts]
    batch, rows = RunningBatch(model), list[int]()
    answers: list[list[int]] = [[] for _ in prompts]
    joins = {0: [0], 3: [1, 2], 9: [3]}  # step -> questions that join before it
    for step in range(60):
        if joining := joins.get(step, []):
            logits = batch.join([prompts[number] for number in joining])
            rows += joining
            for number, row in zip(joining, logits, strict=True):
                torch.testing.assert_close(row, expected[number][1][0], rtol=0, atol=1e-4)
                answers[number].append(int(row.argmax()))
        if left := [place for place, number in enumerate(rows) if len(answers[number]) < TOKENS]:
            if len(left) < len(rows):
                batch.keep(left)
                rows = [rows[place] for place in left]
            logits = batch.step([answers[number][-1] for number in rows])
            for place, number in enumerate(rows):
                wanted = expected[number][1][len(answers[number])]
                torch.testing.assert_close(logits[place], wanted, rtol=0, atol=1e-4)
                answers[number].append(int(logits[place].argmax()))
    assert answers == [tokens for tokens, _ in expected]
    batch.keep([])
    assert len(batch) == 0
    again = batch.join([prompts[1]])  # it can begin again
    torch.testing.assert_close(again[0], expected[1][1][0], rtol=0, atol=1e-4)


def test_the_cache_is_no_longer_than_the_longest_row():
    model = tuned(load_model("demo3"), "prefix")
    batch = RunningBatch(model)
    batch.join([[5] * 40])
    batch.join([[6] * 10])
    batch.step([7, 8])
    assert batch.cache.layers[0].keys.shape[2] == 5 + 41
    batch.keep([1])
    assert batch.cache.layers[0].keys.shape[2] == 5 + 11 and batch.mask.tolist() == [[1] * 11]
