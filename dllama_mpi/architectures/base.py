"""What an architecture is: how its config.json is read, and where a published checkpoint has its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..kernels.layout import FORMATS, TileFormat
from ..model.config import LayerConfig, ModelConfig
from ..model.tensors import TABLE, Kind, tensors
from ..weights.mapped import Place, Ref
from .keys import Keys

# Of a multimodal checkpoint, the names of tensors that are not the decoder's.
VISION = (r"(^|\.)(vision_tower|multi_modal_projector)\.",)


def held_formats(
    config: ModelConfig, places: Mapping[str, Place], format_of: Callable[[str], TileFormat | None]
) -> dict[str, TileFormat]:
    """Return the format of every matrix of a model whose files hold some of them quantised; else none.

    format_of: that of one of the files' tensors; None for plain numbers, which stay float16, and for those that are not
    there. Where a matrix is made of several, the one of the most bits counts.
    """
    held: dict[str, TileFormat | None] = {}
    for spec in tensors(config):
        if spec.kind is Kind.MATRIX:
            place = places.get(spec.name) or places[TABLE]
            found = [format_of(name) for name in place.names]
            known = [fmt for fmt in found if fmt is not None]
            held[spec.name] = max(known, key=lambda fmt: fmt.bits) if known and len(known) == len(found) else None
    if not any(held.values()):
        return {}
    return {name: fmt or FORMATS["f16"] for name, fmt in held.items()}


def same_names(config: ModelConfig, name: str) -> Place:
    """Return a place of the same name: what Llama's checkpoints have."""
    return Ref(name)


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        read: config.json -> ModelConfig; must read every key that it honours.
        place: where a published checkpoint has a tensor of the table, of the decoder alone; see `prefixed`. Of several
            places the first counts whose tensors are there.
        skipped: patterns of the names of tensors that are of no use here.
        quantised: methods of quantization_config that its checkpoints may have. about: models of it, for people.
    """

    read: Callable[[Keys], ModelConfig]
    place: Callable[[ModelConfig, str], Place | Sequence[Place]] = same_names
    skipped: Sequence[str] = (r"\.rotary_emb\.inv_freq$",)
    quantised: Sequence[str] = ()
    about: str = ""

    def places(self, config: ModelConfig, names: Collection[str]) -> dict[str, Place]:
        """Return where each tensor of a model is; names: of the checkpoint's tensors."""
        rename, held, found = prefixed(names), set(names), {}
        for spec in tensors(config):
            place = self.place(config, spec.name)
            places = [each.renamed(rename) for each in (place if isinstance(place, Sequence) else [place])]
            found[spec.name] = next((each for each in places if held.issuperset(each.names)), places[-1])
        return found

    def unused(self, config: ModelConfig) -> list[str]:
        """Return patterns of the names of a model's tensors that are of no use here."""
        later = range(config.num_layers, config.num_layers + config.later_layers)
        return [*self.skipped, *(rf"^model\.layers\.{layer}\." for layer in later)]


def prefixed(names: Collection[str]) -> Callable[[str], str]:
    """Return what turns a decoder's names into those of a checkpoint, in which other parts may stand beside it.

    Multimodal ones were published with language_model.model.* and language_model.lm_head.*; since version 4.52,
    transformers writes model.language_model.* and lm_head.*.
    """
    decoders = ("language_model.model.", "model.language_model.")
    decoder = next((each for each in decoders if any(name.startswith(each) for name in names)), "model.")
    head = "language_model.lm_head." if decoder == decoders[0] else "lm_head."

    def rename(name: str) -> str:
        if name.startswith("model."):
            return decoder + name.removeprefix("model.")
        return head + name.removeprefix("lm_head.") if name.startswith("lm_head.") else name

    return rename


def text_part(keys: Keys, kinds: Mapping[str, Callable[[Keys], ModelConfig]], default: str) -> ModelConfig:
    """Return the config of a multimodal model's decoder.

    kinds: readers of text_config by its model_type. default: which it is where the file does not say.
    """
    keys.ignore("vision_config", "image_token_index", "image_token_id")
    text = keys.section("text_config")
    text.ignore("quantization_config", "compression_config")  # read where the weights are
    if "tie_word_embeddings" in keys:  # text_config's own comes first, the family's default last
        text.assume(tie_word_embeddings=keys.flag("tie_word_embeddings"))
    text.assume(model_type=default)
    read: Callable[[Keys], ModelConfig] = text.choice("model_type", default, kinds)
    made = read(text)
    text.finish()
    return replace(made, model_type=keys.kind)


def common(keys: Keys, layers: Sequence[LayerConfig], **more: Any) -> ModelConfig:
    """Return a config of these layers with what all config.json files call alike.

    more: other fields of `ModelConfig`, and defaults: tied (of tie_word_embeddings), positions, eps.
    """
    defaults = {name: more.pop(name, value) for name, value in (("tied", False), ("positions", 2048), ("eps", 1e-6))}
    fields: dict[str, Any] = {
        "model_type": keys.kind,
        "vocab_size": keys.count("vocab_size"),
        "hidden_size": keys.count("hidden_size"),
        "max_position_embeddings": keys.count("max_position_embeddings", defaults["positions"]),
        "norm_eps": keys.number("rms_norm_eps", defaults["eps"], above=0.0),
        "tie_word_embeddings": keys.flag("tie_word_embeddings", defaults["tied"]),
        "layers": tuple(layers),
    }
    fields |= more
    return ModelConfig(**fields)


def renamed(names: Mapping[str, str]) -> Callable[[ModelConfig, str], Place]:
    """Return a `place` that replaces parts of names: {this program's: the checkpoint's}."""

    def place(config: ModelConfig, name: str) -> Place:
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        return Ref(name)

    return place
