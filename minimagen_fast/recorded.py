"""A computation and its gradients, taken down operator by operator, and run again without what called for them.

A good part of a short step of training on a CPU is Python: modules that call modules, checks, what autograd notes down.
The operators that come of it are the same in every step of the same kind. :func:`record` takes them down while they run
and writes them as one function of Python, one to a line, which runs them on other inputs: the same operators, hence the
same numbers to the bit, and nothing is held longer than autograd would hold it.

This is right only for what depends on nothing but values of tensors: whoever has something recorded must know that.
"""

import enum
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

# What comes of these is not told by shapes alone.
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# They give what they are given.
_SAME = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


class NotRecordable(RuntimeError):
    """What was to be recorded cannot be run again from its operators."""


@dataclass(frozen=True)
class Recording:
    """What was recorded.

    Attributes:
        run: Of the inputs, by name. It yields the losses, takes their gradient, and yields the list of the gradients
            that were wanted. To be run without gradients and autocast.
        kept: Names of the inputs that the backward pass reads.
    """

    run: Callable[..., Generator[Any, torch.Tensor | None, None]]
    kept: list[str]


def record(
    compute: Callable[..., torch.Tensor],
    inputs: Mapping[str, torch.Tensor | None],
    backward: Callable[[torch.Tensor, torch.Tensor], Iterable[torch.Tensor]],
) -> Recording:
    """Run a computation and its backward pass, and take down their operators.

    Args:
        compute: From ``inputs``, by name, to losses. A replay reads all other tensors, such as weights, where they lie.
        inputs: Its inputs. Those of a replay have the same shapes, strides and dtypes, and are None where these are.
        backward: From losses and a gradient of them to the gradients that are wanted.

    Returns:
        What was recorded.

    Raises:
        NotRecordable: if an operator's result depends on more than its arguments' values and shapes, or something is
            written to that was there before.
    """
    recorder = _Recorder(inputs)
    with recorder:
        losses = compute(**inputs)
    gradient = torch.ones_like(losses.detach(), memory_format=torch.contiguous_format)
    given, asked = recorder.name_of(losses), recorder.name(gradient, "gradient", _Origin.INPUT)
    recorder.lines.append(_Line(f"yield {given}", [given], [asked], must_run=True))
    forward = len(recorder.lines)
    with recorder:
        found = [recorder.name_of(each) for each in backward(losses, gradient)]
    recorder.lines.append(_Line(f"yield [{', '.join(found)}]", found, [], must_run=True))
    late = {name for line in recorder.lines[forward:] for name in line.reads}
    run = _function("replay", inputs, recorder.lines, recorder.constants)
    return Recording(run, [name for name in inputs if name in late])


@dataclass
class _Line:
    """One line of the function.

    Attributes:
        text: What is done, as Python.
        reads: Names of the tensors in it.
        results: Names of what comes of it; None where nothing does.
        must_run: Whether it does more than to give results.
        several: Whether it gives a tuple or list.
    """

    text: str
    reads: list[str]
    results: list[str | None]
    must_run: bool = False
    several: bool = False


class _Origin(enum.Enum):
    """Where memory came from."""

    INPUT = enum.auto()
    OPERATOR = enum.auto()
    OTHER = enum.auto()


