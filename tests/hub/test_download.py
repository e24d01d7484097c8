"""Downloading with the hub's real library from a hub on this machine, as `download` and --model do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from dllama_mpi.errors import ModelError
from dllama_mpi.hub import local, remote
from dllama_mpi.hub.names import Name
from dllama_mpi.hub.progress import Downloading
from dllama_mpi.hub.refusals import told
from dllama_mpi.startup.opening import DEMO
from tests.hub.small_hub import Hub

WEIGHTS = bytes(range(256)) * 9000  # 2.3 MB: three chunks
FOLDER = {
    "config.json": (DEMO / "config.json").read_bytes(),
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "README.md": b"# a model",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
    "onnx/model.onnx": b"never",
}
Usage = namedtuple("Usage", "total used free")


def get(name: str, quiet: bool = True) -> Path:
    """Download a model and return where it lies."""
    repo, _, what = name.partition(":")
    return remote.Download(Name(repo, what or None), quiet).run()


def refusal(name: str) -> str:
    """Return what is said when a model cannot be downloaded: one line."""
    with pytest.raises(ModelError) as caught:
        get(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_has_what_is_needed_and_is_downloaded_once(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/model"] = FOLDER
    folder = get("org/model", quiet=False)
    wanted = {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    out, err = capfd.readouterr()
    first, last = err.splitlines()
    assert first.startswith("downloading org/model: 4 files, 2.3 MB, to ")
    assert last.startswith("downloading org/model: 2.3 MB in ")
    assert out == ""
    requests = len(hub.asked)
    found = local.find(Name("org/model"))
    assert found is not None
    assert local.Stored.of("org/model").snapshot(found[0]) == folder
    assert len(hub.asked) == requests
    assert get("org/model", quiet=False) == folder
    assert len(hub.contents()) == 1
    assert capfd.readouterr().err == ""


def test_the_hubs_own_library_finds_it_too(hub: Hub) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    hub.repos["org/model"] = FOLDER
    folder = get("org/model")
    assert Path(hf_hub_download("org/model", "model.safetensors", local_files_only=True)).parent == folder
    (repo,) = scan_cache_dir().repos
    assert (repo.repo_id, repo.nb_files) == ("org/model", 4)


def test_shards_are_those_that_the_index_names(hub: Hub) -> None:
    index = {"weight_map": {"a": "part-a.safetensors", "b": "part-b.safetensors"}}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    files |= {f"part-{x}.safetensors": x.encode() * 1000 for x in "abc"}
    hub.repos["org/shards"] = {**files, "model.fp16.index.json": b"{}"}
    folder = get("org/shards")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "model.safetensors.index.json", "part-a.safetensors", "part-b.safetensors",
    ]  # fmt: skip
    (folder / "part-b.safetensors").unlink()
    assert local.find(Name("org/shards")) is None
    get("org/shards")
    assert local.find(Name("org/shards")) is not None


def test_of_gguf_one_quantisation_comes(hub: Hub) -> None:
    hub.repos["org/gguf"] = {f"m-{kind}.gguf": kind.encode() * 100 for kind in ("Q4_K_M", "Q8_0", "F16")}
    assert get("org/gguf").name == "m-Q4_K_M.gguf"
    assert get("org/gguf:q8_0").name == "m-Q8_0.gguf"
    assert len(hub.contents()) == 2
    assert "choose one: F16 (0.0 MB), Q8_0 (0.0 MB), Q4_K_M" in refusal("org/gguf:Q5_0")


# ---- cuts, and what came


def test_a_cut_is_gone_on_from(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/model"], hub.cuts = FOLDER, [1_500_000]
    folder = get("org/model", quiet=False)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    first, second = hub.contents()
    assert "range" not in first.headers
    begin = int(second.headers["range"].removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= 1_500_000
    assert "going on in 0 s" in capfd.readouterr().err


def test_another_process_goes_on_where_one_gave_up(hub: Hub) -> None:
    hub.repos["org/model"], hub.cuts = FOLDER, [1_200_000, 0, 0, 0]
    said = refusal("org/model")
    assert said.startswith("org/model: ")
    assert "what has come is kept" in said
    (entry,) = local.held()
    assert (entry.name, entry.is_whole) == ("org/model", False)
    assert local.find(Name("org/model")) is None
    begun = len(hub.contents())
    program = "import sys; from dllama_mpi.cli import main; sys.exit(main(['download', 'org/model']))"
    cache = str(local.hub_folder())
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "HF_HUB_CACHE": cache}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 files of it were here, and not damaged" in done.stderr
    assert done.stdout == f"{Path(sys.executable).name} -m dllama_mpi chat --model org/model\n"
    assert " of them from before, to " in done.stderr
    (last,) = hub.contents()[begun:]
    assert int(last.headers["range"].removeprefix("bytes=").removesuffix("-")) >= 1_000_000
    assert local.find(Name("org/model")) is not None


def test_a_server_without_ranges_is_asked_for_all_of_it(hub: Hub) -> None:
    hub.repos["org/model"], hub.cuts, hub.no_ranges = FOLDER, [1_500_000], True
    assert (get("org/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_what_is_damaged_is_not_kept(hub: Hub) -> None:
    hub.repos["org/model"] = FOLDER
    hub.wrong = {"tokenizer.json": b"[]"}
    assert "tokenizer.json: its digest is not the hub's" in refusal("org/model")
    hub.wrong = {"model.safetensors": WEIGHTS[:-1] + b"!"}
    assert "model.safetensors: its sha256 is" in refusal("org/model")
    assert list(local.Stored.of("org/model").blobs.glob("*dllama_mpi*")) == []
    hub.wrong = {"model.safetensors": WEIGHTS + b"!"}
    assert "more comes than the 2304000 bytes" in refusal("org/model")
    hub.wrong = {}
    folder = get("org/model")
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    blob = (folder / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"?")
    download = remote.Download(Name("org/model"), True)
    download.run()
    with pytest.raises(ModelError, match=r"model\.safetensors: its digest is not the hub's; it has been removed"):
        download.check()
    assert (get("org/model") / "model.safetensors").read_bytes() == WEIGHTS


def test_two_downloads_at_once_bring_it_once(hub: Hub) -> None:
    hub.repos["org/model"] = FOLDER
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get("org/model"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 2
    assert len(hub.contents()) == 1


# ---- refusals


def test_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos = {"org/open": FOLDER, "org/gated": FOLDER, "org/private": FOLDER}
    hub.gated, hub.private = {"org/gated"}, {"org/private"}
    assert "gated (401): accept its conditions" in refusal("org/gated")
    for name in ("org/private", "org/none"):
        said = refusal(name)
        assert "the hub has no such public model (401)" in said
        assert "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub refuses your token (401)" in refusal("org/open")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert "gated (403): accept its conditions" in refusal("org/gated")
    assert "the hub has no such model (404)" in refusal("org/none")
    assert get("org/private").is_dir()
    assert all("authorization" not in each.headers for each in hub.contents())  # the token is for the hub alone
    monkeypatch.delenv("HF_TOKEN")
    from huggingface_hub import constants

    Path(constants.HF_TOKEN_PATH).write_text(hub.token)
    assert get("org/private").is_dir()


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry-After": "7"}, "too many requests (429); try again in 7 s"),
        (429, {"RateLimit": '"api";r=0;t=31'}, "too many requests (429); try again in 31 s"),
        (503, {}, "is out of order (503); try again later"),
        (403, {"X-Error-Message": "no downloads here"}, "the hub refuses it (403: no downloads here)"),
    ],
)
def test_the_hub_refuses(hub: Hub, status: int, headers: dict[str, str], expected: str) -> None:
    hub.repos["org/model"], hub.statuses = FOLDER, {"/api/models/": [(status, headers)]}
    assert expected in refusal("org/model")


def test_contents_are_waited_for_as_long_as_is_reasonable(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    hub.repos["org/model"] = FOLDER
    hub.statuses = {"/cdn/": [(429, {"Retry-After": "0"}), (500, {})]}
    get("org/model", quiet=False)
    assert "the hub asks to wait; going on in 0 s" in capfd.readouterr().err
    hub.repos["org/other"] = {**FOLDER, "model.safetensors": b"x" * 100}
    hub.statuses = {"/cdn/": [(429, {"Retry-After": "3600"})]}
    assert "too many requests (429); try again in 3600 s" in refusal("org/other")
    hub.statuses = {"/cdn/": [(500, {})] * 3}
    assert "is out of order (500)" in refusal("org/other")


def test_what_is_no_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.statuses = {"/api/models/": [(200, {})]}
    assert "does not answer as a hub does" in refusal("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in refusal("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode (HF_HUB_OFFLINE)" in refusal("org/model")


def test_a_path_of_the_hub_does_not_leave_its_folder(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "x-Q4_K_M.gguf").write_bytes(b"mine")
    hub.repos["org/evil"] = {"../../../../x-Q4_K_M.gguf": b"theirs", "/x-Q8_0.gguf": b"theirs"}
    assert "has no GGUF files" in refusal("org/evil:Q4_K_M")
    assert (tmp_path / "x-Q4_K_M.gguf").read_bytes() == b"mine"
    hub.commit = "../.."
    assert "tells no commit" in refusal("org/evil")


# ---- the disk


def test_there_must_be_room(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/gguf"] = {"m-Q4_K_M.gguf": WEIGHTS}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 2_000_000))
    said = refusal("org/gguf")
    assert said.startswith("org/gguf:Q4_K_M needs 2.3 MB on the disk of ")
    assert "2.0 MB are free: make room" in said
    assert "name a smaller quantisation" in said
    assert hub.contents() == []


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))
        hub.repos["org/model"] = FOLDER
        assert "the disk is full" in refusal("org/model")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            PermissionError(13, "Permission denied", "/there"),
            "x: /there may not be written (Permission denied); set HF_HOME",
        ),
        (OSError(30, "Read-only file system", "/there"), "x: /there may not be written (Read-only file system)"),
        (NotADirectoryError(20, "Not a directory", "/there"), "x: /there: Not a directory"),
    ],
)
def test_the_disk_refuses(error: OSError, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="x: ") as caught, told("x", tmp_path):
        raise error
    assert str(caught.value).startswith(expected)


def test_faults_of_the_program_are_not_called_refusals(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), told("x", tmp_path):
        raise ZeroDivisionError


def test_what_is_here_is_listed_and_removed(hub: Hub) -> None:
    hub.repos = {"org/gguf": {"m-Q4_K_M.gguf": b"a" * 50, "m-Q8_0.gguf": b"b" * 70}, "org/model": FOLDER}
    for name in ("org/gguf", "org/gguf:Q8_0", "org/model"):
        get(name)
    held = {each.name: each for each in local.held()}
    assert {name: each.is_whole for name, each in held.items()} == dict.fromkeys(
        ("org/gguf:Q4_K_M", "org/gguf:Q8_0", "org/model"), True
    )
    assert held["org/gguf:Q8_0"].size == 70
    assert held["org/gguf:Q8_0"].path.read_bytes() == b"b" * 70
    assert local.remove(Name("org/gguf", "Q8_0")) == 70
    assert {each.name for each in local.held()} == {"org/gguf:Q4_K_M", "org/model"}
    local.remove(Name("org/gguf", "Q4_K_M"))
    assert local.remove(Name("org/model")) > len(WEIGHTS)
    assert local.held() == []
    with pytest.raises(ModelError, match="org/model: not on this disk"):
        local.remove(Name("org/model"))


def test_what_came_is_told_at_the_end(capfd: pytest.CaptureFixture[str]) -> None:
    with Downloading("downloading x", 4_000_000_000, 1_000_000_000) as shown:
        shown.add(1_000_000_000)
    assert capfd.readouterr().err == "downloading x: 2.00 GB in 0 s\n"


def test_what_is_too_large_for_one_answer_comes_in_the_hubs_own_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.repos["org/model"] = FOLDER
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", len(WEIGHTS) - 1)
    assert "model.safetensors: The file is too large" in refusal("org/model")  # this hub has no other way
    assert hub.contents() == []
