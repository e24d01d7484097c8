"""Measure each kernel, weight format and number of tokens against the machine's ceilings: a roofline.

python benchmarks/kernels.py [--shape 8192x2048] [--formats q40,q4m,q80] [--tokens 1,8,64,512] [--plot roofline.png]

A product of weights (rows, cols) with n tokens does rows * cols * n multiply-adds on the bytes of the weights, which
come from memory: several matrices are used in turn. What a kernel can reach is the lesser of the arithmetic's ceiling
and of the memory's bandwidth times the multiply-adds a byte. Attention reads keys and values instead of weights.

The memory's bandwidth may change from minute to minute, so it is measured in turns with each kernel: a kernel's roof
takes the median of the readings between its own runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import roofline
from report import (
    Disturbance,
    add_output_options,
    ceilings,
    finish,
    say_ceilings,
    say_table,
    whole_numbers,
)

from dllama_mpi.kernels import runtime
from dllama_mpi.kernels.attention import Heads, KVLayer, attention
from dllama_mpi.kernels.elementwise import quantise
from dllama_mpi.kernels.layout import BLOCK, FORMATS, PAGE, ROWS, TileFormat, aligned_empty, ceil_div, ceil_to
from dllama_mpi.kernels.matrix import Matrix, activations, expert_of
from dllama_mpi.kernels.probe import ReadProbe
from dllama_mpi.model.buffers import KV_TYPES, Buffers, Maker, Sizes, memory_bytes
from dllama_mpi.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig
from dllama_mpi.model.forward import Step
from dllama_mpi.model.linear import multiply
from dllama_mpi.model.recipe import WeightRecipe
from dllama_mpi.model.rope import RopeConfig
from dllama_mpi.parallel.partition import Shard
from dllama_mpi.progress import progress, show_progress
from dllama_mpi.startup.shares import shards_of
from dllama_mpi.weights.random import RandomTensor
from dllama_mpi.weights.tiles import TileMatrix, matrix_bytes

NO_TURNS = np.zeros((0, 0, 0), np.float32)
MEMORY = 256 << 20  # bytes of weights used in turn: several times the last cache
SECONDS, LEAST_TIMES = 0.8, 7  # how long a case is measured, readings included, and how often at least


@dataclass(frozen=True)
class Case:
    """One kernel on one input. `run` does the work `times` times over, each on other memory.

    Attributes:
        depth: positions before the tokens, of attention. macs: multiply-adds of one time. size: bytes it reads from
            memory. arithmetic: the ceiling's key.
    """

    kernel: str
    format: str
    depth: int
    tokens: int
    macs: float
    size: float
    times: int
    arithmetic: str
    run: Callable[[], None]

    def measure(self, limits: dict[str, Any], memory: ReadProbe) -> dict[str, Any]:
        """Return the figures, beside what the ceilings allow."""
        seconds, readings = self._measure(memory)
        intensity, limit = self.macs / self.size, statistics.median(readings)
        roof = min(limits[self.arithmetic], limit * intensity)
        return {
            "kernel": self.kernel,
            "format": self.format,
            "depth": self.depth,
            "tokens": self.tokens,
            "microseconds": seconds * 1e6,
            "gmac_per_s": self.macs / seconds / 1e9,
            "read_gb_per_s": self.size / seconds / 1e9,
            "read_limit_gb_per_s": limit,
            "best_reading_gb_per_s": max(readings),
            "mac_per_byte": intensity,
            "roof_gmac_per_s": roof,
            "share_of_roof": self.macs / seconds / 1e9 / roof,
        }

    def _measure(self, memory: ReadProbe) -> tuple[float, list[float]]:
        """Return the median seconds of one time, and the memory's rates in GB/s between the runs."""
        self.run()
        samples: list[float] = []
        readings: list[float] = []
        until = time.perf_counter() + SECONDS
        while len(samples) < LEAST_TIMES or time.perf_counter() < until:
            readings.append(memory.size / memory.seconds() / 1e9)
            started = time.perf_counter()
            self.run()
            samples.append(time.perf_counter() - started)
        return statistics.median(samples) / self.times, readings