class _Recorder(TorchDispatchMode):
    """Takes down what torch runs.

    Attributes:
        only_records: Operators run as they do without it: see :func:`.kernels.launch.nothing_looks`.
        lines: What ran.
        constants: By name, the operators, and what they read that none of them made.
    """

    only_records = True

    def __init__(self, inputs: Mapping[str, torch.Tensor | None]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self._names = WeakTensorKeyDictionary()
        # What has a name lies there, of which inputs, operators or others were the first. A weak reference also keeps
        # the number from being given to other memory.
        self._memory: dict[int, tuple[StorageWeakRef, _Origin]] = {}
        self._operators: dict[torch._ops.OpOverload, str] = {}
        self._made = 0
        for name, value in inputs.items():
            if value is not None:
                self.name(value, name, _Origin.INPUT)

    def name(self, tensor: torch.Tensor, name: str, origin: "_Origin") -> str:
        """Give a tensor a name."""
        self._names[tensor] = name
        storage = tensor.untyped_storage()
        self._memory.setdefault(storage._cdata, (StorageWeakRef(storage), origin))
        return name

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a tensor; without one it is a constant."""
        if (name := self._names.get(tensor)) is not None:
            return name
        if self._origin_of(tensor) in (_Origin.INPUT, _Origin.OPERATOR):
            raise NotRecordable("a tensor came of a recorded one by something else than an operator")
        return self.name(tensor, self._constant(tensor), _Origin.OTHER)

    def _origin_of(self, tensor: torch.Tensor) -> "_Origin | None":
        known = self._memory.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or not _DEPENDS_ON_VALUES.isdisjoint(func.tags):
            raise NotRecordable(f"what comes of {func} is not told by shapes alone")
        if _draws(func, args, kwargs):
            raise NotRecordable(f"{func} draws random numbers")
        tensors = [tensor for value in (*args, *kwargs.values()) for tensor in _tensors_in(value)]
        reads = [self.name_of(tensor) for tensor in tensors]
        if func._schema.is_mutable:
            self._check_written(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in _SAME or (func.is_view and _is_whole(tensors, result)):
            self._names[result] = reads[0]
        elif _tensors_in(result) and not (func.is_view and self.constants.keys() >= set(reads)):
            # Not what is no tensor, such as a dtype: that is told by shapes and dtypes. And a view of what keeps its
            # place keeps its own: it will be a constant.
            self._add_line(func, args, kwargs, reads, result)
        return result

    def _check_written(self, func, args, kwargs) -> None:
        for place, argument in enumerate(func._schema.arguments):
            if argument.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                if any(self._origin_of(tensor) is not _Origin.OPERATOR for tensor in _tensors_in(given)):
                    raise NotRecordable(f"{func} writes to what was there before")

    def _add_line(self, func, args, kwargs, reads, result) -> None:
        texts = [self._text(value) for value in args]
        texts += [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        if func not in self._operators:
            self._operators[func] = self._constant(func)
        several = isinstance(result, tuple | list)
        self.lines.append(
            _Line(
                f"{self._operators[func]}({', '.join(texts)})",
                reads,
                [None if each is None else self._name_of_result(each) for each in (result if several else [result])],
                must_run=func._schema.is_mutable,
                several=several,
            )
        )

    def _name_of_result(self, tensor: torch.Tensor) -> str:
        # One that was written to has its name.
        if tensor in self._names:
            return self._names[tensor]
        self._made += 1
        return self.name(tensor, f"v{self._made}", _Origin.OPERATOR)

    def _text(self, value: Any) -> str:
        """An argument, as Python."""
        if isinstance(value, torch.Tensor):
            return self.name_of(value)
        if value is None or type(value) in (bool, int):
            return repr(value)
        if isinstance(value, torch.UntypedStorage):
            raise NotRecordable("memory was given to a tensor that another one has")
        if _tensors_in(value):
            return f"[{', '.join(map(self._text, value))}]"
        return self._constant(value)


def _draws(func, args, kwargs) -> bool:
    """Whether an operator draws random numbers; one that drops out nothing does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    places = [place for place, argument in enumerate(func._schema.arguments) if argument.name == "dropout_p"]
    return not places or (args[places[0]] if places[0] < len(args) else kwargs.get("dropout_p", 0)) != 0


def _is_whole(tensors: list[torch.Tensor], result: Any) -> bool:
    """Whether a view is of all of a tensor, as it is."""
    if not isinstance(result, torch.Tensor):
        return False
    (tensor,) = tensors
    return (result.shape, result.stride(), result.storage_offset(), result.dtype) == (
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
        tensor.dtype,
    )


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """An argument that is a tensor, or those in one that is a list."""
    values = value if isinstance(value, tuple | list) else (value,)
    return [each for each in values if isinstance(each, torch.Tensor)]


def _function(name: str, arguments: Iterable[str], lines: list[_Line], constants: dict[str, Any]) -> Callable:
    """What lines do, as a function: those that something needs."""
    body: list[str] = []
    needed: set[str] = set()
    for line in reversed(lines):
        if not line.must_run and needed.isdisjoint(line.results):
            continue
        names = dict.fromkeys([*line.reads, *filter(None, line.results)])
        # As autograd does, let go of what nothing needs any more: its memory is used again.
        if done := [name for name in names if name not in needed and name not in constants]:
            body.append(f"    {' = '.join(done)} = None")
        # One that is among the arguments was written to.
        new = ["_" if name is None or name in line.reads else name for name in line.results]
        if any(name != "_" for name in new):
            body.append(f"    {', '.join(new)}{',' if line.several else ''} = {line.text}")
        else:
            body.append(f"    {line.text}")
        needed.difference_update(new)
        needed.update(line.reads)
    source = "\n".join([f"def {name}({', '.join(arguments)}):", *reversed(body)])
    namespace = dict(constants)
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return namespace[name]
