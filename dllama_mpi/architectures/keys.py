"""Reading config.json: every key is honoured, known to change nothing, or refused by its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ModelError

Json = Mapping[str, Any]

# The most of anything that a config may count: beyond is no model, but a slip or an attack.
LIMITS = {
    "num_hidden_layers": 1000, "vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 14, "num_key_value_heads": 1 << 14, "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 28, "num_experts": 1 << 12, "num_local_experts": 1 << 12,
    "n_routed_experts": 1 << 12,
}  # fmt: skip
_MOST = 1 << 24

# Keys that say nothing about what is computed, in any model.
_IGNORED = re.compile(
    r"^_|^(architectures|model_type|auto_map|torch_dtype|dtype|use_cache|transformers_version|pretraining_tp|bos_token_id"
    r"|eos_token_id|pad_token_id|sep_token_id|decoder_start_token_id|unk_token_id|initializer_range|initializer_cutoff"
    r"_factor|task_specific_params|problem_type|id2label|label2id|name_or_path|finetuning_task|tokenizer_class|prefix"
    r"|is_encoder_decoder|is_decoder|add_cross_attention|cross_attention_hidden_size|tie_encoder_decoder|pruned_heads"
    r"|chunk_size_feed_forward|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|temperature"
    r"|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|forced_bos_token_id|forced_eos_token_id|remove_invalid_values|exponential_decay_length_penalty"
    r"|suppress_tokens|begin_suppress_tokens|diversity_penalty|return_dict|torchscript|use_bfloat16|tf_legacy_loss"
    r"|output_hidden_states|output_attentions|output_scores|return_dict_in_generate|output_router_logits|router_aux_loss_coef"
    r"|aux_loss_alpha|seq_aux|router_jitter_noise|router_z_loss_coef|ep_size|quantization|language_model_only)$"
    r"|dropout|^unsloth|^transformers|_version$|^attn_implementation$|^mtp_|^num_nextn_predict_layers$"
)


class Keys:
    """The keys of one config.json, or of an object in it."""

    def __init__(self, config: Json, where: str) -> None:
        """Take the parsed object; `where` names it in errors."""
        self._config, self.where = config, where
        self._read: set[str] = set()

    @property
    def kind(self) -> str:
        """The model_type."""
        return str(self._config.get("model_type", "?"))

    def __contains__(self, key: str) -> bool:
        return self._config.get(key) is not None

    def assume(self, **values: Any) -> None:
        """Take values for keys that the file does not mention; a null in the file stays one."""
        self._config = {**values, **self._config}

    def mentions(self, key: str) -> bool:
        """Return whether the file has a key, be it null."""
        return key in self._config

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it stands; the default where it is missing or null."""
        self._read.add(key)
        value = self._config.get(key)
        return default if value is None else value

    def _number(self, key: str, default: float | None) -> float:
        value = self.get(key, default)
        if value is None:
            raise ModelError(f"{self.where}: {key} is {'null' if self.mentions(key) else 'missing'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise ModelError(f"{self.where}: {key} is {short(value)}; it must be a number")
        return value

    def count(self, key: str, default: int | None = None, least: int = 1, most: int | None = None) -> int:
        """Return a whole number.

        Raises:
            ModelError: it is missing, none, or out of range.
        """
        value, most = self._number(key, default), most or LIMITS.get(key, _MOST)
        if not least <= value <= most or value != int(value):
            raise ModelError(f"{self.where}: {key} is {short(value)}; it must be a whole number from {least} to {most}")
        return int(value)

    def number(self, key: str, default: float | None = None, above: float = float("-inf")) -> float:
        """Return a finite number above a limit.

        Raises:
            ModelError: it is missing, none, or not above it.
        """
        value = self._number(key, default)
        if not above < value <= sys.float_info.max:  # of float or int: an int may be beyond what float() takes
            limit = f"above {above:g}" if above > float("-inf") else "finite"
            raise ModelError(f"{self.where}: {key} is {short(value)}; it must be {limit}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a truth value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {key} is {short(value)}; it must be true or false")
        return value

    def texts(self, key: str, length: int, allowed: Sequence[str]) -> list[str]:
        """Return a list of so many of the allowed texts; an empty list where the key is missing.

        Raises:
            ModelError: it is another one.
        """
        value = self.get(key, [])
        if not isinstance(value, list) or (value and len(value) != length):
            count = len(value) if isinstance(value, list) else 0
            raise ModelError(f"{self.where}: {key} has {count} entries for {length} layers")
        wrong = next((each for each in value if each not in allowed), None)
        if wrong is not None:
            raise ModelError(f"{self.where}: {key} has {short(wrong)}; supported are {', '.join(allowed)}")
        return value

    def choice(self, key: str, default: str, allowed: Mapping[str, Any]) -> Any:
        """Return what a text stands for.

        Raises:
            ModelError: it stands for nothing.
        """
        value = self.get(key, default)
        if not isinstance(value, str) or value not in allowed:
            verb = "is" if len(allowed) == 1 else "are"
            known = ", ".join(allowed)
            raise ModelError(f"{self.where}: {key} {short(value)} is not supported; supported {verb} {known}")
        return allowed[value]

    def numbers(self, key: str, below: int) -> list[int]:
        """Return a list of whole numbers from 0 on, below a limit; an empty list where the key is missing.

        Raises:
            ModelError: it is another one.
        """
        value = self.get(key, [])
        whole = isinstance(value, list) and all(type(each) is int and 0 <= each < below for each in value)
        self.require(whole, key, f"a list of numbers from 0 to {below - 1}")
        return list(value)

    def require(self, good: bool, key: str, limit: str) -> None:
        """Raise unless a value is good; limit: what it must be."""
        if not good:
            raise ModelError(f"{self.where}: {key} is {short(self.get(key))}; it must be {limit}")

    def section(self, key: str) -> Keys:
        """Return the keys of an object in this one.

        Raises:
            ModelError: it is missing, or none.
        """
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise ModelError(f"{self.where}: {key} is {short(value)}; it must be an object")
        return Keys(value, f"{self.where}: {key}")

    def ignore(self, *keys: str) -> None:
        """Count keys as read that change nothing here."""
        self._read.update(keys)

    def refuse(self, **defaults: Any) -> None:
        """Raise if a key has another value than the one that this program computes with; None, too, is that."""
        for key, default in defaults.items():
            value = self.get(key, default)
            if value != default:
                how = "without it" if default is None else f"with {default}"
                raise ModelError(f"{self.where}: {key} is {short(value)}; {self.kind} is supported {how} only")

    def finish(self) -> None:
        """Raise if a key was not read that may change what is computed."""
        for key, value in self._config.items():
            if key in self._read or _IGNORED.search(key) or value in (None, False, [], {}, ""):
                continue
            raise ModelError(
                f"{self.where}: {key} ({short(value)}) is not known for {self.kind}, and may change what is computed;"
                " if it does not, remove it from the file"
            )


def short(value: Any) -> str:
    """Return a value as a message names it, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}  # transformers' names of the activations that are supported
FULL, SLIDING = "full_attention", "sliding_attention"  # its types of layers with attention


def attention_sizes(keys: Keys, kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int, int]:
    """Return heads, KV heads and the size of a head; the defaults where the file says nothing.

    Raises:
        ModelError: they do not fit together.
    """
    heads = keys.count("num_attention_heads")
    groups = keys.count("num_key_value_heads", kv_heads or heads)
    dim = keys.count("head_dim", head_dim or max(1, keys.count("hidden_size") // heads), most=1 << 12)
    if heads % groups:
        raise ModelError(f"{keys.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    if dim % 2:
        raise ModelError(f"{keys.where}: head_dim {dim} is odd; rotary embedding needs pairs")
    return heads, groups, dim


def layer_types(keys: Keys, default: Sequence[str]) -> list[str]:
    """Return the type of each layer, FULL or SLIDING: by `layer_types` where the file has them, else the default."""
    return keys.texts("layer_types", keys.count("num_hidden_layers"), (FULL, SLIDING)) or list(default)


def window_of(keys: Keys) -> int:
    """Return the window of layers that have one; 0, for none, where `sliding_window` is null or 0."""
    return keys.count("sliding_window", least=0) if "sliding_window" in keys else 0


def layer_windows(keys: Keys, window: int | None, types: Sequence[str] | None = None) -> list[int]:
    """Return each layer's window: by `layer_types` where the file has them, else by those given, else all the same.

    window: of layers of type sliding_attention, None for no window at all. 0 stands for none in the result.
    """
    default = [SLIDING] * keys.count("num_hidden_layers") if types is None else types
    return [(window or 0) if kind == SLIDING else 0 for kind in layer_types(keys, default)]
