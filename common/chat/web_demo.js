// What the page does in the browser itself.

const NAMES = { markdown: "chat.md", row: "chat.jsonl" };

function switchLanguage() {
    const other = document.documentElement.lang === "en" ? "zh-CN" : "en";
    document.cookie = `language=${other}; path=/; max-age=31536000; samesite=lax`;
    location.reload();
}

function toggleSettings() {
    document.querySelector("#settings .toggle-button").click();
}

function download(kind, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/plain" }));
    link.download = NAMES[kind];
    link.click();
    setTimeout(URL.revokeObjectURL, 1000, link.href);
}

document.addEventListener("keydown", event => {
    if (event.key === "Escape") document.querySelector("#stop:not([disabled])")?.click();
});

// Gradio shows a question as Markdown, and would let a visitor edit it with the backslashes before its signs.
document.addEventListener("focusin", ({ target }) => {
    if (!target.matches(".edit-textarea") || target.dataset.plain) return;
    target.dataset.plain = true;
    target.ariaLabel = document.documentElement.lang === "en" ? "Question" : "问题";
    target.value = target.value.replace(/\\([!-/:-@[-`{-~])/g, "$1");
    target.dispatchEvent(new Event("input"));
});
