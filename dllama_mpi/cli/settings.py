"""`/set`: sampling that changes within a conversation, with the checks of the command line's options."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from ..errors import RequestError
from .options import add_sampling_options

# Names as `SamplingParams` and OpenAI's API have them, and where parsed options have the values.
NAMES = {
    "temperature": "temperature",
    "top_p": "topp",
    "top_k": "topk",
    "min_p": "minp",
    "max_tokens": "steps",
    "seed": "seed",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "stop": "stop",
    "ignore_eos": "ignore_eos",
}
_SWITCHES = {"on": True, "true": True, "1": True, "off": False, "false": False, "0": False}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RequestError(message.partition(": ")[2])


def changed(args: argparse.Namespace, name: str, text: str) -> argparse.Namespace:
    """Return the options with one value changed. name: the option's or the parameter's; text: "default" resets it.

    Raises:
        RequestError: no such name, or a value that the option refuses.
    """
    known = name.lstrip("-").replace("-", "_")
    option = NAMES.get(known, known)
    if option not in NAMES.values():
        raise RequestError(f"/set {name}: no such setting; there are {', '.join(NAMES)}")
    parser = _Parser(add_help=False)
    add_sampling_options(parser)
    found = argparse.Namespace(**vars(args))
    if text == "default":
        setattr(found, option, parser.get_default(option))
    elif option == "ignore_eos":
        if text.lower() not in _SWITCHES:
            raise RequestError(f"/set {name}: {text!r} is neither on nor off")
        found.ignore_eos = _SWITCHES[text.lower()]
    else:
        found.stop = [] if option == "stop" else found.stop
        try:
            parser.parse_args([f"--{option.replace('_', '-')}={text}"], found)
        except RequestError as error:
            raise RequestError(f"/set {name}: {error}") from None
    return found


def shown(settings: dict[str, Any]) -> list[str]:
    """Return the settings, a line each. None: chosen by others, or without a limit."""
    width = max(map(len, settings))

    def value(name: str) -> str:
        found = settings[name]
        if isinstance(found, bool):
            return "on" if found else "off"
        if isinstance(found, (list, tuple)):
            return ", ".join(map(repr, found)) or "none"
        return "default" if found is None else f"{found:g}" if isinstance(found, float) else str(found)

    return [f"{name:<{width}}  {value(name)}" for name in settings]
