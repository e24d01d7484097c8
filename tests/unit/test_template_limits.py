"""Templates that strangers wrote: they are ended, and the next one is rendered."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from dllama_mpi.errors import ModelError, RequestError
from dllama_mpi.text import template_process
from dllama_mpi.text.chat_template import ChatTemplate
from dllama_mpi.text.template_process import PROCESS
from dllama_mpi.text.template_program import Renderer

CHAT = [{"role": "user", "content": "hi " * 1000}]


def render(source: str) -> str:
    return ChatTemplate({"default": source}, {}, "stranger.gguf").render(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '{0.__class__}'.format(messages) }}", "{% set f = '{0.__init__.__globals__}'.format %}{{ f(cycler) }}",
        "{{ ('' | attr('format'))('{0.__class__.__mro__}', 1) }}", "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__.__mro__') | list }}", "{{ '' ['__class__'] }}",
        "{{ messages | groupby('__class__.__base__') | map(attribute=0) | list }}", "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}", "{{ lipsum.__globals__['os'].environ }}", "{{ joiner.__init__ }}",
        "{{ namespace.__init__.__globals__ }}", "{{ dict.__base__.__subclasses__() }}", 
        "{{ raise_exception.__code__ }}",
        "{{ strftime_now.__globals__ }}", "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
        "{{ (messages | map('upper')).gi_frame.f_globals }}", "{{ ''.isalpha.__self__.__class__ }}",
        "{% for x in messages %}{{ loop._iterator.__class__ }}{% endfor %}", "{% import 'os' as os %}{{ os.environ }}",
        "{% include '/proc/self/environ' %}", "{% extends '/etc/passwd' %}", "{% from '/proc/self/fd/0' import x %}",
        "{{ request }}{{ config }}{{ environment }}{{ context }}", "{{ open('/etc/passwd') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}", "{% debug %}", "{{ ''.encode('rot13') }}", "{{ ''.encode('zip') }}",
    ],
)  # fmt: skip
def test_what_a_template_cannot_reach(source: str) -> None:
    """No types, no globals, no files, no change to what it was given: nothing comes out, or one line says why."""
    found = ""
    with contextlib.suppress(RequestError, ModelError):
        found = render(source)
    assert not any(word in found for word in ("class", "built-in", "module", "code", "root", "PATH", "None", "globals"))
    assert len(found) < 60


@pytest.mark.parametrize(
    "source",
    ["{{ ns.x | tojson }}", "{{ ns.x == [ns.x] }}", "{{ ns.x }}", "{{ ns.x | pprint }}", "{{ loop([1]) }}"],
)
def test_what_is_nested_too_deeply(source: str) -> None:
    nested = "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}{% endfor %}"
    with pytest.raises(RequestError, match=r"RecursionError|signal"):
        render(nested + (source if "ns" in source else "{% for i in [1] recursive %}" + source + "{% endfor %}"))
    assert render("{{ messages[0].role }}") == "user"


def test_a_prompt_is_as_long_as_what_it_is_made_of() -> None:
    """Text that tokenizers would take long over is not made of nothing, but long messages may be repeated."""
    with pytest.raises(RequestError, match=r"makes more than 3[0-9]{5} characters"):
        ChatTemplate({"default": "{{ 'x' * 1000000 }}"}, {}, "t").render([{"role": "user", "content": "hi"}])
    found = ChatTemplate({"default": "{{ messages[0].content * 4 }}"}, {}, "t").render(
        [{"role": "user", "content": "x" * 1_000_000}]
    )
    assert len(found) == 4_000_000


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give templates half a second."""
    PROCESS.close()
    monkeypatch.setattr(template_process, "LONGEST_SECONDS", 0.5)
    yield
    PROCESS.close()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].role * 10**10 }}", "takes more than 512 MB"),
        ("{{ '%1000000000d' % 1 }}", "takes more than 512 MB"),
        ("{{ '{:>10000000000}'.format('x') }}", "takes more than 512 MB"),
        ("{{ messages[0].content | center(10**11) }}", "takes more than 512 MB"),
        (
            "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "takes more than 512 MB",
        ),
        ("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", "makes more than 32[0-9]{4} characters"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__.os.getcwd() }}", "SecurityError"),
        ("{{ raise_exception('x' * 10**6) }}", "refuses these messages: x{500}$"),
    ],
)
def test_a_template_that_takes_too_much(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render(source)
    assert "\n" not in str(caught.value)
    assert render("{{ messages[0].role }}") == "user"


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** (7 ** (9 + messages | length)) }}",  # one operation, which Python cannot interrupt
    ],
)
def test_time(source: str, short_time: None) -> None:
    with pytest.raises(RequestError, match=r"takes longer than 0\.5 s"):
        render(source)
    assert render("{{ messages[0].role }}") == "user"


