"""Triton's interpreter (`TRITON_INTERPRET=1`), which runs the kernels on the CPU.

NumPy 2.5 no longer turns an array of one element into an int, which the interpreter of Triton 3.6
relies on for every loop bound. `mend` puts that right; the package calls it when it is imported
under the interpreter, so that no user has to.
"""

import triton

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels are interpreted; Triton fixes it when a kernel is defined."""


def mend() -> None:
    """Let the interpreter's scalars be loop bounds under any NumPy; a second call does nothing."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "takes_scalars", False):
        return

    def patch_with_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_with_index.takes_scalars = True
    interpreter._patch_lang_tensor = patch_with_index
