"""Triton's interpreter, made quicker, and fit for NumPy."""

import dataclasses
import functools
import inspect

# What is replaced, and the parameters that each has in the versions that this was written for. Where they are others
# the interpreter stays as it is.
_PARAMETERS = {
    "_patch_builtin": ["pkg", "builder", "scope"],
    "_patch_lang": ["fn"],
    "_get_np_dtype": ["tt_dtype"],
}


def do_nothing_twice():
    """Spare the interpreter what it does time and again for the same answer: most of the time of the kernels' tests."""
    from triton.runtime import interpreter

    if all(list(inspect.signature(getattr(interpreter, name)).parameters) == p for name, p in _PARAMETERS.items()):
        _remember_builtins(interpreter)
        _replace_once_in_a_kernel(interpreter)
        _remember_dtypes(interpreter)
        _leave_shapes_that_are_alike(interpreter)
        _leave_overflows(interpreter)


def _remember_builtins(interpreter):
    """Look through Triton's language once for what there is to replace, and not in every call."""
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


def _replace_once_in_a_kernel(interpreter):
    """Replace the language once in a call of a kernel, and not in every call of a function that it makes."""
    languages = (interpreter.tl, interpreter.tl.core)
    patch, replaced = interpreter._patch_lang, set()

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            super().restore()
            replaced.clear()

    @functools.cache
    def seen_by(fn):
        values = fn.__globals__.values()
        return {each.__name__ for each in languages if any(value is each for value in values)}

    def patch_lang(fn):
        if seen_by(fn) and seen_by(fn) <= replaced:
            return Scope()
        replaced.update(seen_by(fn))
        return patch(fn)

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_lang


def _remember_dtypes(interpreter):
    """Make the table of NumPy's dtypes once."""
    get, found = interpreter._get_np_dtype, {}

    def get_np_dtype(tt_dtype):
        one = tt_dtype.element_ty if isinstance(tt_dtype, interpreter.tl.block_type) else tt_dtype
        if one.name not in found:
            found[one.name] = get(one)
        return found[one.name]

    interpreter._get_np_dtype = get_np_dtype


def _leave_shapes_that_are_alike(interpreter):
    """Do not look for a shape that two of the same shape can be brought to."""
    semantic = type(interpreter.interpreter_semantic)
    broadcast = semantic.broadcast_impl_value

    def broadcast_impl_value(self, lhs, rhs):
        alike = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_impl_value


def _leave_overflows(interpreter):
    """Do not compute all sums and products of integers again in 64 bits.

    Whether the first ones have overflowed is asserted in debugging alone, and otherwise thrown away.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def count_with_arrays_of_one_value():
    """Have kernels use scalars as bounds of loops: NumPy 2.4 gave up the conversion by which Triton 3.6 does that."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_lang_tensor
