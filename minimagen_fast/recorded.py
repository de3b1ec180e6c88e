"""A computation, with its gradients or without, taken down operator by operator, and run again without its callers.

A good part of a short step on a CPU is Python: modules that call modules, checks, what autograd notes down. The
operators that come of it are the same in every step of the same kind. They are taken down while they run, and written
as one function of Python, one to a line, which runs them again: the same operators, hence the same numbers to the bit.
:func:`record` is for steps of training, of new inputs each; nothing is held longer than autograd would hold it, and
what is fast to compute again is not kept for the backward pass. :func:`record_in_place` is for steps of sampling, which
read and write tensors that stay where they are.

This is right only for what depends on nothing but values of tensors: whoever has something recorded must know that.
"""

import enum
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

# What comes of these is not told by shapes alone.
_DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# In training it writes to averages, if it is given any, and does not say so.
_WRITES_UNSAID = torch.ops.aten.native_batch_norm.default
# Each number of what they give comes of one number of each argument, in about the time in which it would be read from
# main memory. Smaller results stay in the cache.
_CHEAP = {torch.ops.aten.silu.default, torch.ops.aten.addcmul.default}
_LEAST_KEPT = 2**17


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
        inputs: Its inputs, each at the beginning of memory of its own. So are those of a replay, which have the same
            shapes, strides and dtypes, and are None where these are.
        backward: From losses and a gradient of them to the gradients that are wanted.

    Returns:
        What was recorded.

    Raises:
        NotRecordable: if what an operator gives is not told by its arguments' shapes, or depends on chance, or if
            something is written to that was there before.
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
    lines = _with_less_kept(recorder.lines[:forward], recorder.lines[forward:], recorder.written())
    # Views may have been made before.
    late = {recorder.viewed.get(name, name) for line in lines[forward:] for name in line.reads}
    run = _function("replay", inputs, lines, recorder.constants)
    return Recording(run, [name for name in inputs if name in late])


def record_in_place(step: Callable[[], object], written: Iterable[torch.Tensor]) -> Callable[[], None]:
    """Run a computation that reads and writes tensors which stay where they are, and take down its operators.

    Args:
        step: The computation, without gradients.
        written: Those that it writes to, each with memory of its own.

    Returns:
        Does the same again. To be run without gradients and autocast, by one thread at a time.

    Raises:
        NotRecordable: as :func:`record`, but for writing to what may be written to. What was written until then stays
            so.
    """
    recorder = _Recorder({})
    for tensor in written:
        recorder.will_write(tensor)
    with recorder:
        step()
    return _function("replay", (), recorder.lines, recorder.constants)


@dataclass
class _Line:
    """One line of the function.

    Attributes:
        text: What is done, as Python.
        reads: Names of the tensors in it.
        results: Names of what comes of it; None where nothing does.
        must_run: Whether it does more than to give results.
        several: Whether it gives a tuple or list.
        again: Whether it is rather run again than that its result is kept.
        is_view: Whether its result is a view of what it reads.
    """

    text: str
    reads: list[str]
    results: list[str | None]
    must_run: bool = False
    several: bool = False
    again: bool = False
    is_view: bool = False


class _Origin(enum.Enum):
    """Where memory came from."""

    INPUT = enum.auto()
    OPERATOR = enum.auto()
    # It was there before, and stays: to be read, or also to be written to.
    READ = enum.auto()
    WRITTEN = enum.auto()


