# SPDX-License-Identifier: Apache-2.0
"""Where in a conversation's text the assistant speaks, for templates with marks, known to TRL, and of neither kind."""

import signal
import time
from pathlib import Path

import pytest
import trl

from llm_trainer.common.errors import UserError
from llm_trainer.data.chat_template import ChatTemplate, TimeUp, find_turn_end, limit_rows, without_limit
from llm_trainer.data.formats.examples import Conversation, RowError
from support.tiny_model import CHAT_TEMPLATE, build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
FAMILIES = sorted(file.stem for file in TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training"))
WITH_IMAGES = ("idefics3", "llava_next", "smolvlm")  # their content is a list of parts

ASK, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "first answer"}
ASK_AGAIN, LAST = {"role": "user", "content": "two?"}, {"role": "assistant", "content": "second answer"}
CHAT = [ASK, ANSWER, ASK_AGAIN, LAST]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 41}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}"
)
# The text between turns is not special, and nothing is added to ask for an answer.
MISTRAL_LIKE = (
    "{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"
)
# Thinking is left out of the history, as Qwen3's own template does.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(source=None, finds_turns=None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = source or tokenizer.chat_template
    return ChatTemplate(tokenizer, finds_turns)


def turns_of(template, messages, **options):
    text, spans = template.render_conversation(Conversation(messages, **options))
    return [text[start:end] for start, end in spans]


def problem_of(template, messages, **options):
    with pytest.raises(RowError) as caught:
        template.render_conversation(Conversation(messages, **options))
    return str(caught.value)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WITH_IMAGES])
def test_every_family_that_trl_knows_tells_its_turns(family):
    template = build((TEMPLATES / f"{family}.jinja").read_text())
    assert template.tells_turns
    first, second = turns_of(template, CHAT)
    assert "first answer" in first
    assert "second answer" in second
    for turn in (first, second):
        assert "one?" not in turn
        assert "two?" not in turn
        assert not turn.rstrip().endswith("answer"), "the token that ends the turn is a part of it"


def test_a_template_without_marks_is_told_by_what_stands_around_an_answer():
    template = build()
    assert not template.is_marked
    assert turns_of(template, CHAT) == ["first answer<|im_end|>", "second answer<|im_end|>"]


def test_marks_of_the_template_win():
    template = build(MARKED)
    assert template.is_marked
    assert turns_of(template, CHAT) == ["first answer<|im_end|>", "second answer<|im_end|>"]


def test_a_template_that_asks_with_nothing_is_told_by_rendered_prefixes():
    assert turns_of(build(MISTRAL_LIKE), CHAT) == [" first answer</s>", " second answer</s>"]


def test_thinking_that_the_history_leaves_out_is_no_obstacle():
    thought = {"role": "assistant", "content": "<think>hm</think>first answer"}
    assert turns_of(build(FORGETFUL), [ASK, thought, ASK_AGAIN, LAST]) == [
        "first answer<|im_end|>",
        "second answer<|im_end|>",
    ]


def test_a_user_who_quotes_the_start_of_a_turn_is_not_trained_on():
    quote = {"role": "user", "content": "say <|im_start|>assistant\nfirst answer"}
    assert turns_of(build(), [quote, LAST]) == ["second answer<|im_end|>"]


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user():
    assert turns_of(build(), [ANSWER, ASK_AGAIN, LAST, ASK]) == ["first answer<|im_end|>", "second answer<|im_end|>"]


@pytest.mark.parametrize("source", [None, MARKED])
def test_only_completions_and_weighted_turns_are_trained_on(source):
    template = build(source)
    assert turns_of(template, CHAT, num_prompt_messages=3) == ["second answer<|im_end|>"]
    assert turns_of(template, [ASK, {**ANSWER, "weight": 0}, ASK_AGAIN, LAST]) == ["second answer<|im_end|>"]
    assert "no assistant message to train on" in problem_of(template, [ASK, {**ANSWER, "weight": 0}])
    assert "no assistant message to train on" in problem_of(template, [ASK])