def matmuls(fmt: TileFormat, rows: int, cols: int, counts: list[int], threads: int) -> Iterator[Case]:
    """Yield the products of a weight format with each number of tokens."""
    most = max(1, MEMORY // matrix_bytes(fmt, (rows, cols)))
    tensor = RandomTensor("weights", "F32", np.broadcast_to(np.float32(0), (most, rows, cols)))
    tiles, scales = tensor.make_tiles(((0, most), (0, rows), (0, cols)), fmt)
    held = TileMatrix(tiles, scales, rows, cols, fmt)
    fields = np.repeat(held.fields()[None], most, 0)
    for e, own in enumerate(fields):
        expert_of(held.fields(), e, own)
    matrices, most_tokens = Matrix(fields), max(counts)
    x = activations(most_tokens, cols, fmt.quantised_activations)
    x.values[:] = np.random.default_rng(0).standard_normal(x.values.shape, np.float32)
    quantise(x, most_tokens, threads)
    out = aligned_empty((most_tokens, ceil_to(rows, ROWS)), np.float32)
    arithmetic = "int8_dot_gmac_per_s" if fmt.quantised_activations else "f32_fma_gmac_per_s"
    for tokens in counts:
        used = max(1, min(most, most * 32 // tokens))  # many tokens: the arithmetic is what counts

        def run(used: int = used, tokens: int = tokens, held: TileMatrix = held) -> None:
            for i in range(used):
                multiply(matrices, i, x, out, tokens, threads)

        yield Case(
            "matmul", fmt.name, 0, tokens, float(rows * cols * tokens), held.nbytes / most, used, arithmetic, run
        )


def attentions(
    kv_type: str, heads: tuple[int, int, int], depths: list[int], counts: list[int], threads: int
) -> Iterator[Case]:
    """Yield the attention of the last tokens of one sequence. heads: of queries, of keys and values; their size."""
    query_heads, kv_heads, dim = heads
    mixer = AttentionConfig(query_heads, kv_heads, dim, RopeConfig("default", dim, 1e4), dim**-0.5)
    feed = MLPConfig(BLOCK)
    config = ModelConfig("llama", ROWS, BLOCK, max(depths) + max(counts), 1e-6, False, (LayerConfig(mixer, feed),))
    (shard,) = shards_of(config, [1.0])
    each = memory_bytes(config, shard, kv_type)[1]
    layers = max(1, MEMORY // (config.max_position_embeddings * each))
    cache = _cache(replace(config, layers=config.layers * layers), shard, kv_type)
    shape = Heads(dim, 0, query_heads, query_heads // kv_heads, 0, dim**-0.5, 0.0)
    rng, none = np.random.default_rng(0), np.zeros(0, np.float32)
    table = np.arange(cache[0].keys.shape[0], dtype=np.int32)[None]
    for depth in depths:
        for tokens in counts:
            queries = rng.standard_normal((tokens, query_heads * dim), np.float32)
            positions = np.arange(depth, depth + tokens, dtype=np.int32)
            zeros, ones = np.zeros(tokens, np.int32), np.ones(tokens, np.float32)
            step = Step(zeros, positions, table, ones, NO_TURNS, NO_TURNS, 0)
            out = np.zeros_like(queries)

            def run(q: np.ndarray = queries, step: Step = step, out: np.ndarray = out) -> None:
                for layer in cache:
                    attention(shape, 0, none, q, layer, step, out, threads)

            seen = float(np.sum(positions + 1.0))
            macs = 2 * seen * query_heads * dim
            size = each * float(depth + tokens)
            yield Case("attention", kv_type, depth, tokens, macs, size, layers, "f32_fma_gmac_per_s", run)


def _cache(config: ModelConfig, shard: Shard, kv_type: str) -> list[KVLayer]:
    """Return the KV cache of each layer, filled with random values."""
    formats, positions = WeightRecipe.parse("q40").formats(config), config.max_position_embeddings
    buffers = Buffers(config, shard, formats, Sizes(1, 1, ceil_div(positions, PAGE), kv_type))
    (run,), rng = buffers.runs, np.random.default_rng(0)
    memory = buffers.memory(run, Maker())
    parts = (memory.keys, memory.key_scales, memory.values, memory.value_scales)  # one layer's pages after the other's
    for part in parts:
        for page in part:
            page[:] = _random(rng, page)
    places = [slice(i * memory.pages, (i + 1) * memory.pages) for i in range(config.num_layers)]
    return [KVLayer(memory.marker, *(part[place] for part in parts)) for place in places]


def _random(rng: np.random.Generator, part: np.ndarray) -> np.ndarray:
    """Return random values for an array of a KV cache: float32, float16 bits or int8 codes."""
    if part.dtype == np.int8:
        return rng.integers(-127, 128, part.shape, np.int8)
    values = rng.standard_normal(part.shape, np.float32)
    return values if part.dtype == np.float32 else values.astype(np.float16).view(np.uint16)


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8192x2048", metavar="ROWSxCOLS", help="of the weights")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="NAME,...")
    parser.add_argument("--heads", default="32x8x64", metavar="QxKVxDIM", help="query heads, KV heads, their size")
    parser.add_argument("--depths", type=whole_numbers, default=[128, 1024, 4096], metavar="N,...", help="of attention")
    parser.add_argument("--kv-types", default=",".join(KV_TYPES), metavar="TYPE,...", help="of the cache of attention")
    parser.add_argument("--attention-tokens", type=whole_numbers, default=[1, 256], metavar="N,...")
    parser.add_argument("--tokens", type=whole_numbers, default=[2**i for i in range(10)], metavar="N,...")
    parser.add_argument("--nthreads", type=int, metavar="N", help="(default: all cores)")
    add_output_options(parser)
    return parser.parse_args()


def every_case(args: argparse.Namespace, threads: int) -> Iterator[Case]:
    """Yield what the options ask for; the memory of one kind is given back before the next is made."""
    rows, cols = (int(part) for part in args.shape.split("x"))
    for name in args.formats.split(","):
        yield from matmuls(FORMATS[name], rows, cols, args.tokens, threads)
    query_heads, kv_heads, head_dim = (int(part) for part in args.heads.split("x"))
    for kv_type in args.kv_types.split(","):
        yield from attentions(kv_type, (query_heads, kv_heads, head_dim), args.depths, args.attention_tokens, threads)


def main() -> None:
    """Print the ceilings, a table and a line of JSON, and draw a picture if asked."""
    args = options()
    threads = args.nthreads or runtime.most_threads()
    limits, noise = ceilings(threads), Disturbance()
    say_ceilings(limits)
    memory = ReadProbe(MEMORY, threads)
    show_progress("auto")
    found = [case.measure(limits, memory) for case in progress(every_case(args, threads), "measuring", True)]
    cells = [
        [
            f"{f['kernel']} {f['format']}" + f" at {f['depth']}" * (f["depth"] > 0),
            str(f["tokens"]),
            f"{f['microseconds']:.0f}",
            f"{f['gmac_per_s']:.1f}",
            f"{f['read_gb_per_s']:.1f}",
            f"{f['read_limit_gb_per_s']:.1f}",
            f"{f['roof_gmac_per_s']:.0f}",
            f"{f['share_of_roof']:.0%}",
        ]
        for f in found
    ]
    say_table(["kernel", "tokens", "µs", "GMAC/s", "GB/s", "memory GB/s", "roof GMAC/s", "share"], cells)
    noise.say()
    about = {"instruction_set": runtime.ISA, "shape": args.shape, "heads": args.heads}
    others = {"ceilings": limits, "others_cpu_share": noise.share()}
    report = {"benchmark": "kernels", **about, **others, "results": found}
    if args.plot is not None:
        roofline.draw(report, args.plot)
    finish(report, args.json)


if __name__ == "__main__":
    main()
