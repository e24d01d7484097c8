"""Which matrix is kept in which format: `--weights q4m`, or rules such as `q4m,lm_head=q80`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UsageError
from ..kernels.layout import FORMATS, MXFP4, TileFormat
from ..parallel.partition import Shard
from ..weights.checkpoint import name_of
from ..weights.slice_tensors import SlicePart
from ..weights.tiles import matrix_bytes
from .config import ModelConfig
from .tensors import Cut, Kind, TensorSpec, part, tensors

DEFAULT = "q4m"
# Small matrices whose outputs decide about much: routers, gates, decays. Rules may name them all the same.
_SENSITIVE = ("router", "shared_gate", "delta_a", "delta_b")
ROLES = (
    "q", "k", "v", "o", "attention_gate", "gate", "up", "down", "lm_head", "router",
    "expert_gate", "expert_up", "expert_down", "shared_gate_proj", "shared_up", "shared_down", "shared_gate",
    "delta_q", "delta_k", "delta_v", "delta_z", "delta_a", "delta_b", "conv_b", "conv_c", "conv_x",
)  # fmt: skip
GROUPS = {
    "attention": ("q", "k", "v", "o", "attention_gate"),
    "mlp": ("gate", "up", "down", "shared_gate_proj", "shared_up", "shared_down"),
    "experts": ("expert_gate", "expert_up", "expert_down"),
    "delta": ("delta_q", "delta_k", "delta_v", "delta_z"),
    "conv": ("conv_b", "conv_c", "conv_x"),
}


@dataclass(frozen=True)
class WeightRecipe:
    """The formats of a model's matrices.

    Rounding a matrix of 4 bits to another format of 4 bits costs accuracy and gains nothing. So a matrix that is
    published in MXFP4 stays in it under a base of as few bits; a base of more bits, or a rule that names the matrix,
    counts. f32 and f16 then hold the published values exactly.

    Attributes:
        base: of all that no rule names. rules: (role, format), later ones first.
    """

    base: TileFormat
    rules: tuple[tuple[str, TileFormat], ...] = ()

    @classmethod
    def parse(cls, text: str) -> WeightRecipe:
        """Read a recipe: a format, then rules ROLE=FORMAT, separated by commas.

        Raises:
            UsageError: naming what cannot be.
        """
        base, *rules = text.split(",")
        found: list[tuple[str, TileFormat]] = []
        for rule in rules:
            role, _, name = rule.partition("=")
            if role not in (*ROLES, *GROUPS):
                raise UsageError(f"--weights {text}: no matrix is called {role!r}; known are {', '.join(_names())}")
            found.append((role, _format(name, text)))
        return cls(_format(base, text), tuple(reversed(found)))

    @classmethod
    def of(cls, config: ModelConfig, formats: Mapping[str, TileFormat]) -> WeightRecipe | None:
        """Return a recipe that gives these formats; None if matrices of one role have several."""
        by_role: dict[str, set[str]] = {}
        for spec in tensors(config):
            if spec.kind is Kind.MATRIX:
                by_role.setdefault(spec.role, set()).add(formats[spec.name].name)
        names = [fmt.name for fmt in formats.values()]
        base = FORMATS[max(sorted(set(names)), key=names.count)]
        if any(len(found) > 1 for found in by_role.values()):
            return None
        held = {role: FORMATS[name] for role, (name,) in by_role.items()}
        wanted = {role: fmt for role, fmt in held.items() if cls(base).format_of_role(role) is not fmt}
        rules: list[tuple[str, TileFormat]] = []
        for group, roles in GROUPS.items():  # a rule for all of a group, where one will do
            present = [role for role in roles if role in held]
            if len(present) > 1 and len({held[role].name for role in present}) == 1 and present[0] in wanted:
                rules.append((group, held[present[0]]))
                wanted = {role: fmt for role, fmt in wanted.items() if role not in present}
        return cls(base, tuple(reversed([*rules, *wanted.items()])))

    def __str__(self) -> str:
        return ",".join([self.base.name, *(f"{role}={fmt.name}" for role, fmt in reversed(self.rules))])

    def format_of(self, spec: TensorSpec, held: TileFormat | None = None) -> TileFormat:
        """Return the format of a matrix; held: that of the files, None where they hold values or are not there.

        What a publisher gives in 4 bits (MXFP4) keeps its codes where 4 bits are wanted and no rule says otherwise.
        """
        found, published = self.format_of_role(spec.role), held or FORMATS.get(spec.published)
        keeps = published is MXFP4 and found is self.base and self._rule(spec.role) is None
        return MXFP4 if keeps and found.bits <= MXFP4.bits else found

    def format_of_role(self, role: str) -> TileFormat:
        """Return the format of the matrices of a role."""
        named = self._rule(role)
        if named is not None:
            return named
        return FORMATS["f16"] if role in _SENSITIVE and self.base.quantised_activations else self.base

    def _rule(self, role: str) -> TileFormat | None:
        return next((fmt for named, fmt in self.rules if role == named or role in GROUPS.get(named, ())), None)

    def formats(self, config: ModelConfig, held: Mapping[str, TileFormat] | None = None) -> dict[str, TileFormat]:
        """Return the format of every matrix by name; held: formats of those that the files hold in one."""
        matrices = [spec for spec in tensors(config) if spec.kind is Kind.MATRIX]
        return {spec.name: self.format_of(spec, (held or {}).get(spec.name)) for spec in matrices}


def described(config: ModelConfig, formats: Mapping[str, TileFormat]) -> str:
    """Return the recipe that gives these formats, for people, or what else they can be called."""
    recipe = WeightRecipe.of(config, formats)
    return name_of(formats) if recipe is None else str(recipe)


def _names() -> list[str]:
    return [*GROUPS, *ROLES]


def _format(name: str, text: str) -> TileFormat:
    if name not in FORMATS:
        raise UsageError(f"--weights {text}: {name!r} is no format; known are {', '.join(FORMATS)}")
    return FORMATS[name]


# ---- folds over the table


def parameters(config: ModelConfig) -> int:
    """Return the number of weights, counting a tied embedding once."""
    every = sum(spec.size for spec in tensors(config))
    return every - (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def active_parameters(config: ModelConfig) -> int:
    """Return the number of weights that a token is multiplied with: of experts, those of the chosen ones."""
    return round(sum(spec.reads * spec.size for spec in tensors(config)))


def slice_parts(config: ModelConfig, shard: Shard) -> dict[str, SlicePart]:
    """Return which parts of its tensors a rank loads, in the order of the table."""
    found = {}
    for spec in tensors(config):
        own, kind = part(spec, shard), spec.kind.value
        if spec.cut is Cut.FIRST and shard.rank > 0:
            kind = "zeros"
        found[spec.name] = SlicePart(own.shape, own.ranges, kind)
    return found


def whole_parts(config: ModelConfig) -> dict[str, SlicePart]:
    """Return all tensors, whole."""
    return {
        spec.name: SlicePart(spec.shape, tuple((0, n) for n in spec.shape), spec.kind.value) for spec in tensors(config)
    }


def tensor_bytes(spec: TensorSpec, shard: Shard, formats: Mapping[str, TileFormat]) -> int:
    """Return the bytes of a rank's part of a tensor in memory; none for the table, which is looked up in its file."""
    if spec.kind is Kind.TABLE:
        return 0
    sizes = part(spec, shard).sizes
    if spec.kind is Kind.MATRIX:
        return matrix_bytes(formats[spec.name], sizes)
    count = 4
    for size in sizes:
        count *= size
    return count


