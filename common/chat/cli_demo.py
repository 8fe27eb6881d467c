"""Chat in the terminal with a model, or with a model and its trained prefix or adapter.

python common/chat/cli_demo.py --checkpoint FOLDER [--model_name_or_path BASE]
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.chat.chat import chat_parser, count_forgotten, generation_settings, load_chat, stream_chat
from common.errors import UserError, exit_on_user_error
from common.models.products import pack


def main() -> None:
    """Answers questions until stop or the end of input; Ctrl-C ends an answer early."""
    args = chat_parser(__doc__.splitlines()[0]).parse_args()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # other bytes than UTF-8 are refused as a question, and no more
    model, tokenizer, _ = load_chat(args)
    pack(model)
    generation = generation_settings(args.max_new_tokens, args.temperature, args.top_p)
    room = model.config.max_position_embeddings - args.max_new_tokens
    print("输入内容即可对话，clear 清空对话历史，stop 终止程序 (type a question; clear: new conversation, stop: leave)")
    history: list[list[str]] = []
    while True:
        try:
            query = input("\n用户：").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if query == "stop":
            return
        if query == "clear":
            history = []
            print("(cleared)")
        elif query:
            try:
                forgotten = count_forgotten(tokenizer, query, history, args.system_prompt, room)
            except UserError as error:
                print(f"({error})")
                continue
            if forgotten:
                del history[:forgotten]
                print(f"（上下文已满，忘记了最早的 {forgotten} 轮 / oldest rounds forgotten: {forgotten}）")
            answers = stream_chat(model, tokenizer, query, history, args.system_prompt, **generation)
            history.append([query, print_answer(answers)])


def print_answer(answers: Iterator[str]) -> str:
    """Prints the answer as it grows and returns it. If a token changes earlier text, all is printed again."""
    print("\nChatGLM：", end="", flush=True)
    shown = ""
    try:
        for answer in answers:
            print(answer[len(shown) :] if answer.startswith(shown) else f"\n{answer}", end="", flush=True)
            shown = answer
    except KeyboardInterrupt:
        pass
    print()
    return shown


if __name__ == "__main__":
    with exit_on_user_error():
        main()
