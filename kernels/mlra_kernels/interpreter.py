"""Triton's interpreter (`TRITON_INTERPRET=1`), which runs the kernels on the CPU.

The interpreter of Triton 3.6 uses arrays of one element as loop bounds. NumPy 2.5 no longer
converts such an array to an int. `mend` adds the conversion. The package calls `mend` when it is
imported under the interpreter.
"""

import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels are interpreted. Triton decides this when a kernel is defined."""


def mend() -> None:
    """Let the interpreter's scalars be loop bounds with any NumPy. A second call does nothing."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "takes_scalars", False):
        return

    def patch_with_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_with_index.takes_scalars = True
    interpreter._patch_lang_tensor = patch_with_index
