"""Serve the model over HTTP: OpenAI's API and others, many clients at once, a page for people.

SIGTERM or Ctrl-C lets running requests finish, then ends all ranks; a second Ctrl-C ends them at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, UsageError
from ..log import say
from ..parallel.launch import launched
from .options import add_model_options, add_sampling_options, add_speculation_option, load, number, read_text, sampling

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..parallel.group import TensorParallelGroup
    from ..server.grammar import Grammars
    from ..server.link import Link
    from ..server.run import HttpServer, ServeOptions
    from ..server.served import Served

KEY_VARIABLE = "DLLAMA_MPI_API_KEY"
TOOL_PARSERS = ("auto", "hermes", "llama3", "mistral", "qwen3_coder", "harmony", "none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0: everywhere (default: 127.0.0.1)",
    )
    group.add_argument("--port", type=number(int, 0, 65535), default=9990, help="port (default: 9990; 0: a free one)")
    group.add_argument(
        "--max-batch", type=number(int, 1), default=16, metavar="N", help="requests that run at once (default: 16)"
    )
    group.add_argument(
        "--max-queue",
        type=number(int, 1),
        default=256,
        metavar="N",
        help="requests that may wait; more are told to come back (default: 256)",
    )
    group.add_argument(
        "--max-step-ms",
        type=number(float, 0, above=True),
        default=250.0,
        metavar="MS",
        help="how long a step may take while prompts are read beside running answers (default: 250)",
    )
    group.add_argument(
        "--alias", action="append", default=[], metavar="NAME",
        help="another name that clients may call the model; may be repeated; *: any name",
    )  # fmt: skip
    group.add_argument(
        "--drain-timeout", type=number(int, 0), default=30, metavar="SECONDS",
        help="how long running requests may go on when the server is told to end (default: 30)",
    )  # fmt: skip
    add_answer_options(group)
    _add_access_options(parser)
    _add_restart_options(parser)
    add_speculation_option(parser)
    add_model_options(parser)
    add_sampling_options(parser)


def add_answer_options(group: argparse._ActionsContainer) -> None:
    """Add how requests are read and answered."""
    group.add_argument(
        "--chat-template", metavar="NAME",
        help="llama2, llama3, deepseek3, chatml, mistral, zephyr, or a .jinja file (default: the model's)",
    )  # fmt: skip
    group.add_argument(
        "--tool-parser", choices=TOOL_PARSERS, default="auto",
        help="how the model writes tool calls (default: auto, what its chat template teaches)",
    )  # fmt: skip
    group.add_argument(
        "--pooling", choices=("mean", "last"), default="mean",
        help="of which final hidden states embeddings are made: of all tokens, or of the last (default: mean)",
    )  # fmt: skip


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"a key that clients must give; may be repeated; also from the variable {KEY_VARIABLE} (default: none)",
    )  # fmt: skip
    group.add_argument("--api-key-file", metavar="FILE", help="a file with keys, one a line")
    group.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="a name besides this machine's that a request's Host may have; may be repeated; *: any",
    )  # fmt: skip
    group.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="let pages of this origin call, such as https://chat.example.org; may be repeated; *: any (default: none)",
    )  # fmt: skip
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate, for https")
    group.add_argument("--ssl-keyfile", metavar="FILE", help="the certificate's key")
    group.add_argument(
        "--max-body", type=number(float, 0, above=True), default=10, metavar="MB", help="largest request (default: 10)"
    )
    group.add_argument(
        "--header-timeout", type=number(float, 0, above=True), default=15, metavar="SECONDS",
        help="how long a client may take to send a request's head (default: 15)",
    )  # fmt: skip
    group.add_argument(
        "--idle-timeout", type=number(int, 1), default=75, metavar="SECONDS",
        help="how long a connection may stay open between requests (default: 75)",
    )  # fmt: skip


def _add_restart_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("restarts")
    group.add_argument(
        "--restart", type=number(int, 1), metavar="N",
        help="start the job again when it ends badly, at most N times until it has served for ten minutes; "
        "meanwhile clients get 503 (default: not)",
    )  # fmt: skip
    group.add_argument(
        "--launch", metavar="COMMAND",
        help='what starts the ranks, with --restart: "mpiexec -f hosts -n 4" (default: one process without MPI)',
    )  # fmt: skip
    group.add_argument("--supervised", metavar="PATH", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Serve until told to end; every rank takes part."""
    if args.restart is not None:
        return _supervise(args)
    if args.launch is not None:
        raise UsageError(f"--launch {args.launch!r} needs --restart N")
    return _serve(args)


def _supervise(args: argparse.Namespace) -> int:
    """Start the job as often as need be; return its status."""
    found = launched()
    if found is not None and found != ("srun", 1, 0):  # as in a batch script of Slurm
        raise UsageError(
            f"--restart {args.restart} under {found[0]}: it has to start the ranks itself; say, under nothing, "
            f'python -m dllama_mpi serve --restart {args.restart} --launch "mpiexec -n {found[1]}", then the rest'
        )
    with serve_extra():
        from ..server.supervisor import Supervisor
    try:
        launch = shlex.split(args.launch or "")
    except ValueError as error:
        raise UsageError(f"--launch {args.launch!r} cannot be read: {error}") from None
    own = without_options(args.given, ("--restart", "--launch"))
    return Supervisor([*launch, sys.executable, "-m", "dllama_mpi", *own], _options(args), args.restart).run()


def without_options(given: Sequence[str], names: Collection[str]) -> list[str]:
    """Return arguments without some options and their values."""
    kept, is_value = [], False
    for each in given:
        if is_value or each in names:
            is_value = not is_value
        elif each.partition("=")[0] not in names:
            kept.append(each)
    return kept


