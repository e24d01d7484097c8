"""Every instruction set's kernels: run where this machine can, read as assembly where it cannot.

The machine code is made for the oldest processor that has an instruction set, so that nothing newer helps it out.
"""

from __future__ import annotations

import re

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir
from numba import config

from dllama_mpi.errors import UsageError
from dllama_mpi.kernels import runtime
from dllama_mpi.kernels.layout import BLOCK, FORMATS, ROWS, aligned_empty
from dllama_mpi.kernels.matmul import KERNELS, described
from dllama_mpi.kernels.simd import EMITTERS
from tests import naive_formats, naive_products
from tests.naive_numbers import Floats
from tests.tiers import QUICK_FORMATS, all_but
from tests.unit import vector_code
from tests.unit.other_process import run_with
from tests.unit.vector_code import HOST, Compiled

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
ON_ARM = HOST.startswith(("aarch64", "arm64"))
OLDEST = "cortex-a72" if ON_ARM else "haswell"
TOKENS = (1, 2, 3, 5, 8, 15)  # every combination of the groups that kernels work in
PROCESSORS = (
    ("avx512vnni", "icelake-server", X86),
    ("avx2vnni", "alderlake", X86),
    ("avx2", "haswell", X86),
    ("generic", "haswell", X86),
    ("generic", "ivybridge", X86),
    ("neondot", "cortex-a76", ARM),
    ("neon", "cortex-a72", ARM),
    ("generic", "cortex-a72", ARM),
)

every_isa = pytest.mark.parametrize("isa", EMITTERS)
every_processor = pytest.mark.parametrize(("isa", "cpu", "triple"), PROCESSORS)
every_processor_of_this_kind = pytest.mark.parametrize(
    ("isa", "cpu"), [(isa, cpu) for isa, cpu, triple in PROCESSORS if (triple == ARM) == ON_ARM]
)
every_format_by_tier = pytest.mark.parametrize("fmt", all_but(QUICK_FORMATS, FORMATS))
every_kernel_by_tier = pytest.mark.parametrize("fmt", all_but(QUICK_FORMATS, [fmt.name for fmt in KERNELS.values()]))


def needs(isa: str) -> None:
    """Skip unless this machine can run an instruction set."""
    if isa not in runtime.host_isas():
        pytest.skip(f"this processor offers {', '.join(runtime.host_isas())}, not {isa}")


def compiled_for(module: ir.Module, cpu: str, triple: str) -> str:
    """Return a module's assembly, or skip where this LLVM cannot make it."""
    try:
        llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(str(error))
    return vector_code.assembly(module, cpu, triple)


def assembly(isa: str, cpu: str, triple: str, fmt: str) -> str:
    """Return a kernel's assembly, or skip where this LLVM cannot make it."""
    return compiled_for(vector_code.kernel(EMITTERS[isa], fmt), cpu, triple)


