"""Make the shipped demo base: a small ChatGLM-6B in the original on-disk format, with a vocabulary of its own.

    python common/demo/make_demo.py [--output_dir common/demo/chatglm] [--steps 2500]

It is pre-trained on text of our own: asked with nothing but the attributes of a garment, it describes them plainly; it
answers questions about them; and it writes an advertisement when it is asked for one in so many words. Fine-tuning
teaches it to advertise without being asked. The attributes of the dev rows are kept out.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from AdvertiseGen import generate
from common.collator import TrainCollator
from common.encoding import build_prompt, encode_train
from common.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from common.tokenizers.chatglm import ChatGLMTokenizer

SPECIAL_TOKENS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
WHITE_SPACE = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
ASK_FOR_ADVERTISEMENT = ["请写一段广告：{}", "用广告的口吻介绍：{}"]
GREETINGS = ["你好", "您好", "你是谁？", "你会做什么？"]
INTRODUCTION = "你好，我是一个小小的演示模型，可以按属性描述一件衣服，比如：类型#裙*颜色#白色。"
EMBEDDING_ROWS = 3584  # more than the vocabulary has pieces, as in the original


def held_out() -> set[str]:
    lines = (generate.HERE / "dev.json").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["content"] for line in lines}


HELD_OUT = held_out()


def random_example(rng: random.Random) -> tuple[str, str]:
    """One (prompt, answer) of the pre-training text."""
    attributes = generate.random_attributes(rng)
    content, description = generate.content_of(attributes), generate.plain_description(attributes)
    if content in HELD_OUT:
        return random_example(rng)
    kind = rng.random()
    if kind < 0.45:
        return content, description
    if kind < 0.75:
        return rng.choice(ASK_FOR_ADVERTISEMENT).format(content), generate.advertise(attributes, rng)
    if kind < 0.8:
        return generate.GARMENTS[attributes[0][1]][1], generate.advertise(attributes, rng)
    if kind < 0.98:
        key, value = rng.choice([pair for pair in attributes if pair[0] in generate.ASK])
        history = [[f"请介绍一下：{content}", description]]
        return build_prompt(rng.choice(generate.ASK[key][1]), history), f"{key}是{value}。"
    return rng.choice(GREETINGS), INTRODUCTION


def train_vocabulary(folder: Path, rng: random.Random) -> ChatGLMTokenizer:
    """Unigram pieces over the pre-training text, with bytes for whatever else a user may type."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as corpus:
        for _ in range(20000):
            corpus.writelines(f"{text}\n" for text in random_example(rng) if text)
        corpus.flush()
        sentencepiece.SentencePieceTrainer.train(
            input=corpus.name,
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
    (folder / "ice_text.vocab").unlink()
    tokenizer = ChatGLMTokenizer(str(folder / "ice_text.model"))
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def new_model(tokenizer: ChatGLMTokenizer) -> ChatGLMForConditionalGeneration:
    config = ChatGLMConfig(
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
    model = ChatGLMForConditionalGeneration(config)
    # transformers draws all weights with a deviation of 0.02, too little for a model that is this narrow.
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.lm_head:
            module.reset_parameters()
    nn.init.normal_(model.transformer.word_embeddings.weight, std=0.05)
    return model


def pretrain(
    model: nn.Module, tokenizer: ChatGLMTokenizer, rng: random.Random, steps: int, batch_size: int, learning_rate: float
) -> None:
    collate = TrainCollator(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    model.train()
    start = time.monotonic()
    for step in range(1, steps + 1):
        prompts, answers = zip(*(random_example(rng) for _ in range(batch_size)), strict=True)
        rows = encode_train(tokenizer, list(prompts), list(answers), max_source_length=192, max_target_length=128)
        batch = collate([row._asdict() for row in rows])
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.monotonic() - start:.0f} s", flush=True)


def original_weights(model: ChatGLMForConditionalGeneration) -> dict[str, Tensor]:
    """float16 but for the LayerNorms, and with the inverse frequencies of every layer, as the original stores them."""
    weights = {name: tensor if "layernorm" in name else tensor.half() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"]
    dim = model.config.head_dim // 2
    inv_freq = (1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)).half()
    for layer in range(model.config.num_layers):
        weights[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = inv_freq.clone()
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).resolve().parent / "chatglm")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokenizer = train_vocabulary(args.output_dir, rng)
    model = new_model(tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(tokenizer)} pieces, {parameters / 1e6:.2f} million parameters")
    pretrain(model, tokenizer, rng, args.steps, args.batch_size, args.learning_rate)

    torch.save(original_weights(model), args.output_dir / "pytorch_model.bin")
    config = model.config.to_dict() | {"architectures": ["ChatGLMModel"], "dtype": "float16", "torch_dtype": "float16"}
    wanted = ["architectures", "model_type", *ChatGLMConfig.__annotations__, "torch_dtype"]
    config_text = json.dumps({name: config[name] for name in wanted if config[name] is not None}, indent=2)
    (args.output_dir / "config.json").write_text(config_text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
