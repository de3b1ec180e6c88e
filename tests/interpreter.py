"""Triton's interpreter, made quicker, and fit for NumPy."""

import inspect

# The version that this was written for has these; any other stays as it is.
_PARAMETERS = ["pkg", "builder", "scope"]


def remember_builtins():
    """Have the interpreter look through Triton's language once for what it replaces.

    It does so at every call of a kernel, and of every function that a kernel calls: a third of the time that the
    kernels' tests would take. What there is to replace stays the same.
    """
    from triton.runtime import interpreter

    if list(inspect.signature(interpreter._patch_builtin).parameters) != _PARAMETERS:
        return
    found = {}

    def patch_builtin(pkg, builder, scope):
        if pkg not in found:
            members = inspect.getmembers(pkg)
            found[pkg] = [(name, member) for name, member in members if interpreter.tl.core.is_builtin(member)]
        for name, member in found[pkg]:
            # Where the caller has replaced it already, it is another.
            if getattr(pkg, name) is member:
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def count_with_arrays_of_one_value():
    """Have kernels use scalars as bounds of loops: NumPy 2.4 gave up the conversion by which Triton 3.6 does that."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
