"""Make a shipped demo base: a small ChatGLM-6B or ChatGLM3-6B in the original on-disk format, with its own vocabulary.

    python common/demo/make_demo.py chatglm         # into common/demo/chatglm
    python common/demo/make_demo.py chatglm3        # into common/demo/chatglm3

The base is pre-trained on our own text. It describes the attributes of a garment plainly, answers questions about
them, and writes an advertisement only if the prompt asks for one; fine-tuning teaches it to advertise without that.
The text has no attributes of the dev rows. The ChatGLM3-6B also learns to repeat a text, so that every piece of its
vocabulary has been an answer; otherwise no adapter could teach it tools.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from AdvertiseGen import conversations, generate
from common.data.collator import train_batch
from common.data.messages import read_messages, tools_text
from common.encoding import conversation_of, encode_train
from common.models import chatglm, chatglm2
from common.tokenizers.base import Turn
from common.tokenizers.chatglm import ChatGLMTokenizer
from common.tokenizers.chatglm2 import ChatGLM3Tokenizer

SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITE_SPACE = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
ASK_FOR_ADVERTISEMENT = ["请写一段广告：{}", "用广告的口吻介绍：{}"]
GREETINGS = ["你好", "您好", "你是谁？", "你会做什么？"]
INTRODUCTION = "你好，我是一个小小的演示模型，可以按属性描述一件衣服，比如：类型#裙*颜色#白色。"
EMBEDDING_ROWS = 3584  # more rows than pieces, as in the original


def held_out() -> set[str]:
    lines = (generate.HERE / "dev.json").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["content"] for line in lines}


HELD_OUT = held_out()


def random_example(rng: random.Random) -> list[Turn]:
    """One conversation of the pre-training text."""
    attributes = generate.random_attributes(rng)
    content, description = generate.content_of(attributes), generate.plain_description(attributes)
    if content in HELD_OUT:
        return random_example(rng)
    kind = rng.random()
    if kind < 0.45:
        return conversation_of(content, description)
    if kind < 0.75:
        query = rng.choice(ASK_FOR_ADVERTISEMENT).format(content)
        return conversation_of(query, generate.advertise(attributes, rng))
    if kind < 0.8:
        return conversation_of(generate.GARMENTS[attributes[0][1]][1], generate.advertise(attributes, rng))
    if kind < 0.98:
        key, value = rng.choice([pair for pair in attributes if pair[0] in conversations.ASK])
        history = [[f"请介绍一下：{content}", description]]
        return conversation_of(rng.choice(conversations.ASK[key][1]), f"{key}是{value}。", history)
    return conversation_of(rng.choice(GREETINGS), INTRODUCTION)


def echo_example(rng: random.Random, pieces: list[str]) -> list[Turn]:
    """A conversation that repeats random pieces."""
    text = "".join(rng.choices(pieces, k=rng.randint(4, 16)))
    return conversation_of(f"跟我说：{text}", text)


def write_corpus(file, rng: random.Random, tools: bool) -> None:
    """Text for the vocabulary: the pre-training text, and tool calls if ``tools``.

    There are few calls, for their characters only: a frequent sentence would become one piece, which would hide the
    value that a model copies into a call.
    """
    for _ in range(20000):
        file.writelines(f"{turn.content}\n" for turn in random_example(rng) if turn.content)
    for row in conversations.make_tool_rows(50 if tools else 0, rng, known=set()):
        turns = read_messages(row["conversations"], "conversations", set())
        file.write(f"\n{tools_text('tools', row['tools'])}\n")
        file.writelines(f"{turn.metadata}\n{turn.content}\n" for turn in turns)
    file.flush()


def make_chatglm_vocabulary(corpus: str, folder: Path) -> ChatGLMTokenizer:
    """Unigram pieces, and bytes for all other text."""
    sentencepiece.SentencePieceTrainer.train(
        input=corpus,
        model_prefix=str(folder / "ice_text"),
        vocab_size=3500,
        hard_vocab_limit=False,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=WHITE_SPACE,
        control_symbols=SPECIAL_TOKENS,
        minloglevel=2,
    )
    return ChatGLMTokenizer(str(folder / "ice_text.model"))


def make_chatglm3_vocabulary(corpus: str, folder: Path) -> ChatGLM3Tokenizer:
    """Byte-pair pieces of unnormalised text, and bytes for all other text."""
    sentencepiece.SentencePieceTrainer.train(
        input=corpus,
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=2700,
        max_sentencepiece_length=4,
        character_coverage=1.0,
        split_digits=True,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return ChatGLM3Tokenizer(str(folder / "tokenizer.model"))


def chatglm_config(tokenizer: ChatGLMTokenizer) -> PreTrainedConfig:
    return chatglm.ChatGLMConfig(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=192,
        num_layers=6,
        num_attention_heads=6,
        inner_hidden_size=768,
        max_sequence_length=512,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        gmask_token_id=tokenizer.gmask_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def chatglm3_config(tokenizer: ChatGLM3Tokenizer) -> PreTrainedConfig:
    return chatglm2.ChatGLMConfig(
        padded_vocab_size=EMBEDDING_ROWS,
        hidden_size=192,
        num_layers=6,
        num_attention_heads=6,
        multi_query_group_num=2,
        kv_channels=32,
        ffn_hidden_size=512,
        seq_length=1024,
        generation="chatglm3",
    )


class DemoSpec(NamedTuple):
    """The model family of a demo base."""

    make_vocabulary: Callable
    make_config: Callable
    model_class: type[PreTrainedModel]
    tools: bool  # whether it learns tools


SPECS = {
    "chatglm": DemoSpec(make_chatglm_vocabulary, chatglm_config, chatglm.ChatGLMForConditionalGeneration, False),
    "chatglm3": DemoSpec(make_chatglm3_vocabulary, chatglm3_config, chatglm2.ChatGLMForConditionalGeneration, True),
}


def new_model(spec: DemoSpec, config: PreTrainedConfig) -> PreTrainedModel:
    model = spec.model_class(config)
    # transformers draws all weights with a standard deviation of 0.02: too small for such a narrow model.
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            module.reset_parameters()
    nn.init.normal_(model.get_input_embeddings().weight, std=0.05)
    return model


def text_pieces(tokenizer: ChatGLM3Tokenizer) -> list[str]:
    """The pieces that mean text, without the bytes."""
    vocabulary = tokenizer.pieces
    texts = range(vocabulary.eos_id() + 1, vocabulary.get_piece_size())
    pieces = [vocabulary.id_to_piece(index) for index in texts if not vocabulary.is_byte(index)]
    return [piece.replace("\u2581", " ") for piece in pieces]


def pretrain(
    model: PreTrainedModel,
    tokenizer,
    rng: random.Random,
    steps: int,
    batch_size: int,
    learning_rate: float,
    pieces: list[str],
) -> None:
    """``pieces``: if given, one conversation in eight repeats some of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        examples = [random_example(rng) for _ in range(batch_size)]
        if pieces:
            examples[: batch_size // 8] = [echo_example(rng, pieces) for _ in range(batch_size // 8)]
        rows = encode_train(tokenizer, examples, max_source_length=192, max_target_length=128)
        batch = train_batch([row.columns for row in rows], tokenizer.pad_token_id)
        loss = model(**batch, loss_only=True).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", choices=SPECS)
    parser.add_argument("--output_dir", type=Path, help="default: beside this program")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    folder = args.output_dir or Path(__file__).resolve().parent / args.spec
    folder.mkdir(parents=True, exist_ok=True)
    spec, rng = SPECS[args.spec], random.Random(args.seed)
    torch.manual_seed(args.seed)

    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as corpus:
        write_corpus(corpus, rng, spec.tools)
        tokenizer = spec.make_vocabulary(corpus.name, folder)
    for listing in folder.glob("*.vocab"):
        listing.unlink()
    tokenizer.save_pretrained(str(folder))
    model = new_model(spec, spec.make_config(tokenizer))
    print(f"{len(tokenizer)} tokens, {model.num_parameters() / 1e6:.2f} million parameters")
    pieces = text_pieces(tokenizer) if spec.tools else []
    pretrain(model, tokenizer, rng, args.steps, args.batch_size, args.learning_rate, pieces)

    torch.save(model.original_state_dict(), folder / "pytorch_model.bin")
    model.config.dtype, model.config.architectures = "float16", ["ChatGLMModel"]
    (folder / "config.json").write_text(model.config.to_json_string(), encoding="utf-8")


if __name__ == "__main__":
    main()
