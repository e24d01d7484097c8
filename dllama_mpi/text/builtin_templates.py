"""Chat templates by name, for models that come without one; each says where its format is published.

They follow the rules of a model's own template (see chat_template.py) and use the tokenizer's `bos_token` and
`eos_token`. Where a format has no place for a system message, it goes before the first user message.
"""

# ruff: noqa: RUF001 - DeepSeek's tokens are written with full-width bars

from __future__ import annotations

# Llama 2 and Mistral: the system message is part of the first user message, and the roles take turns.
_TURNS = """
{%- if messages and messages[0].role == 'system' %}
    {%- set system, turns = messages[0].content, messages[1:] %}
{%- else %}
    {%- set system, turns = none, messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') %}
        {{- raise_exception('after an optional system message, user and assistant must take turns; message '
                            ~ loop.index ~ ' is from ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
"""

# "Prompt format" of Llama 2 in Meta's github.com/meta-llama/llama, llama/generation.py: every exchange is a
# text of its own, between BOS and EOS.
LLAMA2 = (
    _TURNS
    + """
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- ' ' + message.content.strip() + ' ' + eos_token }}
    {%- elif loop.first and system is not none %}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- bos_token + '[INST] ' + message.content.strip() + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""
)

# The model card of Mistral-7B-Instruct and Mixtral-8x7B-Instruct: one BOS, then exchanges, each answer with EOS.
MISTRAL = (
    _TURNS
    + """
{{- bos_token }}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {{- message.content + eos_token }}
    {%- elif loop.first and system is not none %}
        {{- '[INST] ' + system + '\\n\\n' + message.content + ' [/INST]' }}
    {%- else %}
        {{- '[INST] ' + message.content + ' [/INST]' }}
    {%- endif %}
{%- endfor %}
"""
)

# "Llama 3 model cards and prompt formats" at llama.com.
LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content.strip() + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# The chat_template of DeepSeek-V3 and -R1: system messages first; of a past answer its thinking is left out.
DEEPSEEK3 = """
{{- bos_token + messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\\n\\n') }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
    {%- elif message.role != 'system' %}
        {{- raise_exception('the roles are system, user and assistant; one message is from ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' }}
{%- endif %}
"""

# ChatML, from OpenAI's chatml.md (openai-python 0.28); Qwen, Yi, SmolLM and many fine-tuned models use it.
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The model cards of zephyr-7b-beta and TinyLlama-1.1B-Chat.
ZEPHYR = """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + eos_token + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

# Asked for by name in any case: Distributed Llama writes deepSeek3.
BUILT_IN = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "deepseek3": DEEPSEEK3,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
}
