"""The commands as a person uses them, with the demo model, on real ranks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllama_mpi.architectures.registry import ARCHITECTURES
from tests.mpi.launch import mpiexec, run
from tests.mpi.pool import pool
from tests.mpi.typist import Typist
from tests.tiers import slow

Q40 = ["--buffer-float-type", "q40"]
HELDOUT = "dllama_mpi/demo/heldout.txt"
GREEDY = ["-m", "dllama_mpi", "--prompt", "Return the", "--steps", "40", "--temperature", "0"]
EXACT = [*GREEDY, "--weights", "f32", "--buffer-float-type", "f32"]  # else a tie may go the other way


def test_a_job_of_its_own_writes_what_shared_ranks_write() -> None:
    done = mpiexec(2, GREEDY)
    assert len(done.stdout) > 60
    assert done.stdout == pool(2).run(GREEDY).stdout


@pytest.mark.parametrize("most", [3, slow(4)])
def test_greedy_text_is_the_same_at_any_rank_count(most: int) -> None:
    texts = {ranks: pool(ranks).run(EXACT).stdout for ranks in range(1, most + 1)}
    assert set(texts.values()) == {texts[1]}, texts


@pytest.mark.slow
def test_greedy_text_is_the_same_at_a_rank_a_head() -> None:
    assert mpiexec(8, EXACT).stdout == pool(1).run(EXACT).stdout


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["f32", "q80"])
def test_uneven_split_and_formats_give_the_same_text(weights: str) -> None:
    options = [*GREEDY, "--weights", weights]
    whole = pool(1).run(options).stdout
    assert pool(3).run([*options, "--split", "3,1,1"]).stdout == whole
    assert pool(2).run([*options, "--prefill-chunk", "1"]).stdout == whole


def test_same_seed_same_text() -> None:
    options = ["--temperature", "1.2", "--topp", "1", "--topk", "0"]
    sampled = ["-m", "dllama_mpi", "--prompt", "Return the", "--steps", "30", *options]
    first, second, other = (pool(2).run([*sampled, "--seed", seed]).stdout for seed in ("7", "7", "8"))
    assert first == second
    assert first != other


def test_json_and_stats() -> None:
    done = pool(2).run([*GREEDY, "--json", "--stats=steps"])
    report = json.loads(done.stdout)
    assert report["ranks"] == 2
    assert report["finish_reason"] == "length"
    assert len(report["token_ids"]) == 40
    stats = report["stats"]
    assert stats["output_tokens"] == 40
    assert stats["decode"]["steps"] == 39  # the last token is not fed
    assert stats["decode"]["tokens_per_second"] > 0
    assert stats["time_to_first_token_seconds"] > 0
    assert stats["decode"]["sent_kb"] > 0
    assert stats["slowest_rank"] in (0, 1)
    assert [rank["rank"] for rank in stats["ranks"]] == [0, 1]
    assert all(rank["compute_ms"] > 0 and rank["wait_ms"] > 0 and rank["share"] == 0.5 for rank in stats["ranks"])
    assert [bool(rank["remark"]) for rank in stats["ranks"]].count(True) == 1
    lines = done.stderr.splitlines()
    assert sum(line.strip().startswith("token") for line in lines) == 39
    assert any(line.strip().startswith("prompt x") for line in lines)
    assert any("tokens/s" in line for line in lines)
    alone = pool(1).run([*GREEDY, "--stats"])
    assert alone.stdout == report["text"] + "\n"
    assert "tokens/s" in alone.stderr
    assert "token x" not in alone.stderr


def test_stop_string_and_prompt_file(tmp_path: Path) -> None:
    whole = pool(1).run(GREEDY).stdout
    stop = whole.split()[4]
    (tmp_path / "prompt").write_text("Return the")
    args = ["-m", "dllama_mpi", "--prompt-file", str(tmp_path / "prompt"), *GREEDY[4:], "--stop", stop]
    cut = pool(2).run(args).stdout
    assert cut.rstrip("\n") == whole[: whole.index(stop)].rstrip("\n")
    piped = pool(2).run(["-m", "dllama_mpi", "--prompt-file", "-", *GREEDY[4:]], stdin="Return the")
    assert piped.stdout == whole


@pytest.mark.parametrize("payload", [slow("f16"), "q80"])
def test_buffer_types_run(payload: str) -> None:
    """Sent as fewer bits, and fewer bytes."""
    direct = [*GREEDY, "--json", "--sync", "direct", "--buffer-float-type"]
    plain = json.loads(pool(3).run([*direct, "f32"]).stdout)
    sent = json.loads(pool(3).run([*direct, payload]).stdout)
    assert len(sent["token_ids"]) == 40
    assert sent["stats"]["decode"]["sent_kb"] < 0.75 * plain["stats"]["decode"]["sent_kb"]


def _perplexity(ranks: int, *options: str) -> float:
    done = pool(ranks).run(["-m", "dllama_mpi", "perplexity", "--file", HELDOUT, "--json", *options], 600)
    return float(json.loads(done.stdout)["perplexity"])


@pytest.mark.slow
def test_perplexity_by_weights() -> None:
    """Quantising costs little: q80 within 0.5 %, q40 within 5 % of f32; ranks and converting cost nothing."""
    plain = _perplexity(1, "--weights", "f32")
    assert 2 < plain < 40
    assert _perplexity(2, "--weights", "f32") == pytest.approx(plain, rel=1e-4)
    assert _perplexity(2, "--weights", "f16") == pytest.approx(plain, rel=1e-3)
    assert _perplexity(2, "--weights", "q80") == pytest.approx(plain, rel=5e-3)
    assert _perplexity(2, "--weights", "q40") == pytest.approx(plain, rel=5e-2)
    assert _perplexity(2, "--weights", "f32", "--buffer-float-type", "q80") == pytest.approx(plain, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["direct", pytest.param("scatter", marks=pytest.mark.long)])
def test_perplexity_of_activations_in_four_bits(sync: str) -> None:
    """As what a message leaves out goes with the next, they cost less than 0.3 %."""
    sent = ["--weights", "f32", "--sync", sync, "--buffer-float-type"]
    plain = _perplexity(3, *sent, "f32")
    assert _perplexity(3, *sent, "q40") == pytest.approx(plain, rel=3e-3)


def test_activations_in_four_bits_are_not_for_every_model() -> None:
    done = pool(2).run(["-m", "dllama_mpi", "--model", "random:gemma3-4b:1", "--prompt", "x", *Q40], check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: buffer_float_type q40: gemma3 normalises or scales what each layer adds")


def test_convert_then_run(tmp_path: Path) -> None:
    target = tmp_path / "demo-q40"
    done = pool(2).run(["-m", "dllama_mpi", "convert", "demo", str(target), "--weights", "q40,lm_head=q80"])
    (line,) = [line for line in done.stderr.splitlines() if str(target) in line]
    assert re.search(r": [0-9.]+ MB, 5\.[0-9]+ bits a weight, [0-9.]+ s$", line)
    assert done.stdout == ""
    whole = pool(1).run([*GREEDY, "--weights", "q40,lm_head=q80"])
    assert pool(3).run([*GREEDY, "--model", str(target)]).stdout == whole.stdout
    told = json.loads(pool(1).run(["-m", "dllama_mpi", "info", "--model", str(target), "--json"]).stdout)
    assert told["stored_as"] == told["weights"] == "q40,lm_head=q80"
    assert (told["formats"]["q"], told["formats"]["lm_head"]) == ("q40", "q80")
    again = pool(2).run(["-m", "dllama_mpi", "convert", "demo", str(target)], check=False)
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_info() -> None:
    text = run([sys.executable, "-m", "dllama_mpi", "info"]).stdout
    assert "memory of the largest rank" in text
    report = json.loads(run([sys.executable, "-m", "dllama_mpi", "info", "--json", "--weights", "q80"]).stdout)
    assert [m["ranks"] for m in report["memory"]] == list(range(1, 9))
    assert report["parameters"] == pytest.approx(3.5e6, rel=0.15)
    sizes = [m["weights_bytes"] for m in report["memory"]]
    assert sizes == sorted(sizes, reverse=True)
    assert report["instruction_set"]
    assert pool(2).run(["-m", "dllama_mpi", "info", "--json"]).stdout.count("\n") == 1


def test_info_of_layers_of_several_kinds() -> None:
    info = ["-m", "dllama_mpi", "info", "--random", "tiny-state", "--ranks", "2"]
    report = json.loads(pool(1).run([*info, "--json"]).stdout)
    kinds = [(k["layers"], k["mixer"]["kind"], k["feed_forward"]["kind"]) for k in report["layer_kinds"]]
    assert kinds == [(1, "gated delta net", "dense"), (2, "gated delta net", "experts"), (1, "attention", "experts")]
    assert report["active_parameters"] < report["parameters"]
    assert report["bytes_per_token"] < report["memory"][0]["weights_bytes"]
    assert report["formats"]["router"] == "f16"
    assert all(need["states_bytes"] > 0 for need in report["memory"])
    text = pool(1).run(info).stdout
    assert "experts 16, experts per token 4" in text
    assert any(line.startswith("f16 ") and "router" in line for line in text.splitlines())


def test_architectures_are_listed() -> None:
    info = ["-m", "dllama_mpi", "info", "--architectures"]
    listed = json.loads(pool(2).run([*info, "--json"]).stdout)["architectures"]
    assert [each["model_type"] for each in listed] == sorted(ARCHITECTURES)
    lines = pool(1).run(info).stdout.splitlines()
    assert len(lines) == 2 + len(listed)
    for each, line in zip(listed, lines[2:], strict=True):
        assert each["about"]
        assert line.split(maxsplit=1) == [each["model_type"], each["about"]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dllama_mpi", *GREEDY[2:]],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: output cannot be written: No space left on device"
    assert "Traceback" not in done.stderr


def test_states_are_not_drafted_for() -> None:
    args = ["-m", "dllama_mpi", "--model", "random:tiny-state", "--prompt", "x", "--speculate", "lookup"]
    done = pool(2).run(args, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: speculate lookup: qwen3_next has layers whose state cannot go back")


def test_example_script() -> None:
    done = pool(2).run(["examples/generate.py"])
    assert "logits (3, " in done.stdout
    assert done.stderr == ""


def test_chat_through_a_pipe() -> None:
    lines = "What is a list?\n/stats\n/nonsense\n/reset\nAnd a tuple?\n/quit\nnever read\n"
    args = ["-m", "dllama_mpi", "chat", "--temperature", "0", "--steps", "12", "--ignore-eos", "--system", "Be brief."]
    done = pool(2).run(args, stdin=lines)
    assert len(done.stdout) > 40
    assert done.stderr.count("> ") == 6
    assert "tokens/s" in done.stderr
    assert "unknown command /nonsense" in done.stderr
    # A long conversation meets the end of the context: one message is refused, the program lives on.
    long = pool(2).run(args, stdin="word " * 700 + "\n/reset\nhello\n")
    assert "--max-seq-len" in long.stderr
    assert len(long.stdout) > 20


def test_a_terminal_is_set_from_the_background() -> None:
    inner = (
        "import os, termios; from dllama_mpi.cli.terminal import set_modes; "
        "device = os.open('/dev/tty', os.O_RDWR | os.O_NOCTTY); "
        "set_modes(device, termios.tcgetattr(device)); print('set')"
    )
    # In a process group of its own, as Open MPI's ranks are: there it would be stopped.
    outer = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], preexec_fn=os.setpgrp, "
    typist = Typist([sys.executable, "-c", outer + "timeout=60, check=True)"])
    assert typist.status() == 0, typist.seen
    assert "set" in typist.seen
