"""How functions are compiled, so that a first run compiles little.

Numba gives every function a wrapper for calls from Python, which unpacks every array of every argument; and it copies
what a function calls into the function's own object code, compiled again at every level. For structures of dozens of
arrays that is most of the time. Here functions that only compiled code calls have no wrapper (`inner`), and the large
ones are called where they lie (`call`, and the regions of `kernels.parallel`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import binding
from numba import njit, types
from numba.core import cgutils
from numba.core.dispatcher import Dispatcher
from numba.core.registry import CPUDispatcher
from numba.extending import intrinsic

from .turns import SharedCache, compilation

_njit: Any = njit  # takes more options than its types tell


class _Compiled(CPUDispatcher):
    """A compiled function that, when it comes from the cache, tells its callers what it calls where it lies.

    One process of a host compiles it, see `turns`.
    """

    def enable_caching(self) -> None:
        self._cache = SharedCache(self.py_func)

    def compile(self, sig: Any) -> Any:
        with compilation():
            found = super().compile(sig)
        for one in self.overloads.values():  # Numba forgets this where it loads a function
            one.library._reload_init.update(one.reload_init)
        return found


class _Inner(_Compiled):
    """A compiled function without a wrapper for calls from Python; one is made when Python calls it after all."""

    def __call__(self, *args: Any) -> Any:
        return self._from_python(*args)

    @functools.cached_property
    def _from_python(self) -> Callable[..., Any]:
        function = self
        made: Callable[..., Any] = njit(nogil=True)(lambda *args: function(*args))
        return made


def entry(function: Callable[..., Any]) -> Any:
    """Decorate a function that Python calls; it runs without the interpreter's lock."""
    made = _njit(cache=True, nogil=True, no_cfunc_wrapper=True)(function)
    made.__class__ = _Compiled
    made.enable_caching()
    return made


def inner(function: Any = None, **options: Any) -> Any:
    """Decorate a function that compiled code calls. options: of Numba's njit."""
    if function is None:
        return functools.partial(inner, **options)
    made = _njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)(function)
    made.__class__ = _Inner
    made.enable_caching()
    return made


_linked: set[str] = set()


@dataclass(frozen=True)
class _Link:
    """A call of a function of a module, for types of arguments. Cached code that has one calls it when it is loaded."""

    module: str
    name: str
    arguments: tuple[types.Type, ...]

    @property
    def symbol(self) -> str:
        """What the linker knows the function by: unlike Numba's symbol, the same in every process."""
        digest = hashlib.sha256(repr((self.module, self.name, self.arguments)).encode()).hexdigest()[:24]
        return f"dllama_mpi.{self.name}.{digest}"

    def __call__(self) -> None:
        """Tell the linker where the function lies; compile it, or load it from the cache, if it is not there yet."""
        if self.symbol not in _linked:
            function = getattr(importlib.import_module(self.module), self.name)
            function.compile(self.arguments)
            compiled = function.get_compile_result(types.void(*self.arguments))
            binding.add_symbol(self.symbol, compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))
            _linked.add(self.symbol)


def declare(context: Any, module: Any, function: Dispatcher, arguments: tuple[types.Type, ...]) -> Any:
    """Declare a compiled function in an LLVM module that may call it without a copy of it; return the declaration."""
    link = _Link(function.py_func.__module__, function.py_func.__name__, arguments)
    link()
    context.active_code_library._reload_init.add(link)
    return cgutils.get_or_insert_function(
        module, context.call_conv.get_function_type(types.none, arguments), link.symbol
    )


@intrinsic
def call(typingctx, function, arguments):
    """Call a function of some module that returns nothing with a tuple of arguments, where it lies."""
    wanted = function.get_call_type(typingctx, arguments.types, {})
    if wanted.return_type != types.none:
        raise TypeError(f"{function.dispatcher.py_func.__name__} returns {wanted.return_type}; only nothing is passed")

    def codegen(context, builder, signature, args):
        kinds = wanted.args
        callee = declare(context, builder.module, function.dispatcher, kinds)
        values = [
            context.cast(builder, builder.extract_value(args[1], i), given, kind)
            for i, (given, kind) in enumerate(zip(arguments.types, kinds, strict=True))
        ]
        status, _ = context.call_conv.call_function(builder, callee, types.none, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(function, arguments), codegen