def random(seed: int, *shape: int) -> Floats:
    """Return normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def matmul(kernel: Compiled, matrix: Floats, fmt: str, x: Floats) -> Floats:
    """Return x @ matrix^T (tokens, rows) by a compiled kernel."""
    tiles = aligned_empty(FORMATS[fmt].shape(*matrix.shape))
    tiles[:] = naive_formats.pack(matrix, fmt)
    scales = (
        naive_formats.row_scales(naive_formats.padded(matrix, ROWS, 1), fmt) if FORMATS[fmt].has_row_scales else None
    )
    m = described(FORMATS[fmt], tiles, scales)
    x = naive_formats.padded(x, 1, BLOCK)
    codes, x_scales, offsets = naive_products.quantise_activations(x)
    inputs = x, codes.astype(np.int8), x_scales, offsets.astype(np.int32)
    y = np.full((len(x), ROWS * len(tiles) + 3), np.nan, np.float32)
    addresses = [a.ctypes.data for a in inputs]
    for first, last in ((0, 1), (1, len(tiles))):
        kernel(m.ctypes.data, first, last, *addresses, tiles.shape[1], len(x), y.ctypes.data, y.strides[0])
    assert np.isnan(y[:, -3:]).all()
    assert not y[:, len(matrix) : -3].any()
    return y[:, : len(matrix)]


def largest(rng: np.random.Generator, rows: int, cols: int, choices: list[float]) -> Floats:
    """Return blocks of the largest codes a format has, in runs of the same sign, where sums are largest."""
    values = rng.choice(np.array(choices, np.float32), (rows, -(-cols // BLOCK)))
    values = np.repeat(values, BLOCK, axis=1)[:, :cols]
    values[:, ::BLOCK] = choices[0]
    return values


def check_kernel(kernel: Compiled, fmt: str, tokens: int) -> None:
    """Check a kernel's products, plain, of extreme scales and of extreme codes, bit for bit."""
    rng = np.random.default_rng(1)
    for rows, cols in ((1, 1), (16, 32), (17, 33), (40, 160)):
        scales = (10.0 ** rng.uniform(-25, 4, (rows, 1))).astype(np.float32)
        for matrix, x in (
            (random(1, rows, cols), random(2, tokens, cols)),
            (random(3, rows, cols) * scales, random(4, tokens, cols) * scales[0]),
            (largest(rng, rows, cols, [-8, 7]), largest(rng, tokens, cols, [127, -127])),
            (largest(rng, rows, cols, [127, -127]), largest(rng, tokens, cols, [-127, 127])),
            (np.zeros((rows, cols), np.float32), random(5, tokens, cols)),
            (random(6, rows, cols), np.zeros((tokens, cols), np.float32)),
        ):
            np.testing.assert_array_equal(matmul(kernel, matrix, fmt, x), naive_products.matmul(matrix, fmt, x))


@every_format_by_tier
@every_processor_of_this_kind
def test_kernel(isa: str, cpu: str, fmt: str) -> None:
    needs(isa)
    kernel = Compiled(vector_code.kernel(EMITTERS[isa], fmt), cpu)
    for tokens in TOKENS:
        check_kernel(kernel, fmt, tokens)


@pytest.mark.parametrize("fmt", all_but(["q4m"], ["q40", "q4m", "iq4nl", "mxfp4", "q80"]))
@pytest.mark.parametrize("isa", [isa for isa in EMITTERS if isa not in runtime.host_isas()])
def test_kernel_of_another_processor(isa: str, fmt: str) -> None:
    """All that an emitter does with its processors' own instructions written out as plain IR."""
    kernel = Compiled(vector_code.kernel(vector_code.emulating(EMITTERS[isa]), fmt), OLDEST)
    for tokens in TOKENS:
        check_kernel(kernel, fmt, tokens)


@every_isa
def test_what_only_some_processors_have_is_emulated(isa: str) -> None:
    for fmt in FORMATS:
        module = str(vector_code.kernel(vector_code.emulating(EMITTERS[isa]), fmt))
        assert not re.search(r'declare [^@]*@"?llvm\.(x86|aarch64)', module), fmt


@every_format_by_tier
@every_isa
def test_rounding(isa: str, fmt: str) -> None:
    """Packing a row of tiles and unpacking it."""
    emitter = EMITTERS[isa] if isa in runtime.host_isas() else vector_code.emulating(EMITTERS[isa])
    pack, unpack = (Compiled(vector_code.rounding(emitter, fmt, packing), OLDEST) for packing in (True, False))
    matrix, scales = random(1, ROWS, 96), np.zeros(0, np.float32)
    matrix[3], matrix[:, 40:64] = 0, matrix[:, 40:64] * 100
    if FORMATS[fmt].has_row_scales:
        scales = naive_formats.row_scales(matrix, fmt)
    tiles = np.full(FORMATS[fmt].shape(ROWS, 96), 99, np.uint8)
    pack(matrix.ctypes.data, matrix.strides[0], tiles.ctypes.data, 3, scales.ctypes.data)
    np.testing.assert_array_equal(tiles, naive_formats.pack(matrix, fmt))
    got = np.full((ROWS, 97), np.nan, np.float32)
    unpack(got.ctypes.data, got.strides[0], tiles.ctypes.data, 3, scales.ctypes.data)
    np.testing.assert_array_equal(got[:, :96], naive_formats.as_stored(matrix, fmt))
    assert np.isnan(got[:, 96]).all()


