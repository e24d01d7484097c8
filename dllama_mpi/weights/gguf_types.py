"""The types of tensors in GGUF files: how many columns a block has, how many bytes, and which tile format keeps it."""

from __future__ import annotations

from dataclasses import dataclass

from ..kernels.layout import FORMATS, TileFormat

_PLAIN = ("F32", "F16", "BF16")
# Their blocks are read by compiled code; `gguf`'s package reads the others.
_COMPILED = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
_SAME = {
    "Q4_0": "q40", "Q5_0": "q80", "Q8_0": "q80", "IQ4_NL": "iq4nl", "IQ4_XS": "iq4nl", "MXFP4": "mxfp4", "Q4_1": "q4m",
    "Q4_K": "q4m",
}  # fmt: skip
_FEW_BITS = 4.0  # up to so many a weight, q4m keeps enough of it


@dataclass(frozen=True)
class BlockType:
    """A type of tensor.

    Attributes:
        number: ggml's. columns, size: of a block; size in bytes.
    """

    number: int
    name: str
    columns: int
    size: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / self.columns

    @property
    def is_plain(self) -> bool:
        """Whether it holds floating-point numbers one by one."""
        return self.name in _PLAIN

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code reads it."""
        return self.name in _COMPILED

    @property
    def format(self) -> TileFormat | None:
        """The tile format that keeps it best; None for plain numbers."""
        if self.is_plain:
            return None
        return FORMATS[_SAME.get(self.name, "q4m" if self.bits <= _FEW_BITS else "q80")]


TYPES: dict[int, BlockType] = {
    number: BlockType(number, name, columns, size)
    for number, name, columns, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136), (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
    )
}  # fmt: skip
BY_NAME = {kind.name: kind for kind in TYPES.values()}