class _Layout(NamedTuple):
    """How a tensor lies in its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Layout":
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


@dataclass
class _Memory:
    """Memory of tensors.

    Attributes:
        origin: Where it came from.
        name: Of the tensor that was the first in it.
        layout: Of this tensor.
        storage: A weak reference keeps torch from giving its number to other memory.
    """

    origin: _Origin
    name: str
    layout: _Layout
    storage: StorageWeakRef


class _Recorder(TorchDispatchMode):
    """Takes down what torch runs.

    What a tensor is called follows from its memory, and its layout there. So views are nothing to take down: one of a
    view of a view, and so on, is made in one step, when it is first read, for both passes.

    Attributes:
        only_records: Operators run as they do without it: see :func:`.kernels.launch.nothing_looks`.
        lines: What ran.
        constants: By name, the operators, and what they read that none of them made.
        viewed: By the name of a view, that of the tensor whose memory it shows.
    """

    only_records = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # For this torch would import its compiler, which nothing here needs and takes longer than to record.
        return False

    def __init__(self, inputs: Mapping[str, torch.Tensor | None]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self.viewed: dict[str, str] = {}
        self._written_to: set[str] = set()
        self._memory: dict[int, _Memory] = {}
        self._views: dict[tuple[str, _Layout], str] = {}
        # Names of what is no tensor, by what it looks like.
        self._others: dict[str, str] = {}
        self._made = 0
        for name, value in inputs.items():
            if value is not None:
                self.name(value, name, _Origin.INPUT)

    def name(self, tensor: torch.Tensor, name: str, origin: _Origin) -> str:
        """Give a tensor in memory that is not known yet a name."""
        storage = tensor.untyped_storage()
        self._memory[storage._cdata] = _Memory(origin, name, _Layout.of(tensor), StorageWeakRef(storage))
        return name

    def will_write(self, tensor: torch.Tensor) -> None:
        """Allow that a tensor, which is there already, is written to."""
        self.name(tensor, self._constant(tensor), _Origin.WRITTEN)

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name of a tensor, which is a constant if its memory is not known yet."""
        memory, layout = self._memory_of(tensor), _Layout.of(tensor)
        if memory is None:
            return self.name(tensor, self._constant(_alone(tensor)), _Origin.READ)
        if layout == memory.layout:
            return memory.name
        if (memory.name, layout) not in self._views:
            self._views[memory.name, layout] = self._view(tensor, memory, layout)
        return self._views[memory.name, layout]

    def _view(self, tensor: torch.Tensor, memory: _Memory, layout: _Layout) -> str:
        if memory.origin in (_Origin.READ, _Origin.WRITTEN):
            return self._constant(_alone(tensor))
        if layout.dtype != memory.layout.dtype:
            raise NotRecordable(f"memory of {memory.layout.dtype} is read as {layout.dtype}")
        name = self._new_name()
        self.viewed[name] = memory.name
        places = ", ".join(map(self._text, layout[:3]))
        text = f"{self._other('view', torch.as_strided)}({memory.name}, {places})"
        self.lines.append(_Line(text, [memory.name], [name], is_view=True))
        return name

    def _memory_of(self, tensor: torch.Tensor) -> _Memory | None:
        return self._memory.get(tensor.untyped_storage()._cdata)

    def written(self) -> set[str]:
        """Names of tensors whose memory an operator has written to after they were made."""
        return self._written_to | {name for name, base in self.viewed.items() if base in self._written_to}

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _new_name(self) -> str:
        self._made += 1
        return f"v{self._made}"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload) or not _DEPENDS_ON_VALUES.isdisjoint(func.tags):
            raise NotRecordable(f"what comes of {func} is not told by shapes alone")
        if _draws(func, args, kwargs):
            raise NotRecordable(f"{func} draws random numbers")
        if func is _WRITES_UNSAID and _trains_averages(*args):
            raise NotRecordable(f"{func} writes to what was there before")
        given = _tensors_in([*args, *kwargs.values()])
        for tensor in given:
            if self._memory_of(tensor) is None:
                self.name_of(tensor)
        written = self._tensors_written(func, args, kwargs) if func._schema.is_mutable else []
        before = [_Layout.of(tensor) for tensor in written]
        result = func(*args, **kwargs)
        if before != [_Layout.of(tensor) for tensor in written]:
            raise NotRecordable(f"{func} gives a tensor another layout")
        # What is no tensor, such as a dtype, is told by shapes and dtypes; and a view, by its layout.
        if written or any(self._memory_of(tensor) is None for tensor in _tensors_in([result])):
            self._add_line(func, args, kwargs, given, result, bool(written))
        return result

    def _tensors_written(self, func, args, kwargs) -> list[torch.Tensor]:
        """The tensors that an operator writes to."""
        arguments = enumerate(func._schema.arguments)
        places = [(place, argument.name) for place, argument in arguments if argument.is_write]
        found = _tensors_in([args[place] if place < len(args) else kwargs.get(name) for place, name in places])
        memories = [self._memory_of(tensor) for tensor in found]
        if any(memory is None or memory.origin in (_Origin.INPUT, _Origin.READ) for memory in memories):
            raise NotRecordable(f"{func} writes to what was there before")
        self._written_to |= {memory.name for memory in memories if memory is not None}
        return found

    def _add_line(self, func, args, kwargs, given, result, writes: bool) -> None:
        texts = [self._text(value) for value in args]
        texts += [f"{key}={self._text(value)}" for key, value in kwargs.items()]
        several = isinstance(result, tuple | list)
        self.lines.append(
            _Line(
                # What its own call passes on to.
                f"{self._other(str(func), getattr(func, '_op', func))}({', '.join(texts)})",
                [self.name_of(tensor) for tensor in given],
                [self._name_of_result(each) for each in (result if several else [result])],
                must_run=writes,
                several=several,
                again=func in _CHEAP and result.nbytes >= _LEAST_KEPT,
            )
        )

    def _name_of_result(self, value: Any) -> str | None:
        if not isinstance(value, torch.Tensor) or self._memory_of(value) is not None:
            # One in known memory was written to, or shares that of another result.
            return None
        return self.name(value, self._new_name(), _Origin.OPERATOR)

    def _text(self, value: Any) -> str:
        """An argument, as Python."""
        if isinstance(value, torch.Tensor):
            return self.name_of(value)
        if value is None or type(value) in (bool, int):
            return repr(value)
        if _tensors_in([value]):
            return f"[{', '.join(map(self._text, value))}]"
        return self._other(f"{type(value).__name__} {value!r}", value)

    def _other(self, looks: str, value: Any) -> str:
        """The name of what is no tensor."""
        if looks not in self._others:
            self._others[looks] = self._constant(value)
        return self._others[looks]


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or one like it that does not hold on to the one of which it is a view.

    A parameter that something in torch holds on to cannot be swapped, as ``torch.__future__`` has it on request.
    """
    # Below autograd, where a recorder is called, this is no view again.
    return tensor if tensor._base is None else tensor.detach()


def _draws(func, args, kwargs) -> bool:
    """Whether an operator draws random numbers; one that drops out nothing does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    places = [place for place, argument in enumerate(func._schema.arguments) if argument.name == "dropout_p"]
    return not places or (args[places[0]] if places[0] < len(args) else kwargs.get("dropout_p", 0)) != 0


