"""The commands `download` and `remove`, as a person uses them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dllama_mpi.cli import main
from dllama_mpi.hub.names import models
from dllama_mpi.startup.opening import DEMO
from tests.hub.small_hub import Hub

PYTHON = Path(sys.executable).name
FOLDER = {name: (DEMO / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")}


def test_models_are_listed_with_the_hosts_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--ranks", "4", "--memory", "8G", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    assert set(rows) == set(models())
    eight = rows["qwen3-8b"]
    assert eight["repository"] == "Qwen/Qwen3-8B-GGUF:Q4_K_M"
    assert eight["parameters"] == pytest.approx(8.2e9, rel=0.01)
    assert eight["hosts"][0]["least"] == 1
    assert 1e9 < eight["rank_bytes"] < 2e9
    assert eight["max_seq_len"] == 40960
    large = rows["llama3.3-70b"]
    assert large["max_seq_len"] is None
    assert large["hosts"][0]["least"] > 4


def test_the_list_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--memory", "512M"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "licence", "weights", "download", "hosts", "of", "0.512", "GB"]
    (row,) = [line for line in lines if line.startswith("qwen3-0.6b ")]
    *about, hosts = row.split()
    assert about == ["qwen3-0.6b", "Apache-2.0", "0.6", "B", "0.40", "GB"]
    assert int(hosts) > 1
    assert any("llama3_2_1b_instruct_q40" in line for line in lines)


def test_a_download_prints_what_to_run_next(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos = {
        "org/base": FOLDER,
        "org/gguf": {"m-Q8_0.gguf": b"x"},
        "org/dl": {"dllama_model_q40.m": b"m", "dllama_tokenizer.t": b"t"},
        models()["qwen3-0.6b"].gguf: {"Qwen3-0.6B-Q4_K_M.gguf": b"y"},
    }
    said = []
    for name in ("org/base", "org/gguf", "org/dl", "qwen3_0.6b_q40"):
        assert main(["download", name]) == 0
        said.append(capsys.readouterr().out)
    base, gguf, own, named = said
    assert base == f"{PYTHON} -m dllama_mpi --model org/base --prompt 'Once upon a time'\n"
    assert gguf == f"{PYTHON} -m dllama_mpi chat --model org/gguf:Q8_0\n"
    assert own.rstrip().endswith("dllama_tokenizer.t")
    assert "/dllama_model_q40.m --tokenizer /" in own
    assert named.endswith("chat --model qwen3_0.6b_q40\n")


def test_models_of_this_disk(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "--list-local"]) == 0
    assert capsys.readouterr().out.startswith("no models in ")
    hub.repos = {"org/gguf": {"m-Q4_K_M.gguf": b"x" * 5000, "m-Q8_0.gguf": b"y" * 9000}}
    for name in ("org/gguf", "org/gguf:Q8_0"):
        assert main(["download", name]) == 0
    capsys.readouterr()
    assert main(["download", "--list-local"]) == 0
    _, _, first, second, last = capsys.readouterr().out.splitlines()
    assert first.split()[:4] == ["org/gguf:Q4_K_M", "5.0", "kB", "whole"]
    assert second.endswith("/m-Q8_0.gguf")
    assert last.startswith("2 in ")
    assert main(["remove", "org/gguf:Q4_K_M"]) == 0
    assert "removed, 5.0 kB freed" in capsys.readouterr().err
    assert main(["download", "--remove", "org/gguf"]) == 0
    assert main(["download", "--list-local", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []


def test_what_cannot_be_run_is_not_downloaded(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.repos = {"org/other": {**FOLDER, "config.json": b'{"model_type": "mamba"}'}}
    assert main(["download", "org/other"]) == 2
    assert "model_type 'mamba' is not supported" in capsys.readouterr().err
    assert hub.contents() == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ["qwen3-9b"],
            "error: qwen3-9b: not a name that download lists, nor ORG/NAME of the hub (did you mean qwen3-8b?)",
        ),
        (["--memory", "much"], "'much' is not an amount of memory, such as 8G or 512M"),
        (["--memory", "-1G"], "--memory"),
        (["org/x", "--list-local"], "error: NAME, --list-local and --remove: give one of them"),
        (["--remove", "org/none"], "error: org/none: not on this disk"),
    ],
)
def test_mistakes(args: list[str], expected: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = main(["download", *args])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    (line,) = err.splitlines()
    assert expected in line
