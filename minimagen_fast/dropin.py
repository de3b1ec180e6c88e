"""Run a program that was written for ``minimagen``, unchanged, on minimagen_fast.

Two ways, same effect::

    python -m minimagen_fast.dropin train.py --BATCH_SIZE 4    # nothing in the program changes
    import minimagen_fast.dropin                               # or: one line, before the first import of minimagen

From then on ``import minimagen``, ``import minimagen.Unet`` and ``from minimagen.Unet import Unet`` give
minimagen_fast: the very same module objects, so that classes, ``isinstance`` and pickles agree whichever name they were
reached by. It does not matter whether the real minimagen is installed, as long as it has not been imported yet. Workers
that are forked inherit all this; with the first way, workers that multiprocessing starts afresh (``spawn``,
``forkserver``) are told to import this module, with the second they do it themselves when they import the program.
Other processes that a program starts need it said again: ``torchrun -m minimagen_fast.dropin train.py``.

Importing this module imports neither torch nor any of the modules that it gives another name.
"""

import builtins
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import multiprocessing.spawn
import os
import runpy
import sys
from collections.abc import Sequence
from types import CodeType, ModuleType, TracebackType
from typing import Any

ALIAS = "minimagen"
TARGET = "minimagen_fast"
THIS_MODULE = f"{TARGET}.dropin"

USAGE = f"""\
usage: python -m {THIS_MODULE} SCRIPT [ARGS...]
       python -m {THIS_MODULE} -m MODULE [ARGS...]

Run a program written for {ALIAS}, unchanged, on {TARGET}: everything after the program's name is passed on to it.
The same can be had from inside a program: put `import {THIS_MODULE}` before its first import of {ALIAS}."""


def _target_name(name: str) -> str:
    return TARGET + name.removeprefix(ALIAS)


class _AliasLoader(importlib.abc.Loader):
    def exec_module(self, module: ModuleType) -> None:
        # The import system hands on what it finds in sys.modules after this, not the empty module it passed in. Giving
        # it the real one any earlier (create_module) would overwrite that one's __spec__.
        sys.modules[module.__name__] = importlib.import_module(_target_name(module.__name__))

    def get_code(self, fullname: str) -> CodeType | None:
        """What ``-m`` runs, as a module of its own."""
        found: Any = importlib.util.find_spec(_target_name(fullname))
        return found.loader.get_code(found.name)


class _AliasFinder(importlib.abc.MetaPathFinder):
    """Finds ``minimagen`` and ``minimagen.X`` as ``minimagen_fast`` and ``minimagen_fast.X``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != ALIAS and not fullname.startswith(f"{ALIAS}."):
            return None
        found = importlib.util.find_spec(_target_name(fullname))
        if found is None:
            return None  # The import ends in a ModuleNotFoundError that names `fullname`.
        is_package = found.submodule_search_locations is not None
        return importlib.machinery.ModuleSpec(fullname, _AliasLoader(), origin=found.origin, is_package=is_package)


def install() -> None:
    """Make ``minimagen`` another name of minimagen_fast in this process. Importing this module has done it already.

    Raises:
        ImportError: if another package of that name has been imported before.
    """
    present = sys.modules.get(ALIAS)
    if present is not None and present.__name__ != TARGET:
        raise ImportError(
            f"{ALIAS} has already been imported from {getattr(present, '__file__', 'an unknown place')}, and what was "
            f"imported from it stays what it is. Put `import {THIS_MODULE}` before the first import of {ALIAS}, or run "
            f"the program with `python -m {THIS_MODULE} SCRIPT`.",
            name=ALIAS,
        )
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        # First, so that an installed minimagen does not get in between.
        sys.meta_path.insert(0, _AliasFinder())


class _ImportedWhenUnpickled:
    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, (THIS_MODULE,)


def _tell_spawned_processes() -> None:
    """Have the workers of ``spawn`` and ``forkserver`` import this module before they import the program."""
    get_preparation_data = multiprocessing.spawn.get_preparation_data

    def with_dropin(name: str) -> dict[str, Any]:
        # A worker unpickles the whole dictionary before it acts on any entry, and passes over keys it does not know.
        return {**get_preparation_data(name), THIS_MODULE: _ImportedWhenUnpickled()}

    multiprocessing.spawn.get_preparation_data = with_dropin
    if "forkserver" in multiprocessing.get_all_start_methods():
        # The server would import the program itself, and nothing can be imported there before it.
        multiprocessing.set_forkserver_preload([])


def _print_exception(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """As plain Python prints it: without the frames of this module and of ``python -m``, which come first."""
    launcher = {__file__, runpy.run_module.__code__.co_filename}
    while traceback is not None and traceback.tb_frame.f_code.co_filename in launcher:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def _new_main() -> ModuleType:
    """A module ``__main__`` for the program, still empty.

    It stays there for as long as the process lives: what runs after the last line of the program (threads, atexit)
    finds it too. The public functions of runpy would take it away then.
    """
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    return main


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run the program at ``path`` as ``python path arguments...`` would: as ``__main__``, in this process.

    Its exit code and its exceptions come out of this function as they are.
    """
    absolute = os.path.abspath(path)
    try:
        with open(absolute, "rb") as file:
            source = file.read()
    except OSError as error:
        # Word and exit code of the interpreter itself.
        print(
            f"{sys.executable}: can't open file {absolute!r}: [Errno {error.errno}] {error.strerror}", file=sys.stderr
        )
        sys.exit(2)
    sys.argv = [path, *arguments]
    if not getattr(sys.flags, "safe_path", False):  # New in Python 3.11: there, -P means that no folder stands first.
        sys.path[0] = os.path.dirname(os.path.realpath(absolute))
    main = _new_main()
    main.__dict__.update(
        __file__=absolute,
        __cached__=None,
        __loader__=importlib.machinery.SourceFileLoader("__main__", absolute),
    )
    exec(compile(source, absolute, "exec", dont_inherit=True), main.__dict__)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: ``python -m minimagen_fast.dropin SCRIPT [ARGS...]`` or ``... -m MODULE [ARGS...]``."""
    # By hand: everything after the program's name is the program's own, and argparse has views on dashes in there.
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return
    is_module = arguments[:1] == ["-m"]
    if is_module:
        del arguments[0]
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        sys.exit(2)

    install()
    _tell_spawned_processes()
    sys.excepthook = _print_exception
    if is_module:
        sys.argv = arguments
        _new_main()
        # What the interpreter itself calls for -m.
        runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]
    else:
        run_script(arguments[0], arguments[1:])


if __name__ == "__main__":
    # Not this copy: the program and its workers import the module by its own name, and must meet the same one.
    from minimagen_fast import dropin

    dropin.main()
else:
    install()
