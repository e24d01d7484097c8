"""Chat templates: built-in formats to the letter, the rules of transformers, and errors that name the remedy."""

# ruff: noqa: RUF001 - DeepSeek's tokens are written with full-width bars

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from dllama_mpi.errors import DllamaError
from dllama_mpi.text.builtin_templates import BUILT_IN
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.tokenizer import Tokenizer

from .tiny_tokenizers import byte_level, sentencepiece, write_model_dir

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"},
]
# The formats as their publishers print them: Meta's llama/generation.py and llama.com, the model cards of
# Mixtral-8x7B-Instruct and zephyr-7b-beta, OpenAI's chatml.md, DeepSeek-V3's tokenizer_config.json.
EXPECTED = {
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi! [/INST] Hello. </s><s>[INST] Who are you? [/INST]",
        "<s>[INST] Hi! [/INST]",
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho are you?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "deepseek3": (
        "<s>Be brief.<｜User｜>Hi!<｜Assistant｜>Hello.<｜end▁of▁sentence｜><｜User｜>Who are you?<｜Assistant｜>",
        "<s><｜User｜>Hi!<｜Assistant｜>",
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n",
    ),
    "mistral": (
        "<s>[INST] Be brief.\n\nHi! [/INST]Hello.</s>[INST] Who are you? [/INST]",
        "<s>[INST] Hi! [/INST]",
    ),
    "zephyr": (
        "<|system|>\nBe brief.</s>\n<|user|>\nHi!</s>\n<|assistant|>\nHello.</s>\n<|user|>\nWho are you?</s>\n"
        "<|assistant|>\n",
        "<|user|>\nHi!</s>\n<|assistant|>\n",
    ),
}


