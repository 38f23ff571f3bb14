# SPDX-License-Identifier: Apache-2.0
"""All that a row says is in its text, for every template that TRL pins and every kind of row, or the row is refused.

The right text comes from the consumer: what stands before the last answer is the prompt that vLLM would send.
"""

import re
from functools import cache
from pathlib import Path

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from llm_trainer.config.schema import Settings
from llm_trainer.data.chat_template import ChatTemplate
from llm_trainer.data.formats.detection import parse_example
from llm_trainer.data.formats.examples import Conversation, RowError
from llm_trainer.data.messages import (
    HIDDEN_END,
    THOUGHTS_END,
    complete_ids,
    fold_thoughts,
    hide_thoughts_end,
    split_thoughts,
    unfold_thoughts,
    write_arguments,
)
from support.tiny_model import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
WITH_IMAGES = ("idefics3", "llava_next", "smolvlm")  # their content is a list of parts
NAMES = {file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training")}
FAMILIES = sorted(NAMES - set(WITH_IMAGES))

ASK, ASK_AGAIN = {"role": "user", "content": "question one"}, {"role": "user", "content": "question two"}
FIRST, LAST = {"role": "assistant", "content": "first answer"}, {"role": "assistant", "content": "last answer"}
HARD = 'na\u00efve <b> "quoted" it\'s\nnew & \\n'
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": {"type": "object"}}}
    for name in ("add", "look_up")
]