@pytest.mark.parametrize("fmt", all_but(QUICK_FORMATS, ["q40", "q4m", "iq4nl", "f16"]))
@every_processor
def test_rounding_calls_no_library(isa: str, cpu: str, triple: str, fmt: str) -> None:
    for packing in (True, False):
        code = compiled_for(vector_code.rounding(EMITTERS[isa], fmt, packing), cpu, triple)
        assert cpu == "ivybridge" or not re.search(r"\t(callq?|bl)\t", code)


@every_kernel_by_tier
@every_processor_of_this_kind
def test_no_tiles_give_zeros(isa: str, cpu: str, fmt: str) -> None:
    needs(isa)
    kernel = Compiled(vector_code.kernel(EMITTERS[isa], fmt), cpu)
    assert not matmul(kernel, np.zeros((5, 0), np.float32), fmt, np.zeros((8, 0), np.float32)).any()


@every_processor_of_this_kind
def test_dot4(isa: str, cpu: str) -> None:
    needs(isa)
    kernel = Compiled(vector_code.dot4(EMITTERS[isa], ROWS), cpu)
    rng = np.random.default_rng(1)
    for weights in (rng.integers(0, 128, 64), np.full(64, 127), np.zeros(64, int)):
        for x in (rng.integers(-127, 128, 64), np.full(64, 127), np.full(64, -127)):
            total = rng.integers(-(10**6), 10**6, ROWS).astype(np.int32)
            ref = total + (weights * x).reshape(ROWS, 4).sum(axis=1)
            operands = weights.astype(np.uint8), x.astype(np.int8)
            kernel(total.ctypes.data, *(a.ctypes.data for a in operands))
            np.testing.assert_array_equal(total, ref)


@pytest.mark.parametrize("lanes", [4, 16])
@every_processor_of_this_kind
def test_exp(isa: str, cpu: str, lanes: int) -> None:
    needs(isa)
    x = np.concatenate([np.linspace(-110, 100, 80_000), random(1, 79_984)]).astype(np.float32)
    smallest, most = np.float32(-87.33654), np.float32(88.72283)
    special = [0, -0.0, np.inf, -np.inf, np.nan, smallest, most, -1e30, 1e30, 1e-40, np.nextafter(most, np.float32(99))]
    x = np.concatenate([x, np.array([*special, 1, -1, 0.5, 88, -87], np.float32)])
    y = np.empty_like(x)
    Compiled(vector_code.exp(EMITTERS[isa], lanes), cpu)(x.ctypes.data, y.ctypes.data, x.size // lanes)
    with np.errstate(over="ignore"):
        exact = np.exp(x.astype(np.float64))
        unit = np.spacing(exact.astype(np.float32))
    normal = (x >= smallest) & (x <= most)
    assert (np.abs(y[normal] - exact[normal]) <= unit[normal]).all()
    assert not y[x < smallest].any()
    assert (y[x > most] == np.inf).all()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


@pytest.mark.parametrize("fmt", all_but(["q4m"], ["q40", "q4m", "iq4nl", "q80"]))
@every_processor
def test_instructions(isa: str, cpu: str, triple: str, fmt: str) -> None:
    code = assembly(isa, cpu, triple, fmt)
    products = {
        "avx512vnni": r"vpdpbusd\t.*%zmm",
        "avx2vnni": r"\{vex\}\s+vpdpbusd\t.*%ymm",
        "avx2": r"vpmaddubsw\t.*%ymm",
        "neondot": r"sdot\tv\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]",  # by a lane: no register is spent on copies
        "neon": r"smlal2\tv\d+\.8h, v\d+\.16b, v\d+\.16b",
    }
    for other, pattern in products.items():
        assert bool(re.search(pattern, code)) == (other == isa) or (isa, other) == ("generic", "neon"), other
    if isa == "neon":
        assert "saddlp" in code
        assert "addp" in code
    shuffles = {
        "avx512vnni": r"vpshufb\t.*%zmm",
        "avx2": r"vpshufb\t.*%ymm",
        "neon": r"tbl\tv\d+\.16b, \{ v\d+\.16b \}",
    }
    shuffle = shuffles.get(isa.removesuffix("dot"), shuffles["avx2"])
    if fmt != "q4m":  # LLVM widens its bytes by shuffles on some processors
        assert bool(re.search(shuffle, code)) == (fmt == "iq4nl" and isa != "generic")


@pytest.mark.parametrize("fmt", ["f16", "f32"])
@pytest.mark.parametrize("isa", ["neon", "neondot"])
def test_float_kernels_multiply_by_a_lane_on_arm(isa: str, fmt: str) -> None:
    code = assembly(isa, "cortex-a76" if isa == "neondot" else "cortex-a72", ARM, fmt)
    assert re.search(r"fmla\tv\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]", code)


# --------------------------------------------------------------------------------------------------------------------
# The whole way through Numba, in a process of its own
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # kernels are compiled anew
@pytest.mark.parametrize(("isa", "cpu"), [("avx2vnni", "alderlake"), ("avx2", "haswell")])
def test_older_processors(isa: str, cpu: str) -> None:
    needs(isa)
    settings = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""}
    run_with(isa, "test_products", "check_few_matmuls", settings=settings)