def built_in(name: str) -> ChatTemplate:
    return ChatTemplate.load(Tokenizer(sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>"}), name)


def template(source: str, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate({"default": source}, special_tokens, "test")


def load(folder: Path, **files: Any) -> ChatTemplate:
    """Load the template of a model directory with the given JSON files."""
    return ChatTemplate.load(Tokenizer.load(write_model_dir(folder, byte_level(), **files)))


# --- built-in formats ---


def test_every_built_in_is_tested() -> None:
    assert set(EXPECTED) == set(BUILT_IN)


@pytest.mark.parametrize("name", EXPECTED)
def test_published_format(name: str) -> None:
    whole, one_question = EXPECTED[name]
    assert built_in(name).render(CHAT) == whole
    assert built_in(name).render(CHAT[1:2]) == one_question


@pytest.mark.parametrize(
    ("name", "opening"),
    [
        ("llama3", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        ("chatml", "<|im_start|>assistant\n"),
        ("zephyr", "<|assistant|>\n"),
        ("deepseek3", "<｜Assistant｜>"),
    ],
)
def test_without_generation_prompt(name: str, opening: str) -> None:
    assert built_in(name).render(CHAT, add_generation_prompt=False) == EXPECTED[name][0].removesuffix(opening)


def test_distributed_llamas_spelling_of_names() -> None:
    assert built_in("deepSeek3").render(CHAT) == EXPECTED["deepseek3"][0]


def test_deepseek_leaves_past_thinking_out() -> None:
    chat = [CHAT[1], {"role": "assistant", "content": "<think>Hm.</think>Hello."}, CHAT[3]]
    assert "Hm." not in built_in("deepseek3").render(chat)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_roles_must_take_turns(name: str) -> None:
    with pytest.raises(DllamaError, match=r"refuses these messages.*message 2 is from user"):
        built_in(name).render([CHAT[0], CHAT[1], CHAT[3]])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_message_without_content_is_refused(name: str) -> None:
    for message in ({"role": "user"}, {"role": "user", "content": None}):
        with pytest.raises(DllamaError, match="content"):
            built_in(name).render([message])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_tokenizer_without_bos_and_eos_will_do(name: str) -> None:
    prompt = ChatTemplate.load(Tokenizer(byte_level()), name).render(CHAT)
    assert prompt == EXPECTED[name][0].replace("<s>", "").replace("</s>", "")


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_one_bos_in_the_encoded_prompt(name: str) -> None:
    tokenizer = Tokenizer(sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>"})
    prompt = ChatTemplate.load(tokenizer, name).render(CHAT[1:2])
    for add_special_tokens in (False, True):
        ids = tokenizer.encode(prompt, add_special_tokens)
        assert ids[0] == tokenizer.bos_id
        assert ids.count(1) == 1


# --- finding the template ---


def test_jinja_file_comes_before_the_settings(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file: {{ messages[0].content }}", encoding="utf-8")
    assert load(tmp_path, tokenizer_config={"chat_template": "no"}).render(CHAT) == "from the file: Be brief."


def test_string_in_tokenizer_config(tmp_path: Path) -> None:
    found = load(tmp_path, tokenizer_config={"chat_template": "yes"}, chat_template={"chat_template": "no"})
    assert found.render(CHAT) == "yes"


def test_chat_template_json(tmp_path: Path) -> None:
    assert load(tmp_path, chat_template={"chat_template": "yes"}).render(CHAT) == "yes"


def test_named_list(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    found = load(tmp_path, tokenizer_config={"chat_template": named})
    assert found.render(CHAT) == "default"
    assert found.render(CHAT, tools=[{"type": "function"}]) == "tools"


def test_named_list_without_default(tmp_path: Path) -> None:
    with pytest.raises(DllamaError, match=r"\['rag'\], none named default.*--chat-template llama2\|"):
        load(tmp_path, tokenizer_config={"chat_template": [{"name": "rag", "template": "x"}]})


def test_template_of_another_tokenizers_folder_comes_first(tmp_path: Path) -> None:
    model = write_model_dir(tmp_path / "model", byte_level(), tokenizer_config={"chat_template": "model"})
    other = write_model_dir(tmp_path / "other", byte_level())
    assert ChatTemplate.load(Tokenizer.load(model, other)).render(CHAT) == "model"
    (other / "chat_template.jinja").write_text("other")
    assert ChatTemplate.load(Tokenizer.load(model, other)).render(CHAT) == "other"


def test_choice_may_be_a_file_and_comes_first(tmp_path: Path) -> None:
    write_model_dir(tmp_path, byte_level(), tokenizer_config={"chat_template": "own"})
    (tmp_path / "my.jinja").write_text("mine: {{ messages | length }}")
    assert ChatTemplate.load(Tokenizer.load(tmp_path), str(tmp_path / "my.jinja")).render(CHAT) == "mine: 4"


def test_unknown_choice(tmp_path: Path) -> None:
    with pytest.raises(DllamaError, match=r"'llama9'.*llama2\|llama3\|.*\.jinja"):
        ChatTemplate.load(Tokenizer(byte_level()), "llama9")


def test_no_template_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DllamaError, match=r"no chat template.*--chat-template llama2\|llama3\|deepseek3\|chatml"):
        load(tmp_path)


def test_broken_template_names_the_line() -> None:
    with pytest.raises(DllamaError, match=r"broken in line 2.*--chat-template"):
        template("{{ bos_token }}\n{% if %}")


# --- rendering as transformers does ---


def test_whitespace_of_blocks() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m.role }}\n    {% endif %}\n{% endfor %}\n"
    assert template(source).render(CHAT[:2]) == "system\nuser\n"


def test_loop_controls() -> None:
    source = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}"
    assert template(source).render(CHAT) == "user"


def test_tojson_does_not_escape() -> None:
    message = [{"role": "user", "content": "<a href='x'>é & \"好\"</a>"}]
    assert template("{{ messages[0].content | tojson }}").render(message) == '"<a href=\'x\'>é & \\"好\\"</a>"'
    assert template("{{ 'é' | tojson(ensure_ascii=True) }}").render(message) == '"\\u00e9"'
    assert template("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}").render(message) == '{\n  "b": 1,\n  "a": 2\n}'
    packed = "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=True) }}"
    assert template(packed).render(message) == '{"a":2,"b":1}'


def test_content_is_not_escaped() -> None:
    assert template("{{ messages[0].content }}").render([{"role": "user", "content": "<&>{{ 1 }}"}]) == "<&>{{ 1 }}"


def test_variables() -> None:
    source = (
        "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}|{{ thinking }}|{{ tools is none }}|{{ add_generation_prompt }}"
    )
    found = template(source, bos_token="<s>", eos_token="</s>")
    assert found.render(CHAT, thinking="on") == "<s>|</s>||on|True|True"
    assert found.render(CHAT, bos_token="<b>", add_generation_prompt=False) == "<b>|</s>|||True|False"


def test_special_tokens_come_from_the_files(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "add_bos_token": True}
    source = "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ add_bos_token }}"
    token_map = {"pad_token": "<|pad|>"}
    found = load(tmp_path, tokenizer_config={**settings, "chat_template": source}, special_tokens_map=token_map)
    assert found.render(CHAT) == "<|begin|><|end|><|pad|>"


def test_strftime_now() -> None:
    assert template("{{ strftime_now('%Y') }}").render(CHAT) in {
        str(datetime.datetime.now().year),
        str((datetime.datetime.now() - datetime.timedelta(minutes=1)).year),  # the test may run at New Year
    }


# Written like the templates of Gemma 3 (content as text or as parts, an assistant called model, the system message
# before the first user's), ERNIE 4.5 (names that may be undefined) and Phi-4-mini.
GEMMA = """{{ bos_token }}
{%- set system = messages[0]['content'] ~ '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}
    {{- system if loop.first else '' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] if item['type'] == 'text' -%}
            {{ item['text'] | trim }}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{{ '<start_of_turn>model\\n' if add_generation_prompt }}"""
ERNIE = """{%- if not cls_token is defined -%}{%- set cls_token = "<|begin_of_sentence|>" -%}{%- endif -%}
{%- if not sep_token is defined -%}{%- set sep_token = "<|end_of_sentence|>" -%}{%- endif -%}
{{- cls_token -}}
{%- for message in messages -%}
    {%- if message["role"] == "user" -%}
        {{- "User: " + message["content"] + "\\n" -}}
    {%- elif message["role"] == "assistant" -%}
        {{- "Assistant: " + message["content"] + sep_token -}}
    {%- elif message["role"] == "system" -%}
        {{- message["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant: " -}}{%- endif -%}"""
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            GEMMA,
            "<bos><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
            "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            ERNIE,
            "<|begin_of_sentence|>Be brief.\nUser: Hi!\nAssistant: Hello.<|end_of_sentence|>User: Who are you?\n"
            "Assistant: ",
        ),
        (
            PHI,
            "<|system|>Be brief.<|end|><|user|>Hi!<|end|><|assistant|>Hello.<|end|><|user|>Who are you?<|end|>"
            "<|assistant|>",
        ),
    ],
    ids=["gemma", "ernie", "phi"],
)
def test_what_templates_of_families_need(source: str, expected: str) -> None:
    made = template(source, bos_token="<bos>", eos_token="<eos>")
    assert made.render(CHAT) == expected
    parts: list[dict[str, Any]] = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": "Hi!"}]}, *CHAT[2:]]
    if source is GEMMA:
        assert made.render(parts) == expected


def test_generation_tag_is_tolerated() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.role }} {% endgeneration %}{% endfor %}"
    assert template(source).render(CHAT[:2]) == "system user "


def test_tools_are_passed() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    assert template("{{ tools[0].function.name }}").render(CHAT, tools=tools) == "weather"


def test_documents_are_defined_as_none() -> None:
    assert template("{{ documents is none }}").render(CHAT) == "True"


def test_raise_exception_is_told() -> None:
    source = "{{ raise_exception('only one question, please') }}"
    with pytest.raises(DllamaError, match="refuses these messages: only one question, please"):
        template(source).render(CHAT)


@pytest.mark.parametrize("source", ["{{ messages[9].content.strip() }}", "{{ 1 + 'a' }}", "{{ messages.nope() }}"])
def test_a_failing_template_is_told(source: str) -> None:
    with pytest.raises(DllamaError, match="the chat template of test fails on these messages"):
        template(source).render(CHAT)


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__bases__[0] }}"]
)
def test_the_sandbox_holds(source: str) -> None:
    chat = list(CHAT)
    with pytest.raises(DllamaError, match=r"SecurityError|unsafe"):
        template(source).render(chat)
    assert chat == CHAT