def call(name, arguments):
    return {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": arguments}}


def say(content="", **fields):
    return {"role": "assistant", "content": content, **fields}


def result(name, content):
    return {"role": "tool", "tool_call_id": f"call_{name}", "name": name, "content": content}


ADD, LOOK_UP = call("add", {"x": 41, "y": [2.5, True], "note": {"deep": "leaf"}}), call("look_up", {"city": "Bern"})
ADDED, FOUND = result("add", "result one"), result("look_up", "result two")
CALL_TEXTS = {"ADD": ("add", "x", "41", "y", "2.5", "note", "deep", "leaf"), "LOOK_UP": ("look_up", "city", "Bern")}
THOUGHTS, EARLY = "deep thought", "early thought"

# kind -> messages, and what has to be trained on in this order
KINDS = {
    "plain": ([ASK, FIRST], ["first answer"]),
    "system": ([{"role": "system", "content": "be kind"}, ASK, FIRST], ["first answer"]),
    "turns": ([ASK, FIRST, ASK_AGAIN, LAST], ["first answer", "last answer"]),
    "call": ([ASK, say(tool_calls=[ADD]), ADDED, LAST], [*CALL_TEXTS["ADD"], "last answer"]),
    "call_last": ([ASK, say(tool_calls=[LOOK_UP])], [*CALL_TEXTS["LOOK_UP"]]),
    "hard_call": ([ASK, say(tool_calls=[call("add", {"x": HARD})]), ADDED, LAST], ["add", "x", "last answer"]),
    "two_calls": (
        [ASK, say(tool_calls=[ADD, LOOK_UP]), ADDED, FOUND, LAST],
        [*CALL_TEXTS["ADD"], *CALL_TEXTS["LOOK_UP"], "last answer"],
    ),
    "same_calls": (
        [ASK, say(tool_calls=[LOOK_UP, LOOK_UP]), FOUND, FOUND, LAST],
        ["look_up", "look_up", "last answer"],
    ),
    "words": (
        [ASK, say("words beside", tool_calls=[LOOK_UP]), FOUND, LAST],
        ["words beside", "look_up", "Bern", "last answer"],
    ),
    "no_arguments": ([ASK, say(tool_calls=[call("add", "")]), ADDED, LAST], ["add", "last answer"]),
    "no_calls": ([ASK, say("last answer", tool_calls=[])], ["last answer"]),
    "thoughts": (
        [ASK, FIRST, ASK_AGAIN, say("last answer", reasoning_content=THOUGHTS)],
        ["first answer", THOUGHTS, "last answer"],
    ),
    "early_thoughts": (
        [ASK, say("first answer", reasoning_content=EARLY), ASK_AGAIN, LAST],
        ["first answer", "last answer"],
    ),
    "inline": (
        [ASK, FIRST, ASK_AGAIN, say(f"<think>\n{THOUGHTS}\n</think>\n\nlast answer")],
        ["first answer", THOUGHTS, "last answer"],
    ),
    "early_inline": (
        [ASK, say(f"<think>\n{EARLY}\n</think>\n\nfirst answer"), ASK_AGAIN, LAST],
        ["first answer", "last answer"],
    ),
    "call_thoughts": (
        [ASK, say(tool_calls=[LOOK_UP], reasoning_content="call thought"), FOUND, LAST],
        ["call thought", "look_up", "Bern", "last answer"],
    ),
}
WITH_CALLS = {"call", "call_last", "hard_call", "two_calls", "same_calls", "words", "no_arguments", "call_thoughts"}

# What a family cannot say, as the row is told.
ONE_CALL = "only supports single tool-calls at once"
REFUSED = {
    ("gemma", "system"): "System role not supported",
    **{(f"llama3_{n}", kind): ONE_CALL for n in (1, 2) for kind in ("two_calls", "same_calls")},
    **{(f"llama3_{n}", "words"): "words beside its call the model's chat template leaves out" for n in (1, 2)},
    **{(f"llama3_{n}", "call_thoughts"): "thoughts the model's chat template leaves out" for n in (1, 2)},
    ("gptoss", "two_calls"): "second call 'look_up' the model's chat template leaves out: give each call a message of",
    ("gptoss", "same_calls"): "second call 'look_up' the model's chat template leaves out",
    ("gptoss", "words"): "words beside its call the model's chat template leaves out",
    ("gptoss", "call_thoughts"): "thoughts the model's chat template leaves out",
    ("muse_glimmer", "words"): "words beside its call the model's chat template leaves out",
    **{(f"gemma4{v}", "words"): "words beside its call the model's" for v in ("", "_v3", "_v4")},
    ("gemma4_v5", "words"): "writes otherwise where more follows",
}
NO_TOOLS = {"cohere", "cohere2", "gemma", "gemma3", "llama3", "phi3", "phi3_5", "qwen2_5_vl"}
NO_TOOLS |= {"deepseek_r1_distill", "lfm2"}


def build(source, finds_turns=None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, finds_turns)


@cache
def build_family(family):
    return build((TEMPLATES / f"{family}.jinja").read_text())


def parse(messages, tools=None):
    return parse_example({"messages": messages, "tools": tools}, "messages", Settings().data, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_the_assistant_says_is_trained_on_or_the_row_is_refused(family, kind):
    messages, wanted = KINDS[kind]
    template = build_family(family)
    conversation = parse(messages, TOOLS if kind in WITH_CALLS and template.renders_tools else None)
    if kind in WITH_CALLS and family in NO_TOOLS:
        with pytest.raises(RowError, match="does not render them"):
            template.render_conversation(conversation)
        return
    if refusal := REFUSED.get((family, kind)):
        with pytest.raises(RowError) as caught:
            template.render_conversation(conversation)
        assert refusal in str(caught.value)
        return
    text, spans = template.render_conversation(conversation)
    spoken = "\0".join(text[start:end] for start, end in spans)
    for part in wanted:
        assert spoken.count(part) >= wanted.count(part), part
    assert not any(part in spoken for part in ("question", "result", "be kind"))
    assert kind != "hard_call" or ("na\u00efve" in spoken and "quoted" in spoken)
    if not (family == "diffusion_gemma" and kind in WITH_CALLS - {"call_last"}):  # it asks otherwise after results
        check_prompt(family, text, spans, serve(family, template, conversation))


def serve(family, template, conversation):
    """Return the prompts for the last answer, by the model's own template, as clients let it think or not."""
    history = template.shape_messages(conversation.messages[: conversation.assistant_turns[-1]])
    if family == "deepseekv3":  # TRL's version takes objects, the model's own does not
        history = [write_arguments(message) if message.get("tool_calls") else message for message in history]
    options = ({}, {"enable_thinking": True}, {"enable_thinking": False})
    return [render(family, template, history, conversation.tools, **chosen) for chosen in options]


def render(family, template, messages, tools, **options):
    [text], _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=(TEMPLATES / f"{family}.jinja").read_text(),
        add_generation_prompt=True,
        **options,
        **template.special_tokens,
    )
    return text.replace(HIDDEN_END, "</think>")


def check_prompt(family, text, spans, prompts):
    start = spans[-1][0]
    if family.startswith("deepseek"):  # it asks for thoughts, and the row's answer may have none
        prompts += [prompt.removesuffix("<think>\n") for prompt in prompts]
    if family in (
        "deepseek_r1_distill",
        "qwen3",
        "qwen3_5_nothink",
        "qwen3_5_think",
        "qwen3_6",
    ):  # TRL's version keeps thoughts of the history
        head = drop_thoughts(text[:start])
        text, start = head + text[start:], len(head)
        prompts = [drop_thoughts(prompt) for prompt in prompts]
    assert any(text.startswith(prompt) and start <= len(prompt) for prompt in prompts), (prompts, text)


def drop_thoughts(text):
    return "".join(re.sub(r"<think>[^<]*</think>", "", text).split())


TURNS = (
    "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.role == 'assistant' %%}%s"
    "{%% for c in m.tool_calls or [] %%}%s{%% endfor %%}{%% else %%}{{ m.content }}"
    "{%% endif %%}<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
CODER = (  # as Qwen3-Coder's template, which trims, and writes the values of Python
    "<tool_call>\n<function={{ c.function.name }}>{% for k, v in c.function.arguments|items %}<parameter={{ k }}>\n"
    "{{ v|tojson|safe if v is mapping else v|string|trim }}\n</parameter>{% endfor %}</function></tool_call>"
)
WRITERS = {
    "ascii": "{{ c.function.name }}{{ c.function.arguments|tojson(ensure_ascii=True) }}",
    "html": "{{ c.function.name }}{{ c.function.arguments|tojson|forceescape }}",
    "python": "{{ c.function.name }}{{ c.function.arguments|string }}",
    "coder": CODER,
    "sorted": "{{ c.function.name }}{% for k, v in c.function.arguments|dictsort %}{{ k }}={{ v }}{% endfor %}",
    "upper": "{{ c.function.name|upper }}{{ c.function.arguments|tojson|replace('quoted', 'cited') }}",
}
ODD = {
    "z": HARD,
    "a": "  spaced  ",
    "n": [0, -1.0, 1e20, True, False, None, 10**20],
    "\u6771": {"k\u00e9y": "\u4eac \U0001f600", "empty": {}, "none": []},
}


def problem_of(template, messages, tools=None):
    with pytest.raises(RowError) as caught:
        template.render_conversation(parse(messages, tools))
    return str(caught.value)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_way_of_writing_a_value_is_taken_for_its_loss(writer):
    template = build(TURNS % ("{{ m.content|trim }}", WRITERS[writer]))
    says_both = say('  both say "it\'s" & more  ', tool_calls=[call("add", ODD), call("add", ODD)])
    odd_result = result("add", HARD)
    text, spans = template.render_conversation(parse([ASK, says_both, odd_result, odd_result, LAST]))
    assert len(spans) == 2
    assert "it's" in text


@pytest.mark.parametrize(
    ("content", "call_text", "lost"),
    [
        ("{{ m.content }}", "{{ c.function.name }}{}", "arguments of its first call 'look_up'"),
        (
            "{{ m.content }}",
            "{{ c.function.name }}{{ c.function.arguments.values()|list }}",
            "argument 'city' of its f",
        ),
        (
            "{{ m.content }}",
            "{% if loop.first %}{{ c.function.name }}{{ c.function.arguments }}{% endif %}",
            "second c",
        ),
        ("{{ '' if m.tool_calls else m.content }}", "{{ c.function.name }}{{ c.function.arguments }}", "words beside"),
        ("{{ m.content.split('.')[0] }}", "{{ c.function.name }}{{ c.function.arguments }}", "words beside its call"),
    ],
)
def test_what_is_lost_is_named(content, call_text, lost):
    template = build(TURNS % (content, call_text), finds_turns=False)
    template.renders_tool_calls = True  # what a template leaves out at all is told of by another sentence
    talk = say("Let me look. Twice.", tool_calls=[LOOK_UP, call("look_up", {"city": "Bern"})])
    problem = problem_of(template, [ASK, talk, FOUND, FOUND, LAST])
    assert problem.startswith(f"has a message 2 whose {lost}")
    assert problem.endswith("or give a template that writes it with chat_template_path.")


def test_a_part_of_an_answer_may_not_be_cut():
    template = build(TURNS % ("{{ m.content.split('</think>')[-1] }}", ""))
    quote = say("End thoughts with the tag </think> and go on.")
    assert "has a message 2 whose answer the model's chat template leaves out" in problem_of(template, [ASK, quote])


def test_a_changed_word_is_no_loss():
    system = {"role": "system", "content": "Be kind.\nReasoning effort: high"}
    text, _ = build_family("muse_glimmer").render_conversation(parse([system, ASK, FIRST]))
    assert "Reasoning strength: high" in text


def test_a_template_that_cuts_thoughts_off_keeps_those_of_the_last_turn():
    thinking = say("four", reasoning_content="two and two")
    text, spans = build_family("deepseekv3").render_conversation(parse([ASK, thinking, ASK_AGAIN, thinking]))
    asked = "<\uff5cUser\uff5c>question two<\uff5cAssistant\uff5c>"
    assert text.endswith(f"{asked}<think>\ntwo and two\n</think>\n\nfour<\uff5cend\u2581of\u2581sentence\uff5c>")
    assert text.count("two and two") == 1
    assert text[slice(*spans[-1])] == text[spans[-1][0] :]


# As Mistral's template: it asks for ids of nine letters and digits, and writes them.
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id|length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.content }} {{ m.tool_call_id }}[/TOOL_RESULTS]{% else %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% if c.id|length != 9 %}{{ raise_exception('9 characters') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }} {{ c.id }}{{ c.function.arguments|tojson }}{% endfor %}</s>{% endif %}"
    "{% endfor %}"
)