def _trains_averages(x, weight, bias, mean, variance, training, *_) -> bool:
    """Whether a batch normalisation of these arguments writes to its averages."""
    return training and mean is not None


def _tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those among values, and in lists of them."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors_in(value)
    return found


def _with_less_kept(forward: list[_Line], backward: list[_Line], written: set[str]) -> list[_Line]:
    """All lines, and in the backward pass once more those of the forward pass that are better run again.

    That is so where all that they read is kept in any case. What they give is then not kept from one to the other.
    """
    made = {name: line for line in forward for name in line.results if name}
    kept = {name for line in backward for name in line.reads}

    def is_made_again(name: str) -> bool:
        line = made.get(name)
        if line is None or line.is_view:
            # A view takes no memory but that of which it is.
            return line is not None and is_made_again(line.reads[0])
        return line.again and written.isdisjoint([name, *line.reads]) and all(map(is_there, line.reads))

    def is_there(name: str) -> bool:
        return name in kept or name not in made or is_made_again(name)

    lines, there = list(forward), set[str]()

    def make(name: str) -> None:
        if name not in there and is_made_again(name):
            there.add(name)
            for read in made[name].reads:
                make(read)
            lines.append(made[name])

    for line in backward:
        for name in line.reads:
            make(name)
        lines.append(line)
    return lines


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
        new = [name or "_" for name in line.results]
        if any(name != "_" for name in new):
            body.append(f"    {', '.join(new)}{',' if line.several else ''} = {line.text}")
        else:
            body.append(f"    {line.text}")
        needed.difference_update(new)
        needed.update(line.reads)
    source = "\n".join([f"def {name}({', '.join(arguments)}):", *reversed(body)])
    namespace = dict(constants)
    exec(compile(source, f"<{name}>", "exec"), namespace)
    # Left there the function would be in a cycle, in which the weights' memory would wait for the garbage collector.
    return namespace.pop(name)
