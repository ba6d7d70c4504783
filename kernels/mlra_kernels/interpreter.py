"""Triton's interpreter (`TRITON_INTERPRET=1`), which runs the kernels on the CPU.

The interpreter of Triton 3.6 uses arrays of one element as loop bounds. NumPy 2.5 no longer
converts such an array to an int. `mend` adds the conversion.

The interpreter makes integers of a comparison of two scalars where it is combined with one of
tensors. Triton 3.9 refuses such a mask of a load or a store. `mend` keeps it Boolean.

The interpreter holds bfloat16 as its bits in arrays of integers, and multiplies those integers in
`tl.dot`. `mend` makes float32 of them first.

The package calls `mend` when it is imported under the interpreter.
"""

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels are interpreted. Triton decides this when a kernel is defined."""


def mend() -> None:
    """Let the interpreter's scalars be loop bounds with any NumPy, and parts of masks with any
    Triton, and multiply bfloat16. A second call does nothing."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "takes_scalars", False):
        return

    def patch_with_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch_with_index.takes_scalars = True
    interpreter._patch_lang_tensor = patch_with_index

    builder = interpreter.InterpreterBuilder
    splat = builder.create_splat

    def splat_of_its_type(self, ret_ty, arg):
        value = splat(self, ret_ty, arg)
        if ret_ty.scalar == tl.int1:
            value.data = value.data.astype(bool)
        return value

    builder.create_splat = splat_of_its_type

    dot = builder.create_dot

    def dot_of_numbers(self, a, b, *rest, **named):
        return dot(self, _as_float32(a), _as_float32(b), *rest, **named)

    builder.create_dot = dot_of_numbers


def _as_float32(x):
    """The interpreter's array x; of bits of bfloat16, their numbers in float32."""
    if x.get_element_ty() != tl.bfloat16 or x.data.dtype != "uint16":
        return x
    return type(x)((x.data.astype("uint32") << 16).view("float32"), tl.float32)
