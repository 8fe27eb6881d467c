"""The chat: how answers are shown, streamed and broken off, and what happens if the generation fails."""

import threading

import pytest
import torch

from common.chat.chat import chat_parser, count_forgotten, load_chat, process_response, stream_chat
from common.encoding import encode_chat
from common.errors import UserError
from common.loading import load_model
from common.tokenizers.base import Turn
from common.tokenizers.chatglm2 import ChatGLM2Tokenizer, ChatGLM3Tokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model():
    return load_model("demo")


@pytest.mark.parametrize(
    ("generated", "shown"),  # as the original code shows them
    [
        ("你好,世界!", "你好，世界！"),
        ("你好, 世界", "你好， 世界"),
        ("a,b", "a,b"),
        ("价格:3元;好?", "价格：3元；好？"),
        ("[[训练时间]]年", "2023年年"),
        (" 前后空格 ", "前后空格"),
        ("a?好", "a？好"),
        ("1:2", "1:2"),
        ("(中文)?", "(中文)?"),
        ("好,,好", "好，，好"),
        ("好!!", "好！!"),
    ],
)
def test_punctuation_is_shown_full_width_beside_chinese(generated, shown, demo_tokenizer):
    assert process_response(generated, demo_tokenizer) == shown


@pytest.mark.parametrize(
    ("generated", "shown"),
    [("你好,世界!", "你好,世界!"), (" 你好，世界 \n", "你好，世界"), ("[[训练时间]]年", "2023年年")],
)
def test_punctuation_of_chatglm2_is_shown_as_it_is(generated, shown, small_vocabulary):
    """Its vocabulary holds both forms."""
    assert process_response(generated, ChatGLM2Tokenizer(str(small_vocabulary))) == shown


def test_the_stream_grows_into_the_whole_answer(model, demo_tokenizer):
    history = [["你好", "你好，我是一个小小的演示模型。"]]
    steps = list(stream_chat(model, demo_tokenizer, "类型#裙*颜色#白色", history, **GREEDY))
    prompt = demo_tokenizer(demo_tokenizer.build_prompt("类型#裙*颜色#白色", history), return_tensors="pt")
    whole = model.generate(**prompt, **GREEDY)[0, prompt["input_ids"].shape[1] :]
    assert steps[-1] == process_response(demo_tokenizer.decode(whole, skip_special_tokens=True), demo_tokenizer)
    assert len(steps) > 5
    assert [len(step) for step in steps] == sorted(len(step) for step in steps)


def test_an_answer_that_is_not_read_on_ends(model, demo_tokenizer):
    before = set(threading.enumerate())
    endless = {"do_sample": False, "max_new_tokens": 10**6, "eos_token_id": None}
    answer = stream_chat(model, demo_tokenizer, "类型#裙*颜色#白色", **endless)
    next(answer)
    [generating] = set(threading.enumerate()) - before
    answer.close()
    assert not generating.is_alive()


def test_an_error_while_generating_is_raised(demo_tokenizer):
    broken = load_model("demo")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        list(stream_chat(broken, demo_tokenizer, "你好", do_sample=True, max_new_tokens=4))


def test_a_system_prompt_comes_before_the_conversation(small_vocabulary):
    tokenizer = ChatGLM3Tokenizer(str(small_vocabulary))
    history = [["u", "a"]]
    turns = [Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a"), Turn("user", "v")]
    given = [token for turn in tokenizer.encode_turns([turns])[0] for token in turn.ids]
    expected = [*tokenizer.prefix_ids, *given, tokenizer.get_command("<|assistant|>")]
    assert encode_chat(tokenizer, "v", history, "s") == expected
    assert encode_chat(tokenizer, "v", history) != expected


def test_a_system_prompt_is_refused_where_there_are_no_roles(demo_tokenizer):
    with pytest.raises(UserError, match="--system_prompt"):
        encode_chat(demo_tokenizer, "v", system="s")
    with pytest.raises(UserError, match="--system_prompt"):
        load_chat(chat_parser("").parse_args(["--system_prompt", "s"]))


def test_the_oldest_rounds_are_forgotten_one_by_one(demo_tokenizer):
    history = [["类型#裙", "这条裙子。"], ["类型#裤", "这条裤子。"], ["颜色", "白色。"]]
    lengths = [len(encode_chat(demo_tokenizer, "价格", history[forgotten:])) for forgotten in range(4)]
    assert lengths == sorted(set(lengths), reverse=True)
    for forgotten, length in enumerate(lengths):
        assert count_forgotten(demo_tokenizer, "价格", history, "", room=length) == forgotten
    with pytest.raises(UserError, match=f"it has {lengths[-1]} tokens, .* room for {lengths[-1] - 1}"):
        count_forgotten(demo_tokenizer, "价格", history, "", room=lengths[-1] - 1)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_quantized_model_chats_within_its_context(bits):
    args = chat_parser("").parse_args(["--model_name_or_path", "demo3", "--quantization_bit", bits])
    model, tokenizer, _ = load_chat(args)
    assert args.max_new_tokens == 512  # half of 1,024
    assert model.is_quantized
    *_, answer = stream_chat(model, tokenizer, "类型#裙*颜色#白色", system="你是客服。", **GREEDY)
    assert "白色" in answer


def test_other_bits_are_refused_before_a_model_is_looked_for(capsys):
    with pytest.raises(SystemExit, match="2"):
        chat_parser("").parse_args(["--quantization_bit", "5"])
    assert "choose from 0, 4, 8" in capsys.readouterr().err