def make_call(name, **fields):
    return {"type": "function", "function": {"name": name, "arguments": {"x": name}}, **fields}


def make_result(content, **fields):
    return {"role": "tool", "content": content, **fields}


@pytest.mark.parametrize(
    ("content", "thoughts", "answer"),
    [
        ("<think>\na\nb\n</think>\n\nc", "a\nb", "c"),
        (" <think>a</think>c </think> d", "a", "c </think> d"),
        ("<think></think>c", "", "c"),
        ("c <think>a</think>", "", "c <think>a</think>"),
        ("plain", "", "plain"),
    ],
)
def test_only_thoughts_that_begin_an_answer_are_split_off(content, thoughts, answer):
    assert split_thoughts(content) == (thoughts, answer)


def test_thoughts_move_into_the_content_and_out_of_it():
    folded = fold_thoughts(say("c", thinking="a"))
    assert folded == say("<think>\na\n</think>\n\nc")
    assert unfold_thoughts(folded) == say("c", reasoning_content="a")
    assert unfold_thoughts(say("c")) == fold_thoughts(say("c")) == say("c")
    hidden = hide_thoughts_end(folded)["content"]
    assert THOUGHTS_END not in hidden
    assert hidden.replace(HIDDEN_END, THOUGHTS_END) == folded["content"]
    assert len(hidden) == len(folded["content"]), "spans stay true"


