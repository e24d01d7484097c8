"""Predict decode and prefill on 1 to 8 Raspberry Pi 4 and 5, beside what was published of other programs on them.

python benchmarks/predict_pis.py            # print it
python benchmarks/predict_pis.py --write    # and put it into RESULTS.md

Nothing is measured: clusters/*.toml say what is assumed of boards and network, published.toml what others measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import marked
from report import finish

from dllama_mpi.model.recipe import DEFAULT, WeightRecipe
from dllama_mpi.parallel.partition import Shard
from dllama_mpi.planning.cluster_file import read_cluster
from dllama_mpi.planning.costs import Cluster, Work, chunks, decode_cost, payload_bytes, prefill_cost, work_of
from dllama_mpi.planning.plan import Question
from dllama_mpi.startup.opening import model_config
from dllama_mpi.startup.options import Kept
from dllama_mpi.startup.shares import shards_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
MODELS = {"llama3.2-3b": "Llama-3.2-3B", "llama3.1-8b": "Llama-3.1-8B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
SIZES = {"raspberry-pi-4": (4, 8), "raspberry-pi-5": (4, 8, 16)}  # GB that boards are sold with
SYSTEM_GB = 0.5  # of them that the system and Python take
COUNTS = (1, 2, 4, 8)
POSITIONS, PROMPT, GENERATED = 4096, 512, 128


def clusters() -> dict[str, list[Cluster]]:
    """Return what is assumed of each board: at low and at high rates."""
    return {
        board: [read_cluster(str(HERE / "clusters" / f"{board}-{end}.toml")) for end in ("low", "high")]
        for board in SIZES
    }


def assumptions(known: dict[str, list[Cluster]]) -> str:
    """Return what is assumed as a table."""
    every = [cluster for both in known.values() for cluster in both]
    speeds, links = [c.speeds[0][0] for c in every], [next(iter(c.network.links.values())) for c in every]
    lines = {
        "decode goes through weights, GB/s": [f"{s.decode / 1e9:.1f}" for s in speeds],
        "prefill, 10^9 multiply-adds a second": [f"{(s.prefill or 0.0) / 1e9:.1f}" for s in speeds],
        "a layer besides its weights, us a token": [f"{1e6 * s.layer_seconds:.0f}" for s in speeds],
        "a message besides its bytes, us": [f"{1e6 * link.latency:.0f}" for link in links],
        "a link, Mbit/s": [f"{8e-6 * link.bytes_per_second:.0f}" for link in links],
    }
    head = ["assumed", "Pi 4, first figure", "Pi 4, second", "Pi 5, first figure", "Pi 5, second"]
    return marked.markdown(head, [[line, *cells] for line, cells in lines.items()])


def question_of(shape: str) -> Question:
    """Return what is predicted for: a model as the program keeps it unless told otherwise."""
    config = model_config(f"random:{shape}")
    kept = Kept.of(WeightRecipe.parse(DEFAULT).formats(config))
    return Question(config, kept, max_seq_len=POSITIONS, prompt=PROMPT, generated=GENERATED)


def shards(question: Question, hosts: int) -> list[Shard]:
    """Return the equal shares of so many hosts, of those that are of the same size but one."""
    unlike: dict[tuple[int, ...], Shard] = {}
    for shard in shards_of(question.config, [1.0] * hosts):
        unlike.setdefault(tuple(last - first for first, last in shard.ranges.values()), shard)
    return list(unlike.values())


def tokens_per_second(question: Question, works: list[Work], cluster: Cluster, hosts: int) -> tuple[float, float]:
    """Return the speeds of decode and prefill that `plan` predicts of so many hosts of a cluster, all alike."""
    rates = [cluster.speeds[0][0]] * len(works)

    def all_reduce(tokens: int) -> float:
        return cluster.all_reduces.seconds(hosts, payload_bytes(question.config, tokens, question.kept.payload))

    decode = decode_cost(works, rates, (0, GENERATED), all_reduce(1))
    prefill = prefill_cost(works, rates, chunks(0, PROMPT, question.chunk), all_reduce)
    return 1 / decode.total, PROMPT / prefill.total if prefill else 0.0


def predictions(shape: str) -> list[dict[str, Any]]:
    """Return what is predicted of a model: a record for each board and number of hosts."""
    question, known, found = question_of(shape), clusters(), []
    for hosts in COUNTS:
        parts, names = shards(question, hosts), [f"pi{i}" for i in range(hosts)]
        works = [work_of(question.config, part, question.kept.formats, question.kept.kv_type) for part in parts]
        needed = max(sum(question.memory.parts(part, names, POSITIONS).values()) for part in parts) / 1e9
        for board, sizes in SIZES.items():
            low, high = (tokens_per_second(question, works, cluster, hosts) for cluster in known[board])
            found.append(
                {
                    "model": shape,
                    "board": board,
                    "hosts": hosts,
                    "needed_gb": needed,
                    "least_board_gb": next((size for size in sizes if needed <= size - SYSTEM_GB), None),
                    "decode_tokens_per_second": [low[0], high[0]],
                    "prefill_tokens_per_second": [low[1], high[1]],
                    "read_gb_per_token_of_a_host": max(work.read() + work.head_size for work in works) / 1e9,
                }
            )
    return found


def speeds(record: dict[str, Any], phase: str) -> str:
    """Return a cell: what is predicted from low and from high rates, or nothing where the model does not fit."""
    low, high = record[f"{phase}_tokens_per_second"]
    return "-" if record["least_board_gb"] is None else f"{low:.1f} to {high:.1f}"


def table(records: list[dict[str, Any]]) -> str:
    """Return the predictions of one model as a table, both boards beside each other."""
    head = ["hosts", "GB a host"]
    for number in (4, 5):
        head += [f"Pi {number} needed", f"Pi {number} decode", f"Pi {number} prefill"]
    rows = []
    for hosts in COUNTS:
        boards = [record for record in records if record["hosts"] == hosts]
        row = [str(hosts), f"{boards[0]['needed_gb']:.1f}"]
        for record in boards:
            least = record["least_board_gb"]
            row += [
                "fits none" if least is None else f"{least} GB",
                speeds(record, "decode"),
                speeds(record, "prefill"),
            ]
        rows.append(row)
    return marked.markdown(head, rows)


def published() -> list[dict[str, Any]]:
    """Return the figures of other programs."""
    found: list[dict[str, Any]] = tomllib.loads((HERE / "published.toml").read_text(encoding="utf-8"))["figures"]
    return found


def published_table(figures: list[dict[str, Any]]) -> str:
    """Return figures of other programs as a table."""
    head = ["other program", "board", "hosts", "decode", "prefill", "published"]
    rows = [
        [f["program"], f["board"], str(f["hosts"]), f"{f['decode']:.2f}",
         f"{f['prefill']:.2f}" if "prefill" in f else "-", f"[{f['date']}]({f['source']})"]
        for f in figures
    ]  # fmt: skip
    return marked.markdown(head, rows, left=2)


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return all of it as Markdown."""
    parts = [assumptions(clusters())]
    for shape, name in MODELS.items():
        others = [figure for figure in published() if figure["model"] == shape]
        read = found[shape][0]["read_gb_per_token_of_a_host"]
        about = f"never measured; weights in {DEFAULT}, of which a token reads {read:.2f} GB"
        parts.append(
            f"### {name}\n\n**Predicted for this program**, {about}:\n\n{table(found[shape])}\n"
            f"**Published of other programs**, measured by others:\n\n{published_table(others)}"
        )
    return "\n".join(parts)


def main() -> None:
    """Print the tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument("--write", action="store_true", help="also write the tables into RESULTS.md and results/")
    args = parser.parse_args()
    found = {shape: predictions(shape) for shape in MODELS}
    text = report(found)
    print(text)
    whole = {"benchmark": "predict_pis", "predictions": found, "published": published()}
    if args.write:
        marked.write(HERE / "RESULTS.md", "predictions", text)
        (HERE / "results" / "predictions.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    finish(whole, args.json)


if __name__ == "__main__":
    main()
