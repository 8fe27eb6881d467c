"""The words of the page in Chinese and English, and which of the two a visitor reads."""

import re
from collections.abc import Mapping
from typing import Any

LANGUAGES = ("zh-CN", "en")
COOKIE = "language"  # the language that a visitor has chosen by the switch
LABELS = {  # {key: (Chinese, English)}; a key with a dot: a label of Gradio itself, which has the English one only
    "login": ("用户名是 {user}", "The user name is {user}"),
    "switch": ("English", "中文"),
    "picker": ("模型", "Model"),
    "tuned": ("微调后", "tuned"),
    "base": ("基座", "base"),
    "shown": ("显示", "Show"),
    "welcome": ("输入问题，开始对话", "Ask a question"),
    "question": ("问题（回车发送，Shift+回车换行）", "Question (Enter sends, Shift+Enter: new line)"),
    "send": ("发送", "Send"),
    "stop": ("停止 (Esc)", "Stop (Esc)"),
    "retry": ("重新回答", "Retry"),
    "undo": ("撤回", "Undo"),
    "clear": ("新对话", "New chat"),
    "markdown": ("导出 Markdown", "Export Markdown"),
    "row": ("导出训练数据", "Export training row"),
    "settings": ("设置", "Settings"),
    "system": ("系统提示", "System prompt"),
    "no_system": ("此模型没有系统提示", "This model has no system prompt"),
    "length": ("回答最长多少 token", "Longest answer, tokens"),
    "temperature": ("温度（0：总取最可能的 token）", "Temperature (0: always the likeliest token)"),
    "top_p": ("top_p：只从概率最高的这一部分里取", "top_p: share of probability to sample from"),
    "step": ("第 {step} 步", "step {step}"),
    "all_weights": ("全参数训练", "all weights"),
    "untuned": ("未微调", "not tuned"),
    "speed": ("{speed:.1f} token/秒", "{speed:.1f} tokens/s"),
    "forgotten": (
        "上下文已满，忘记了最早的 {rounds} 轮",
        "The context is full: the oldest {rounds} rounds are forgotten",
    ),
    "empty": ("空回答", "Empty answer"),
    "too_long": (
        "问题太长：有 {length:,} {unit}，只放得下 {room:,} 个 token。请缩短问题，或在设置里减小回答的长度。",
        "The question is too long: {length:,} {unit}, and there is room for {room:,} tokens. Shorten it, or lower the "
        "length of an answer in the settings.",
    ),
    "tokens": ("个 token", "tokens"),
    "characters": ("个字符", "characters"),
    "no_text": ("问题里有无法识别的字符。", "The question holds characters that are no text."),
    "unusable": ("现在不能用这个模型或这些设置回答。", "This model or these settings can't be used now."),
    "chatbot.copy_message": ("复制", "Copy message"),
    "chatbot.copied_message": ("已复制", "Copied message"),
}


def said(key: str, language: str, **values: float | str) -> str:
    """A label in a language, with its values filled in."""
    return LABELS[key][LANGUAGES.index(language)].format(**values)


def in_html(key: str, **values: float | str) -> str:
    """A label in all languages, of which a page in one of them shows its own."""
    spans = [f"<span lang={language}>{said(key, language, **values)}</span>" for language in LANGUAGES]
    hidden = [f"html[lang={language}] span:not(:lang({language}))" for language in LANGUAGES]
    return f"<style>{', '.join(hidden)} {{ display: none }}</style>{''.join(spans)}"


def translations() -> dict[str, dict[str, Any]]:
    """{language: {key: label}}, as ``gr.I18n`` takes them; labels of Gradio's own stand in groups."""
    found: dict[str, dict[str, Any]] = {language: {} for language in LANGUAGES}
    for key, labels in LABELS.items():
        group, _, name = key.rpartition(".")
        for language, label in zip(LANGUAGES, labels, strict=True):
            (found[language].setdefault(group, {}) if group else found[language])[name] = label
    return found


def language_of(headers: Mapping[str, str]) -> str:
    """The language of a request: the chosen one, or else Chinese for a browser that prefers Chinese."""
    chosen = re.search(rf"(?:^|;\s*){COOKIE}=({'|'.join(LANGUAGES)})(?:;|$)", headers.get("cookie", ""))
    if chosen:
        return chosen[1]
    return "zh-CN" if headers.get("accept-language", "").lower().startswith("zh") else "en"
