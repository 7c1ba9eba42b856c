"""Functions that kernels call: each becomes LLVM language, and machine code with the kernel alone.

Numba makes optimised machine code of every function, for callers in Python; but these are called
by kernels only, which take them in as text and are optimised as a whole. That was half of the time
that a kernel took to compile.
"""

from __future__ import annotations

from typing import Any

from llvmlite.binding import Linkage
from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import InlineOverloads, NativeLowering, NopythonRewrites
from numba.core.untyped_passes import InlineClosureLikes, InlineInlinables

# What no kernel has: closures, functions copied in before types are known, expressions of arrays.
_NEEDLESS = (InlineClosureLikes, InlineInlinables, InlineOverloads, NopythonRewrites)


class _Text(JITCodeLibrary):
    """A function and those that it calls, neither optimised nor compiled."""

    def add_llvm_module(self, module: Any) -> None:
        self._final_module.link_in(module)

    def finalize(self) -> None:
        self._raise_if_finalized()
        for library in dict.fromkeys(self._linking_libraries):
            self._reload_init.update(library._reload_init)
            self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.external:
                function.linkage = "linkonce_odr"  # several functions may bring it
        self._shared_module = self._final_module
        self._finalize_dynamic_globals()
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Lowering(NativeLowering):
    _name = "rowmax_inner_lowering"

    def run_pass(self, state: Any) -> bool:
        state.library = _Text(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        lowered = state["cr"]
        # Callers find the text by what would be the function for Python, which must be a built-in.
        function = lowered.fndesc.__sizeof__
        state.targetctx.insert_user_function(function, lowered.fndesc, [state.library])
        state["cr"] = lowered._replace(cfunc=function)
        return True


class InnerCompiler(CompilerBase):
    """Numba's, but for what becomes of a function."""

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.passes = [
            (_Lowering if each is NativeLowering else each, why)
            for each, why in passes.passes
            if each not in _NEEDLESS
        ]
        passes.finalize()
        return [passes]


class InnerFunction(CPUDispatcher):
    """One compilation for all numbers of a type: Numba would make another one for each literal."""

    def get_call_template(self, args: Any, kws: Any) -> Any:
        args = tuple(types.unliteral(each) for each in args)
        return super().get_call_template(args, {k: types.unliteral(v) for k, v in kws.items()})
