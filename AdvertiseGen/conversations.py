"""Write sample conversations: questions about a garment, and a shop assistant that looks up stock and prices.

    python3 AdvertiseGen/conversations.py        # train_chat.json, dev_chat.json, train_tools.json, dev_tools.json

A row of the chat files has prompt, response and history. A row of the tool files has the format of the ChatGLM3
fine-tuning README: the offered tools and the messages, in which a message of the role "tool" is a call and its result.
A model copies the arguments from a question and the number from the result; the question and the offered tools decide
whether it makes a call.
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from AdvertiseGen.generate import (
    GARMENTS,
    SELLING,
    advertise,
    advertisement_rows,
    choose,
    content_of,
    make_rows,
    parse_arguments,
    write_rows,
)

# key: (verb of the answer, questions). A question names no value, so the model must find it in the history.
ASK = {
    "材质": ("用的是", ["是什么料子做的？", "料子怎么样？"]),
    "颜色": ("是", ["是什么颜色的？", "颜色好看吗？"]),
    "风格": ("有一种", ["属于哪种风格？", "穿着是什么感觉？"]),
    "图案": ("上面是", ["上面有图案吗？", "图案好看吗？"]),
    "版型": ("用的是", ["版型怎么样？", "会不会挑身材？"]),
    "衣领型": ("是", ["领子是什么样的？", "领口怎么设计的？"]),
    "衣袖长": ("是", ["袖子有多长？", "袖长合适吗？"]),
    "衣袖型": ("是", ["袖子是什么样的？", "袖子好看吗？"]),
    "裙型": ("是", ["是哪种裙型？", "裙摆怎么样？"]),
    "裙长": ("是", ["裙子有多长？", "长度合适吗？"]),
    "裤型": ("是", ["是哪种裤型？", "裤型显瘦吗？"]),
    "裤长": ("是", ["裤子有多长？", "长度合适吗？"]),
    "鞋跟": ("是", ["鞋跟怎么样？", "鞋跟高不高？"]),
    "鞋头": ("是", ["鞋头是什么样的？", "鞋头会挤脚吗？"]),
    "工艺": ("用了", ["做工怎么样？", "用了什么工艺？"]),
    "季节": ("适合", ["什么季节用合适？", "哪个季节能用上？"]),
    "场景": ("适合", ["什么场合用合适？", "平时什么场合用？"]),
}

TOOLS = {
    "stock": {"name": "query_stock", "description": "查询库存", "parameters": {"kind": "类型", "color": "颜色"}},
    "price": {"name": "query_price", "description": "查询价格", "parameters": {"kind": "类型", "color": "颜色"}},
}
SYSTEM_PROMPT = "你是一家服装店的客服。"

# The words of a customer; {} is the garment or "它". No tool answers "service".
QUESTIONS = {
    "stock": ["{}还有货吗？", "{}还剩多少？", "{}有现货吗？"],
    "price": ["{}多少钱？", "{}怎么卖？", "{}是什么价格？"],
    "service": ["{}什么时候发货？", "{}可以退换吗？"],
    "greeting": ["你好！", "你好，我想看看{}。", "在吗？我想买{}。"],
    "thanks": ["谢谢你！", "好的，谢谢。", "谢谢，我再看看{}。"],
}
ANSWERS = {
    "stock": ["亲，{garment}还有{number}{measure}哦。", "您好，{garment}还有{number}{measure}。"],
    "sold out": ["抱歉亲，{garment}卖完了哦。", "不好意思亲，{garment}没货了哦。"],
    "price": ["亲，{garment}是{number}元哦。", "您好，{garment}是{number}元。"],
    "greeting": ["您好亲，想了解什么都可以问我哦。", "您好亲，欢迎光临，有问题请问我哦。"],
    "thanks": ["不客气亲，有问题随时找我哦。", "不客气亲，祝您购物愉快哦。"],
}
NO_TOOL_ANSWER = "抱歉亲，这个我查不到哦。"

# (share of the rows, subjects of the customer in order, offered tools)
PLANS = [
    # one call
    (6, "stock", "stock price"),
    (5, "stock", "stock"),
    (6, "price", "stock price"),
    (5, "price", "price"),
    (1, "stock thanks", "stock price"),
    (1, "price thanks", "stock price"),
    # one call, then a question that no offered tool answers
    (3, "stock price", "stock"),
    (3, "price stock", "price"),
    (1, "stock service", "stock price"),
    (1, "price service", "stock price"),
    # two calls
    (6, "stock price", "stock price"),
    # no call: only a question that no offered tool answers, or only courtesy
    (2, "price", "stock"),
    (2, "stock", "price"),
    (1, "service", "stock price"),
    (2, "greeting", "stock price"),
    (1, "greeting", "stock"),
    (1, "greeting", "price"),
    (2, "thanks", "stock price"),
    (1, "thanks", "stock"),
    (1, "thanks", "price"),
]


def answer(attributes, key, rng):
    """The answer of the shop about one attribute."""
    phrase, effect = SELLING[key][dict(attributes)[key]]
    return choose(["亲，{0}{1}，{2}哦。", "您好，{0}{1}，{2}。"], rng).format(ASK[key][0], phrase, effect)


def random_turn(attributes, key, rng):
    """A (question, answer) about an attribute or, if key is None, about the clothes to wear with the garment."""
    measure, name, wear_with, _ = GARMENTS[attributes[0][1]]
    if key is None:
        question = choose([f"这{measure}{name}怎么搭配？", "那配什么好看？"], rng)
        color = dict(attributes).get("颜色", "")
        return question, f"亲，{color and color + '的'}{name}配上{wear_with}就很好看哦。"
    if key == "颜色" and rng.random() < 0.4:
        real, wanted = dict(attributes)["颜色"], rng.choice(list(SELLING["颜色"]))
        return f"有{wanted}的吗？", f"有的亲，就是{real}哦。" if wanted == real else f"抱歉亲，只有{real}哦。"
    return rng.choice(ASK[key][1]), answer(attributes, key, rng)


def conversation(attributes, rng):
    """A row of the chat files: a first round with the attributes, then up to three questions about them."""
    opening = choose(["请介绍一下：{}", "帮我看看这款：{}"], rng).format(content_of(attributes))
    turns = [[opening, advertise(attributes, rng)]]
    topics = [key for key, _ in attributes if key in ASK] + [None]
    rng.shuffle(topics)
    for key in topics[: rng.choice([0, 1, 1, 2, 2, 2, 3])]:  # one row in seven has no history
        turns.append(list(random_turn(attributes, key, rng)))
    prompt, response = turns.pop()
    return {"prompt": prompt, "response": response, "history": turns}


def call_tool(subject, kind, color, rng):
    """A call, and the number that it returns."""
    if subject == "price":
        number = rng.randint(30, 499)
    else:
        number = 0 if rng.random() < 1 / 6 else rng.randint(1, 99)
    call = {"role": "tool", "name": TOOLS[subject]["name"], "parameters": {"kind": kind, "color": color}}
    return {**call, "observation": json.dumps({subject: number})}, number


def tool_conversation(subjects, offered, rng):
    """A row of the tool files: a conversation about one garment, with the calls."""
    kind, color = rng.choice(list(GARMENTS)), rng.choice(list(SELLING["颜色"]))
    measure, name = GARMENTS[kind][:2]
    garment = f"{color}的{name}"
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if rng.random() < 1 / 8 else []
    for i, subject in enumerate(subjects):
        named = choose(["它", garment], rng) if i else garment
        messages.append({"role": "user", "content": choose(QUESTIONS[subject], rng).format(named)})
        if subject in offered:
            call, number = call_tool(subject, kind, color, rng)
            messages.append(call)
            answers = ANSWERS["sold out" if number == 0 else subject]
            reply = choose(answers, rng).format(garment=garment, number=number, measure=measure)
        elif subject in ("greeting", "thanks"):
            reply = choose(ANSWERS[subject], rng)
        else:
            reply = NO_TOOL_ANSWER
        messages.append({"role": "assistant", "content": reply})
    return {"tools": [TOOLS[subject] for subject in offered], "conversations": messages}


def facts_of(row):
    """The facts that dev and train rows may not share: calls with their results or, without a call, questions."""
    messages = row["conversations"]
    calls = {json.dumps(message, ensure_ascii=False) for message in messages if message["role"] == "tool"}
    return calls or {message["content"] for message in messages if message["role"] == "user"}


def make_tool_rows(count, rng, known):
    """`count` rows that share no fact with `known`."""
    rows = []
    for _, subjects, offered in rng.choices(PLANS, [share for share, *_ in PLANS], k=count):
        while True:  # with the same plan, so that the shares of the plans hold
            row = tool_conversation(subjects.split(), offered.split(), rng)
            if not facts_of(row) & known:
                break
        rows.append(row)
    return rows


def main():
    args = parse_arguments(__doc__.splitlines()[0])

    # Draw the advertisements first, as generate.py does, so that no conversation has the attributes of one of them.
    rng, seen = random.Random(args.seed), set()
    advertisement_rows(rng, seen)
    write_rows(args.output_dir / "train_chat.json", make_rows(600, conversation, rng, seen))
    write_rows(args.output_dir / "dev_chat.json", make_rows(60, conversation, rng, seen))

    rng = random.Random(args.seed + 1)
    train = make_tool_rows(600, rng, known=set())
    dev = make_tool_rows(60, rng, known=set().union(*map(facts_of, train)))
    write_rows(args.output_dir / "train_tools.json", train)
    write_rows(args.output_dir / "dev_tools.json", dev)


if __name__ == "__main__":
    main()
