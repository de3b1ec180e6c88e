"""What a kernel and its launches are known by: digits that change with them."""

import ast
import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterable

from minimagen_fast.kernels import launch

from .aot_builds import Build, Kind

PACKAGE = launch.__name__.rpartition(".")[0]


def fingerprint(name: str) -> str:
    """Eight digits that change with the code of a kernel or of a function it calls, not with comments and layout.

    Args:
        name: Module and kernel, as in ``"layer_norm_rows._forward_kernel"``.
    """
    module, _, function = name.rpartition(".")
    pending = [getattr(importlib.import_module(f"{PACKAGE}.{module}"), function)]
    codes = {}
    while pending:
        function = pending.pop().fn
        name = f"{function.__module__.removeprefix(PACKAGE)}.{function.__qualname__}"
        if name in codes:
            continue
        source = textwrap.dedent(inspect.getsource(function))
        codes[name] = _code(source)
        for node in ast.walk(ast.parse(source)):
            called = None
            if isinstance(node, ast.Name):
                called = function.__globals__.get(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                called = getattr(function.__globals__.get(node.value.id), node.attr, None)
            # Triton's own functions belong to its version.
            if str(getattr(getattr(called, "fn", None), "__module__", "")).startswith(PACKAGE):
                pending.append(called)
    return _digest(sorted(codes.items()))


def _code(source: str) -> list[str]:
    """The tokens of a function, without comments, docstrings and line ends within a statement."""
    words, before = [], tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type == tokenize.STRING and before in (tokenize.INDENT, tokenize.NEWLINE):
            before = tokenize.STRING
            continue
        if before != tokenize.STRING or token.type != tokenize.NEWLINE:
            words.append(token.string.strip() or tokenize.tok_name[token.type])
        before = token.type
    return words


def digests(builds: Iterable[Build]) -> dict[Kind, str]:
    """For every kernel and target eight digits that change with the set of its configurations.

    They stand for all that decides on the host's side how a kernel is launched: block sizes, warps, alignment.
    """
    configs: dict[Kind, list[str]] = {}
    for build in builds:
        kernel, config, target = build.key
        configs.setdefault((kernel, target), []).append(config)
    return {kind: _digest(sorted(of_kind)) for kind, of_kind in configs.items()}


def _digest(content: list) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]
