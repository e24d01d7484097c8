"""How prompts are rendered and answers read, by what a chat template teaches."""

from __future__ import annotations

from typing import Any

import pytest

from dllama_mpi.cli.serve import TOOL_PARSERS
from dllama_mpi.engine.request import SamplingParams
from dllama_mpi.server.grammar import Grammars
from dllama_mpi.server.parsing import STYLES, style_of
from dllama_mpi.server.schema import CalledFunction, Message, ResponseFormat, Tool, ToolCall
from dllama_mpi.server.served import Served
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.tokenizer import Tokenizer
from tests.server.scripted import DEMO, load_tokenizer

TOKENIZER = load_tokenizer()
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size)
TOOL = Tool.model_validate({"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}})
CHANNELS = """
{%- for m in messages %}
    {%- if m.role == "assistant" and m.tool_calls %}
        {%- if m.content and m.thinking %}{{ raise_exception("both") }}{% endif %}
        {%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
        {{- call.arguments|tojson + "<|call|>" }}
    {%- else %}{{ "<|start|>" + m.role + "<|message|>" + m.content + "<|end|>" }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
CODER = """
{%- if tools %}Call so: <tool_call>
<function=example>
<parameter=example>
value
</parameter>
</function>
</tool_call>{% endif %}
{%- for m in messages %}{{ m.role + ": " + m.content + "\n" }}{% endfor %}assistant:"""
THINKING = """
{%- for m in messages %}{{ m.role + ": " + m.content.split("</think>")[-1] + "\n" }}{% endfor %}assistant:
{%- if opened %}<think>
{% elif enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}"""


def served(source: str, tokenizer: Any = TOKENIZER) -> Served:
    """Return a model with a template."""
    template = ChatTemplate({"default": source}, {}, "here")
    return Served(
        ("m",),
        tokenizer,
        template,
        TOKENIZER.vocab_size,
        100,
        SamplingParams(),
        tool_style=style_of(source),
        thinks="</think>" in source,
        grammars=GRAMMARS,
    )


def test_channels_are_read_with_and_without_tools() -> None:
    found = served(CHANNELS)
    assert found.tool_style == "harmony"
    prompt = found.render([Message(role="user", content="x")])
    assert prompt == "<|start|>user<|message|>x<|end|><|start|>assistant"
    assert found.style(prompt, None).tools == "harmony"
    assert found.style(prompt, [TOOL]).names == {"time"}


@pytest.mark.parametrize("content", ["", "I look."])
def test_reasoning_before_calls_goes_back_to_the_model(content: str) -> None:
    call = ToolCall(id="c", function=CalledFunction(name="time", arguments='{"a": 1}'))
    message = Message(role="assistant", content=content, reasoning_content="hm", tool_calls=[call])
    prompt = served(CHANNELS).render([message])
    assert ("analysis<|message|>hm<|end|>" in prompt) is (content == "")
    assert 'to=functions.time<|channel|>commentary json<|message|>{"a": 1}<|call|>' in prompt


def test_calls_of_coders() -> None:
    found = served(CODER)
    style = found.style(found.render([Message(role="user", content="x")], [TOOL]), [TOOL])
    assert (style.tools, style.schemas) == ("qwen3_coder", {"time": {"type": "object"}})
    assert found.style("x", None).tools == "none"


@pytest.mark.parametrize(
    ("variables", "thinks", "is_thinking"),
    [({}, True, False), ({"opened": True}, True, True), ({"enable_thinking": False}, False, False)],
)
def test_whether_an_answer_reasons(variables: dict[str, Any], thinks: bool, is_thinking: bool) -> None:
    found = served(THINKING)
    style = found.style(found.render([Message(role="user", content="x")], **variables), None)
    assert (style.thinks, style.is_thinking) == (thinks, is_thinking)
    form = found.formed(ResponseFormat(type="json_object"), "response_format")
    make, formed = found.behind_thought(form, style)
    assert (formed.thinks, formed.is_thinking) == (thinks, is_thinking)
    assert make is not None
    mask = make().mask()
    opener, letter = TOKENIZER.added_tokens["<think>"], TOKENIZER.encode("x", add_special_tokens=False)[0]
    allowed = [bool(mask[token // 32] >> token % 32 & 1) for token in (opener, letter)]
    assert allowed == [thinks, is_thinking]


def test_no_reasoning_before_a_form_where_there_is_no_token_for_it() -> None:
    found = served(THINKING, Tokenizer.load(DEMO))
    form = found.formed(ResponseFormat(type="json_object"), "response_format")
    make, style = found.behind_thought(form, found.style("x", None))
    assert form is not None
    assert (make, style.thinks) == (form.make, False)


def test_the_command_line_knows_all_styles() -> None:
    assert ("auto", *STYLES) == TOOL_PARSERS