def test_arguments_are_written_as_json():
    [written] = write_arguments(say(tool_calls=[make_call("\u00e9")]))["tool_calls"]
    assert written["function"] == {"name": "\u00e9", "arguments": '{"x": "\u00e9"}'}


def test_results_take_the_id_of_the_call_that_they_answer():
    first = say(tool_calls=[make_call("f"), make_call("g", id="given")])
    again = say(tool_calls=[make_call("f")])
    messages = [ASK, first, make_result("2", name="g"), make_result("1"), again, make_result("3"), LAST]
    done = complete_ids(messages)
    assert [each["id"] for each in done[1]["tool_calls"] + done[4]["tool_calls"]] == ["call00000", "given", "call00002"]
    assert [each.get("tool_call_id") for each in done] == [None, None, "given", "call00000", None, "call00002", None]
    assert "id" not in messages[1]["tool_calls"][0], "the row itself stays as it is"


def test_a_template_that_asks_for_ids_gets_them():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MISTRAL
    template = ChatTemplate(tokenizer, None)
    conversation = Conversation([ASK, say(tool_calls=[make_call("f")]), make_result("1"), LAST])
    text, spans = template.render_conversation(conversation)
    assert [text[start:end] for start, end in spans] == ['[TOOL_CALLS]f call00000{"x": "f"}</s>', "last answer</s>"]
    assert "[TOOL_RESULTS]1 call00000[/TOOL_RESULTS]" in text
    with pytest.raises(RowError, match="9 characters"):
        template.render_conversation(Conversation([ASK, say(tool_calls=[make_call("f", id="short")]), LAST]))
