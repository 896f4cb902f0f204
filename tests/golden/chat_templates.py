"""Writes the digests of chat templates rendered as transformers renders them.

Usage: chat_templates.py TEMPLATE_FOLDER OUTPUT_FILE   (TEMPLATE_FOLDER: chat_templates of the trl wheel)

For each template and conversation: SHA-256 of the text, the byte spans that {% generation %} marks, or "raises".
"""

import datetime
import hashlib
import json
import pathlib
import sys

from transformers.utils.chat_template_utils import render_jinja_template

DATE = "2026-01-02T03:04:05"
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells the weather <now> & \"later\".",
          "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where, e.g. Zürich"}}, "required": ["city"]}}}]
CONVERSATIONS = [
    {"name": "system and two turns", "messages": [
        {"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "1 < 2 & 3 > 2?"}, {"role": "assistant", "content": "Yes — 'both'."}]},
    {"name": "plain", "messages": [{"role": "user", "content": "Été?"}, {"role": "assistant", "content": "Summer 🌞"}]},
    {"name": "tools", "tools": TOOLS, "messages": [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]},
        {"role": "tool", "name": "weather", "content": "{\"sky\": \"clear\"}"}, {"role": "assistant", "content": "Clear."}]},
    {"name": "reasoning", "messages": [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "reasoning_content": "Two and two.", "content": "4"}]},
    {"name": "generation prompt", "generationPrompt": True, "messages": [{"role": "user", "content": "Go on"}]},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


class FixedDate(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def render(source, conversation):
    texts, _ = render_jinja_template(
        conversations=[conversation["messages"]], tools=conversation.get("tools"), chat_template=source,
        add_generation_prompt=conversation.get("generationPrompt", False), **SPECIAL)
    return texts[0]


def main():
    import transformers.utils.chat_template_utils as utils

    utils.datetime = FixedDate
    results = {}
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
        results[path.name] = []
        for conversation in CONVERSATIONS:
            try:
                digest = hashlib.sha256(render(path.read_text(), conversation).encode()).hexdigest()
            except Exception as error:
                digest = "raises"
            results[path.name].append(digest)
    pathlib.Path(sys.argv[2]).write_text(
        json.dumps({"date": DATE, "special": SPECIAL, "conversations": CONVERSATIONS, "templates": results}, indent=1) + "\n")
    flat = [digest for digests in results.values() for digest in digests]
    print(f"{len(flat)} renderings, {flat.count('raises')} raise")


if __name__ == "__main__":
    main()