def _serve(args: argparse.Namespace) -> int:
    from ..parallel.group import connect

    group = connect(args.timeout)
    server: HttpServer | None = None
    link: Link | None = None
    with group.together():
        if group.is_root:
            server = _listen(args)
            server.start()
            link = _linked(args, server)
    try:
        llm = load(args, group, args.max_batch, max_queue=args.max_queue, max_step_ms=args.max_step_ms, responsive=True)
        with group.together():
            served = served_of(args, llm) if group.is_root else None
        llm.warm_up()
        leave_signals_to_root(group)
        with llm.session() as leads:
            if leads:
                assert server is not None
                assert served is not None
                say(f"serving {served.names[0]} on {server.url} ({group.size} rank{'s' * (group.size > 1)})")
                if link is not None:
                    link.tell_ready()
                server.serve(llm.engine, served)
    finally:
        if server is not None:
            server.close()
    return 0


def leave_signals_to_root(group: TensorParallelGroup) -> None:
    """Have workers ignore the signals that launchers send to every rank: the root ends them. Collective."""
    with group.together():
        if not group.is_root:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda *_: None)


@contextmanager
def serve_extra(command: str = "serve") -> Iterator[None]:
    """Say in a line that the extra is not installed."""
    try:
        yield
    except ImportError as error:
        raise UsageError(f"{command} needs {error.name}; pip install 'dllama-mpi[serve]'") from None


def _listen(args: argparse.Namespace) -> HttpServer:
    """Return the server.

    Raises:
        UsageError: an option cannot be used, or the extra is not installed.
    """
    with serve_extra():
        from ..server.run import HttpServer
    return HttpServer(_options(args))


def _linked(args: argparse.Namespace, server: HttpServer) -> Link | None:
    """Tell the supervisor, if there is one, that the server listens."""
    from ..server.link import Link

    return None if args.supervised is None else Link(args.supervised, server.drain, server.end_now)


def _options(args: argparse.Namespace) -> ServeOptions:
    """Return how the server listens, and who may come in."""
    with serve_extra():
        from ..server.gate import GateOptions, known_hosts
        from ..server.run import ServeOptions
    names = [*args.allow_host, *([args.host] if args.host else [])]
    gate = GateOptions(
        keys=_keys(args),
        hosts=known_hosts(names, socket.gethostname()),
        origins=tuple(args.cors_origin),
        body_bytes=int(1e6 * args.max_body),
    )
    return ServeOptions(
        host=args.host,
        port=args.port,
        gate=gate,
        certfile=args.ssl_certfile,
        keyfile=args.ssl_keyfile,
        header_timeout=args.header_timeout,
        idle_timeout=args.idle_timeout,
        drain_timeout=args.drain_timeout,
        is_shared=args.supervised is not None,
    )


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [*args.api_key, os.environ.get(KEY_VARIABLE, "")]
    if args.api_key_file is not None:
        lines = [line.strip() for line in read_text(args.api_key_file, "--api-key-file").splitlines()]
        found = [line for line in lines if line and not line.startswith("#")]
        if not found:
            raise UsageError(f"--api-key-file {args.api_key_file} has no key; write one a line")
        keys += found
    if "" in args.api_key:
        raise UsageError("--api-key is empty; give a key, or leave it out")
    return tuple(key for key in keys if key)


def served_of(args: argparse.Namespace, llm: LLM) -> Served:
    """Return the model as the server's routes see it; args: those of `add_answer_options` and of the model."""
    from ..server.parsing import style_of
    from ..server.served import Served
    from ..startup.finding import is_named
    from ..text.chat_template import ChatTemplate

    template: ChatTemplate | None = None
    try:
        template = ChatTemplate.load(llm.tokenizer, args.chat_template)
    except ModelError as error:
        if args.chat_template is not None:
            raise
        say(f"no chats: {error}")
    source = "\n".join(template.sources.values()) if template is not None else ""
    path = Path(args.model)
    names = ("demo" if args.model == "demo" else path.resolve().name, *args.alias)
    if is_named(args.model):
        names = (names[0], args.model, *args.alias)
    return Served(
        names=tuple(dict.fromkeys(names)),
        tokenizer=llm.tokenizer,
        template=template,
        vocab_size=llm.config.vocab_size,
        context=llm.max_seq_len,
        defaults=sampling(args, llm.folder, None),
        tool_style=style_of(source) if args.tool_parser == "auto" else args.tool_parser,
        thinks="</think>" in source,
        pooling=args.pooling,
        hidden_size=llm.config.hidden_size,
        grammars=_grammars(llm),
        ranks=lambda: _ranks(llm),
        details=_details(args, llm),
    )


def _grammars(llm: LLM) -> Grammars | None:
    """Return what makes answers keep to grammars, if llguidance is installed."""
    from ..server.grammar import Grammars

    try:
        return Grammars(llm.tokenizer, llm.config.vocab_size)
    except ImportError:
        return None


def _ranks(llm: LLM) -> list[dict[str, Any]]:
    """Return what each rank did since it was last asked."""
    from ..engine.stats import Stats

    stats = Stats()
    llm.engine.times(stats, False)
    return [report.to_dict() for report in stats.ranks]


def _details(args: argparse.Namespace, llm: LLM) -> dict[str, Any]:
    group = llm.group
    ranks = [
        {"rank": rank, "host": host, "share": share}
        for rank, (host, share) in enumerate(zip(group.hosts, llm.shares, strict=True))
    ]
    return {
        "model_path": str(llm.folder),
        "max_batch": args.max_batch,
        "model": {"n_embd": llm.config.hidden_size, "n_layer": len(llm.config.layers), "weights": llm.weights},
        "cluster": {"ranks": ranks, "threads": llm.threads, "kv_type": llm.kv_type},
    }