def weight_bytes(config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat]) -> int:
    """Return the bytes of a rank's weights in memory."""
    return sum(tensor_bytes(spec, shard, formats) for spec in tensors(config))


def bytes_per_token(config: ModelConfig, shard: Shard, formats: Mapping[str, TileFormat]) -> int:
    """Return the bytes of a rank's weights that one token reads: of experts only those that it uses."""
    return round(sum(spec.reads * tensor_bytes(spec, shard, formats) for spec in tensors(config)))


def macs_per_token(config: ModelConfig, shard: Shard) -> int:
    """Return the multiply-adds of a rank's matrices for one token, without the lm_head's."""
    total = 0.0
    for spec in tensors(config):
        if spec.kind is Kind.MATRIX and spec.role != "lm_head":
            count = 1
            for size in part(spec, shard).sizes:
                count *= size
            total += spec.reads * count
    return round(total)


def share_of(config: ModelConfig, shard: Shard) -> float:
    """Return a rank's part of the multiply-adds of one token."""
    whole = sum(
        spec.reads * spec.size for spec in tensors(config) if spec.kind is Kind.MATRIX and spec.role != "lm_head"
    )
    return macs_per_token(config, shard) / whole


def bits_per_weight(config: ModelConfig, formats: Mapping[str, TileFormat]) -> float:
    """Return the mean bits of the matrices' weights."""
    matrices = [spec for spec in tensors(config) if spec.kind is Kind.MATRIX]
    total = sum(matrix_bytes(formats[spec.name], spec.shape) for spec in matrices)
    return 8 * total / sum(spec.size for spec in matrices)


def default_kv_type(formats: Mapping[str, TileFormat]) -> str:
    """Return the type of the KV cache where the user names none: f32 where all weights are, else f16."""
    return "f32" if {fmt.name for fmt in formats.values()} == {"f32"} else "f16"