# --------------------------------------------------------------------------------------------------------------------
# Choosing
# --------------------------------------------------------------------------------------------------------------------

ALL_X86 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avxvnni"}


@pytest.mark.parametrize(
    ("has", "said", "name", "features", "offered"),
    [
        (ALL_X86, ALL_X86, None, None, "avx512vnni avx2vnni avx2 generic"),
        (ALL_X86, ALL_X86, "haswell", "", "avx2 generic"),
        (ALL_X86, ALL_X86, "haswell", None, "avx512vnni avx2vnni avx2 generic"),  # Numba adds the host's features
        (ALL_X86, ALL_X86, "haswell", "+avxvnni", "avx2vnni avx2 generic"),
        (ALL_X86, ALL_X86, None, "-avx512f", "avx2vnni avx2 generic"),
        (ALL_X86, ALL_X86, "alderlake", "-avxvnni", "avx2 generic"),
        (ALL_X86, ALL_X86, "unheard-of", "", "generic"),
        (ALL_X86 - {"avxvnni"}, ALL_X86 - {"avxvnni"}, "alderlake", "", "avx2 generic"),
        (ALL_X86 - {"f16c"}, ALL_X86 - {"f16c"}, None, None, "generic"),
        ({"neon", "dotprod"}, {"neon"}, None, None, "neondot neon generic"),
        ({"neon", "dotprod"}, {"neon"}, "cortex-a72", None, "neon generic"),
        ({"neon", "dotprod"}, {"neon"}, "cortex-a72", "+dotprod", "neondot neon generic"),
        ({"neon", "dotprod"}, {"neon"}, "cortex-a76", None, "neondot neon generic"),
        ({"neon"}, {"neon"}, "cortex-a76", None, "neon generic"),
        (set(), set(), None, None, "generic"),
    ],
)
def test_what_a_processor_offers(
    monkeypatch: pytest.MonkeyPatch, has: set[str], said: set[str], name: str, features: str, offered: str
) -> None:
    monkeypatch.setattr(runtime, "_host_features", lambda: (has, said))
    monkeypatch.setattr(config, "CPU_NAME", name)
    monkeypatch.setattr(config, "CPU_FEATURES", features)
    monkeypatch.delenv(runtime.ISA_VARIABLE, raising=False)
    assert " ".join(runtime.host_isas()) == offered
    assert runtime.choose_isa() == offered.split()[0]
    monkeypatch.setenv(runtime.ISA_VARIABLE, "neon" if "avx2" in has else "avx2")
    with pytest.raises(UsageError, match=f"this processor offers {offered.replace(' ', ', ')};"):
        runtime.choose_isa()


def test_every_instruction_set_has_an_emitter() -> None:
    assert tuple(EMITTERS) == runtime.ISAS
    assert set(runtime.host_isas()) <= set(runtime.ISAS)


def test_description() -> None:
    assert runtime.describe().startswith(f"{runtime.ISA} on ")


def test_dot_products_are_allowed_where_llvm_does_not_know_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "CPU_NAME", None)
    monkeypatch.setattr(config, "CPU_FEATURES", None)
    runtime._allow_dot_product()
    assert config.CPU_FEATURES.endswith("+dotprod")  # type: ignore[attr-defined]
    for name, features in ((None, "+neon"), ("cortex-a76", None)):
        monkeypatch.setattr(config, "CPU_NAME", name)
        monkeypatch.setattr(config, "CPU_FEATURES", features)
        runtime._allow_dot_product()
        assert features == config.CPU_FEATURES  # type: ignore[attr-defined]
