"""--model ORG/NAME and `download` on real ranks: the root downloads once, and what it is refused ends every rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dllama_mpi.startup.opening import DEMO
from tests.hub.small_hub import Hub, serving
from tests.mpi.launch import Done, launcher, launcher_options, mpiexec, run

NAMES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
GENERATE = ["--prompt", "Return the", "--steps", "12", "--temperature", "0", "--cache-dir", "none"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A hub that has the demo model."""
    with serving(Hub({"org/demo": {name: (DEMO / name).read_bytes() for name in NAMES}})) as served:
        yield served


def on_hosts(folders: list[Path], args: list[str], **env: str) -> Done:
    """Run the program on one rank a folder, which stands for a host's disk: HF_HOME lies in it."""
    command = [launcher(), *launcher_options()]
    for i, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        command += [":"] * (i > 0) + ["-n", "1", "-wdir", str(folder), sys.executable, "-m", "dllama_mpi", *args]
    return run(command, env={"HF_HOME": "hf", **env})


@pytest.mark.slow
def test_the_root_downloads_and_the_others_receive(hub: Hub, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    done = on_hosts(folders, ["--model", "org/demo", *GENERATE], HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "downloading org/demo: " in done.stderr
    assert "rank 1 on " in done.stderr
    assert "received" in done.stderr
    assert not list(folders[1].rglob("*.safetensors"))
    assert len(hub.contents()) == 1
    asked = len(hub.asked)
    args = ["--model", "org/demo", *GENERATE, "--json"]
    again = on_hosts(folders, args, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["text"] == done.stdout.rstrip("\n")
    assert len(hub.asked) == asked


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--model", "org/none", "--prompt", "x"],
            ("no such public model (401)", "no folder or file org/none here either"),
        ),
        (["download", "org/demo:Q4_K_M"], ("org/demo has no GGUF files",)),
    ],
)
def test_refusals_end_every_rank(args: list[str], words: tuple[str, ...], hub: Hub, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
    done = mpiexec(3, ["-m", "dllama_mpi", *args], env=env, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