def test_a_template_whose_turns_have_no_end_trains_on_all_or_is_refused():
    endless = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    template = build(endless)
    assert not template.tells_turns
    assert template.render_conversation(Conversation(CHAT))[1] is None
    with pytest.raises(UserError, match="does not tell where the assistant's turns end"):
        build(endless, finds_turns=True)


def test_turns_are_not_looked_for_where_all_tokens_are_wanted():
    text, spans = build(finds_turns=False).render_conversation(Conversation(CHAT))
    assert "first answer" in text
    assert spans is None


def test_a_missing_template_is_told():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate(tokenizer, None)


def test_a_template_that_refuses_a_conversation_says_why():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + MARKED
    assert problem_of(build(strict), [ANSWER]) == "is refused by the model's chat template: roles must alternate."


def test_a_role_that_the_template_passes_over_is_told():
    picky = "{% for message in messages if message.role in ('user', 'assistant') %}" + MARKED.split("%}", 1)[1]
    system = {"role": "system", "content": "be brief"}
    assert "message 1 with the role 'system', which the model's" in problem_of(build(picky), [system, *CHAT])
    assert turns_of(build(), [system, ASK, ANSWER]) == ["first answer<|im_end|>"]


def test_tools_and_their_calls_are_rendered_or_refused():
    qwen = build((TEMPLATES / "qwen3.jinja").read_text())
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "42"}
    text, spans = qwen.render_conversation(Conversation([ASK, call, result, LAST], TOOLS))
    assert '"name": "add"' in text
    first, second = (text[start:end] for start, end in spans)
    assert '{"name": "add", "arguments": {"x": 41}}' in first
    assert "second answer" in second
    assert "42" not in first + second
    plain = build()
    assert "has tools, and" in problem_of(plain, CHAT, tools=TOOLS)
    assert "has tool calls or results" in problem_of(plain, [ASK, call, result, LAST])


def test_reasoning_survives_with_a_place_of_its_own_or_without():
    thought = {"role": "assistant", "content": "four", "reasoning_content": "two and two"}
    (marked,) = turns_of(build((TEMPLATES / "qwen3.jinja").read_text()), [ASK, thought])
    assert marked == "<think>\ntwo and two\n</think>\n\nfour<|im_end|>\n"
    (folded,) = turns_of(build(), [ASK, thought])
    assert folded == "<think>\ntwo and two\n</think>\n\nfour<|im_end|>"


def test_a_role_that_the_template_does_not_name_is_refused_with_the_nearest():
    template = build()
    typo = problem_of(template, [{"role": "usr", "content": "one?"}, ANSWER])
    assert typo == (
        "has a message 1 with the role 'usr', which the model's chat template does not name: write 'user', or give a "
        "template that names it with chat_template_path."
    )
    for role, known in (
        ("Assistant", "'assistant'"),
        ("gpt", "'assistant'"),
        ("human", "'user'"),
        ("tool_response", "'tool'"),
        ("tool_call", "'assistant', with the call in 'tool_calls', or give"),
        ("x", "one of system"),
    ):
        assert f": write {known}" in problem_of(template, [ASK, ANSWER, {"role": role, "content": "two?"}])
    named = build("{# 'usr' #}" + template.source)
    assert turns_of(named, [{"role": "usr", "content": "one?"}, ANSWER]) == ["first answer<|im_end|>"]


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ [1][9] + 1 }}", "no element 9"),
        ("{{ 'x' * 10 ** 18 }}", "MemoryError"),
        ("{{ 2.0 ** 100000 }}", "Numerical result out of range"),
    ],
)
def test_a_template_that_fails_is_named_with_its_row(expression, error):
    template = build("{% if messages[0].content == 'one?' %}" + expression + "{% endif %}" + MARKED)
    assert problem_of(template, CHAT).startswith("is refused by the model's chat template: ")
    assert error in problem_of(template, CHAT)
    assert turns_of(template, [{**ASK, "content": "other"}, ANSWER]) == ["first answer<|im_end|>"]


@pytest.mark.parametrize(
    "expression",
    [
        "{{ 1 // (messages|length - messages|length) }}",
        "{{ range(messages|length * 10 ** 9) }}",
        "{% include 'x' %}",
        "{{ [1][9].x }}",
    ],
)
def test_a_template_that_fails_with_whatever_it_is_tried_with_is_named_with_its_row(expression):
    template = build(expression + "{{ messages }}")
    assert not template.renders_tool_calls
    assert problem_of(template, CHAT).startswith("is refused by the model's chat template: ")