def test_what_compiling_takes(short_time: None) -> None:
    with pytest.raises(ModelError, match="takes longer than") as caught:
        render("{{ 7 ** (7 ** 10) }}")  # worked out when the template is compiled
    assert "--chat-template" in str(caught.value)
    with pytest.raises(ModelError, match="RecursionError"):
        render("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}")


def test_the_program_opens_no_files() -> None:
    render("{{ messages[0].role }}")
    process = PROCESS._process
    assert process is not None
    limits = psutil.Process(process.pid)
    if not hasattr(limits, "rlimit"):
        pytest.skip("limits of other processes are read on Linux only")
    assert limits.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
    assert limits.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
    assert limits.rlimit(psutil.RLIMIT_AS)[1] < 2 << 30


def test_what_jinja_imports_late_is_there() -> None:
    found = render("{{ 'a' | pprint }} {{ 'é\\n' }} {{ 'a b' | wordwrap(1) }} {{ (lipsum(1) | length) > 9 }}")
    assert found == "'a' é\n a\nb True"
    assert render("{{ '<b>1 &lt; 2</b>' | striptags }}") == "1 < 2"


def test_its_environment_holds_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    PROCESS.close()
    monkeypatch.setenv("HF_TOKEN", "secret")
    render("x")
    process = PROCESS._process
    assert process is not None
    assert not {"HF_TOKEN"} & psutil.Process(process.pid).environ().keys()


def test_it_starts_again_when_it_was_ended() -> None:
    template = ChatTemplate({"default": "{{ messages[0].role }}"}, {}, "stranger.gguf")
    process = PROCESS._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(RequestError, match="by signal 9"):
        template.render(CHAT)
    assert template.render(CHAT) == "user"


def test_an_interrupt_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {}, "t")
    with monkeypatch.context() as patched:
        patched.setattr(template_process, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            template.render([{"role": "user", "content": "first"}])
    assert template.render([{"role": "user", "content": "second"}]) == "second"


def interrupted(descriptor: int, event: int, end: float) -> None:
    """Be interrupted where an answer is waited for."""
    if event == selectors.EVENT_READ:
        raise KeyboardInterrupt


def test_one_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate({"default": "{{ messages[0].role }}"}, {}, "t")
    process = PROCESS._process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(template_process, "LONGEST_WAIT", 0.2)
        with pytest.raises(RequestError, match=r"takes longer than 0\.2 s"):
            template.render(CHAT)
    assert template.render(CHAT) == "user"


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    PROCESS.close()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ModelError, match="cannot be started"):
        render("x")


def test_templates_and_threads_do_not_mix() -> None:
    templates = [ChatTemplate({"default": f"{n} {{{{ messages[0].content }}}}"}, {}, "t") for n in range(4)]
    wrong: list[str] = []

    def ask(n: int) -> None:
        for i in range(20):
            found = templates[n].render([{"role": "user", "content": f"{i} é\ud800"}])
            if found != f"{n} {i} é\ud800":
                wrong.append(found)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_json_cannot_say() -> None:
    template = ChatTemplate({"default": "x"}, {}, "t")
    with pytest.raises(RequestError, match="cannot be given a object"):
        template.render([{"role": "user", "content": object()}])


def test_it_ends_with_the_process_that_started_it() -> None:
    program = (
        "import os\n"
        "from dllama_mpi.text.chat_template import ChatTemplate\n"
        "from dllama_mpi.text.template_process import PROCESS\n"
        "ChatTemplate({'default': 'x'}, {}, 't').render([])\n"
        "print(PROCESS._process.pid, flush=True)\n"
        "os._exit(0)\n"  # as a rank that is ended: nothing is cleaned up
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    pid = int(run.stdout)
    end = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_program_itself() -> None:
    renderer = Renderer()
    assert renderer.answer({"sources": {"default": "{{ x }}{% generation %}!{% endgeneration %}"}}, 0) == {}
    assert renderer.answer({"name": "default", "variables": {"x": 3}}, 0) == {"text": "3!"}
    assert renderer.answer({"sources": {"default": "\n{% if %}"}}, 0)["broken"].startswith("is broken in line 2")
    assert renderer.answer({"name": "other", "variables": {}}, 0) == {"failed": "KeyError: 'other'"}
