"""Writes what chat templates render and which bytes of it are trained, as transformers renders and marks it.

Usage: chat_templates.py TEMPLATE_FOLDER OUTPUT_FILE   (TEMPLATE_FOLDER: chat_templates of the trl wheel)

"templates": for each template and conversation the SHA-256 of the text, or "raises".
"masks": for each template and each conversation with an answer the trained byte spans "start-end,start-end", or "raises", or
"refused" where the template contradicts itself or loses the answer. A span is what {% generation %} marks
(return_assistant_tokens_mask), else what rendering one more message adds; up to and including the end-of-turn token.
"stops": the end-of-turn tokens of each template's models.
"""

import datetime
import hashlib
import json
import pathlib
import re
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


# Beginning of the template's name: eos_token_id of generation_config.json of the family's models, as text.
STOPS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<｜end▁of▁sentence｜>"], "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma4": ["<turn|>", "<|tool_response>"], "gemma": ["<end_of_turn>"], "glm4": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"], "idefics": ["<end_of_utterance>"], "lfm2": ["<|im_end|>"], "llama3": ["<|eot_id|>"],
    "llava": ["<|im_end|>"], "muse": ["<|eot|>"], "nemotron": ["<|im_end|>"], "phi3": ["<|end|>", "</s>"], "qwen": ["<|im_end|>"],
    "smolvlm": ["<end_of_utterance>"],
}
TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Refused(Exception):
    pass


def stops_of(name):
    return next(stops for family, stops in STOPS.items() if name.startswith(family))


def text_of(source, messages, tools, prompt):
    return render_jinja_template(
        conversations=[messages], tools=tools, chat_template=source, add_generation_prompt=prompt, **SPECIAL)[0][0]


def up_to_stop(text, span, stops):
    start, end = span
    inside = [at + len(stop) for stop in stops if (at := text.rfind(stop, start, end)) >= 0]
    blank = len(text[end:]) - len(text[end:].lstrip())
    behind = [end + blank + len(stop) for stop in stops if text.startswith(stop, end + blank)]
    if not inside and not behind:
        raise Refused("no stop token")
    return start, max(inside or behind)


def strip(text, span):
    inside = text[slice(*span)]
    start = span[0] + len(inside) - len(inside.lstrip())
    return start, start + len(inside.strip())


def incremental(source, messages, tools, index, whole):
    before = text_of(source, messages[:index], tools, True)
    after = text_of(source, messages[:index + 1], tools, False)
    if not after.startswith(before) or not whole.startswith(after):
        raise Refused("rendered differently in parts")
    return len(before), len(after)


def check_tag(source, messages, tools, index, whole, tag, stops):
    try:
        added = incremental(source, messages, tools, index, whole)
    except Exception:
        return
    try:
        added = up_to_stop(whole, added, stops)
    except Refused:
        pass
    tag, added = strip(whole, tag), strip(whole, added)
    if tag[0] < added[0]:
        turn = text_of(source, messages[:index], tools, False)
        early = whole.startswith(turn) and len(turn) <= tag[0]
    else:
        early = False
    if tag[1] != added[1] or not (tag[0] == added[0] or early):
        raise Refused("the tag is not the answer")


def trained_spans(source, conversation, stops):
    messages, tools = conversation["messages"], conversation.get("tools")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    tags = None
    if TAG.search(source):
        texts, spans = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=source, return_assistant_tokens_mask=True, **SPECIAL)
        whole, tags = texts[0], []
        for start, end in spans[0]:
            if tags and tags[-1][1] == start:
                tags[-1] = (tags[-1][0], end)
            else:
                tags.append((start, end))
        if len(tags) != len(answers):
            raise Refused("tags and answers differ in number")
    else:
        whole = text_of(source, messages, tools, False)
    trained = []
    for order, index in enumerate(answers):
        if tags is None:
            span = up_to_stop(whole, incremental(source, messages, tools, index, whole), stops)
        else:
            span = up_to_stop(whole, tags[order], stops)
            check_tag(source, messages, tools, index, whole, span, stops)
        message = messages[index]
        needed = message["content"].splitlines()[-1:] + [call["function"]["name"] for call in message.get("tool_calls", [])]
        if any(part not in whole[slice(*span)] for part in needed):
            raise Refused("the answer is lost")
        trained.append([len(whole[:edge].encode()) for edge in span])
    return ",".join(f"{start}-{end}" for start, end in trained)


def mask(name, source, conversation):
    try:
        return trained_spans(source, conversation, stops_of(name))
    except Refused:
        return "refused"
    except Exception:
        return "raises"


def main():
    import transformers.utils.chat_template_utils as utils

    utils.datetime = FixedDate
    results, masks, stops = {}, {}, {}
    answered = [conversation for conversation in CONVERSATIONS if not conversation.get("generationPrompt")]
    for path in sorted(pathlib.Path(sys.argv[1]).glob("*.jinja")):
        results[path.name] = []
        masks[path.name] = [mask(path.name, path.read_text(), conversation) for conversation in answered]
        stops[path.name] = stops_of(path.name)
        for conversation in CONVERSATIONS:
            try:
                digest = hashlib.sha256(render(path.read_text(), conversation).encode()).hexdigest()
            except Exception:
                digest = "raises"
            results[path.name].append(digest)
    pathlib.Path(sys.argv[2]).write_text(
        json.dumps({"date": DATE, "special": SPECIAL, "conversations": CONVERSATIONS, "templates": results, "stops": stops,
                    "masks": masks}, indent=1) + "\n")
    flat = [digest for digests in results.values() for digest in digests]
    print(f"{len(flat)} renderings, {flat.count('raises')} raise")
    flat = [spans for of_template in masks.values() for spans in of_template]
    print(f"{len(flat)} masks, {flat.count('raises')} raise, {flat.count('refused')} are refused")


if __name__ == "__main__":
    main()