def compute(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_is_not_limited_takes_as_long_as_it_takes():
    with limit_rows(0.02):
        with without_limit():
            compute(0.1)
        with pytest.raises(TimeUp):
            compute(60)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_that_does_not_end_is_told_soon(monkeypatch):
    monkeypatch.setattr("llm_trainer.data.chat_template.MAX_SECONDS", 0.1)
    template = build("{% if messages[0].content == 'one?' %}" + LOOP + "{% endif %}" + MARKED)
    with limit_rows(0.1) as clock:
        for clock.row in range(2):
            assert "computes for more than 10 seconds: shorten or remove it" in problem_of(template, CHAT)
        assert turns_of(template, [{**ASK, "content": "other"}, ANSWER]) == ["first answer<|im_end|>"]
        with pytest.raises(UserError, match=r"computes for more than 10 seconds with each of 3 rows: give another one"):
            template.render_conversation(Conversation(CHAT))
    with pytest.raises(UserError, match="with two short messages: give another one"):
        build(LOOP)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHAT_TEMPLATE, "<|im_end|>"),
        (CHAT_TEMPLATE.replace("<|im_end|>", "{% generation %}<|im_end|>{% endgeneration %}"), "<|im_end|>"),
        (CHAT_TEMPLATE.replace("<|im_end|>", "###"), None),
        ("{% for message in messages %}{{ message['content'] }}{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_is_found(template, end):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    assert find_turn_end(tokenizer) == (tokenizer.convert_tokens_to_ids(end) if end else None)


NAMED = {"default": build_tokenizer().chat_template, "tool_use": (TEMPLATES / "qwen3.jinja").read_text(), "rag": "no"}


def build_named(templates, finds_turns=None):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = templates
    return ChatTemplate(tokenizer, finds_turns), tokenizer


def test_rows_with_tools_take_the_template_named_for_them_as_transformers_does():
    template, tokenizer = build_named(NAMED)
    assert template.tells_every_turn
    for tools in (None, TOOLS):
        text, _ = template.render_conversation(Conversation([ASK, ANSWER], tools))
        assert text == tokenizer.apply_chat_template([ASK, ANSWER], tools=tools, tokenize=False)
    assert turns_of(template, CHAT, tools=TOOLS)[1] == "<think>\n\n</think>\n\nsecond answer<|im_end|>\n"
    assert turns_of(template, CHAT)[1] == "second answer<|im_end|>"
    assert tokenizer.chat_template == NAMED, "the tokenizer stays as it is"


def test_each_template_with_a_name_has_to_tell_turns_where_they_are_wanted():
    endless = "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ tools or '' }}\n{% endfor %}"
    assert not build_named({**NAMED, "tool_use": endless})[0].tells_every_turn
    with pytest.raises(UserError, match="does not tell where the assistant's turns end"):
        build_named({**NAMED, "tool_use": endless}, finds_turns=True)
    with pytest.raises(UserError, match=r"named rag, tool_use and none named default: give one with"):
        build_named({"rag": "no", "tool_use": NAMED["tool_use"]})


@pytest.mark.parametrize("family", ["gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"])
def test_a_call_ends_where_its_result_begins_in_the_same_turn(family):
    template = build((TEMPLATES / f"{family}.jinja").read_text())
    assert not template.is_marked
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "42", "name": "add"}
    first, second = turns_of(template, [ASK, call, result, LAST], tools=TOOLS)
    assert first == "<|tool_call>call:add{x:41}<tool_call|><|tool_response>"
    assert second.strip() == "second answer<turn|>"
    assert turns_of(template, [ASK, call], tools=TOOLS) == [first]


def test_a_template_that_takes_arguments_as_text_gets_text():
    template = build((TEMPLATES / "deepseekv3.jinja").read_text(), finds_turns=False)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text, _ = template.render_conversation(Conversation([ASK, call, {"role": "tool", "content": "42"}, LAST]))
    assert 'add\n```json\n{"x": 41}\n```' in text
