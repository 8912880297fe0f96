"""Leave no trace: whatever an analysis does inside, training goes on as if it had not run."""

from __future__ import annotations

import copy
import dis
import io
import math
import random
import sys
import sysconfig
import types
from array import array
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache, lru_cache, partial
from itertools import chain, islice, repeat
from multiprocessing.sharedctypes import SynchronizedBase
from operator import is_
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_goldy.core.composed import without_reentrant_checkpoints
from lightning_goldy.core.sharding import (
    UnseenByReducer,
    is_sharded,
    local,
    meet_within,
    modules_of,
    parameters_of,
    reducer_counts,
    unshard_guard,
)
from lightning_goldy.core.tasks import require_unscaled

SMALL = 2**20
"""Elements of the largest tensor or array that is copied for an object that is no module."""
_COPIED = 2**24
"""Elements of all of them together."""
_FOLLOWED = 2**16
"""Objects that are looked at, the nearest first."""
_TRAINER_SLOTS = frozenset({"trainer", "_trainer", "_fabric"})
_MODULE_SLOTS = _TRAINER_SLOTS | frozenset(vars(nn.Module()))
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")
_MISSING = object()
_NONE: Mapping[Any, Any] = types.MappingProxyType({})
# Most values are of these, and to ask whether one is an iterator takes longer than all the rest.
_PLAIN = frozenset({type(None), bool, int, float, str})
_AT_NO_PLACE = _PLAIN | {tuple, list, dict, set, Tensor, nn.Parameter, torch.dtype}
_CONTAINERS = (list, dict, set, tuple, deque)
_ENTERED = (DataLoader, Dataset, Sampler, SobolEngine, types.SimpleNamespace, UserDict, UserList, Queue)
_NOTED = (
    *_CONTAINERS,
    *(type, types.FunctionType, types.MethodType, partial, Tensor, np.ndarray, bytearray, array, io.IOBase, Iterator),
    *(torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator),
    SynchronizedBase,
)
# Their generators are theirs alone.
_COLLATORS = "transformers.data."
_BACKWARD_HOOKS = ("_backward_pre_hooks", "_backward_hooks")
_CALLED_HOOKS = ("_forward_pre_hooks", "_forward_hooks", *_BACKWARD_HOOKS)
# Beside their functions, how modules call them.
_HOOK_SLOTS = (
    *_CALLED_HOOKS,
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
# Of a module, what a batch passes: its other functions belong to the training.
_ON_THE_WAY = ("forward", "_batch_transfer", "_to_device", "_dataloader")


def random_states() -> dict[str, Any]:
    """The states of Python, NumPy, torch and all CUDA devices, in types that load under ``weights_only``."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    words = torch.from_numpy(np.asarray(keys).astype(np.int64))
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, words, int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": _device_states(),
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undoes :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    _restore_device_states(states["cuda"])


def _device_states() -> list[Tensor]:
    # Asking an uninitialised CUDA for its states would initialise it, which forked workers cannot survive.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []


def _restore_device_states(states: Sequence[Tensor]) -> None:
    if states and len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states])


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Restores the random states of Python, NumPy, torch and every CUDA device, also after an exception.

    Example:
        >>> state = torch.get_rng_state()
        >>> with isolated_rng():
        ...     noise = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    # As they are, for none leaves the process: other types take as long again.
    python, numpy, cpu, devices = random.getstate(), np.random.get_state(), torch.get_rng_state(), _device_states()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        _restore_device_states(devices)


class Replayed(Iterator[Any]):
    """An iterator that cannot go back, and gives again what was taken of it while :meth:`record` was on.

    Args:
        source: A generator, a count, a file that has been read from: anything that only goes on.

    Example:
        >>> counted = Replayed(iter([1, 2, 3]))
        >>> counted.record()
        >>> next(counted), next(counted), counted.replay(), list(counted)
        (1, 2, 2, [1, 2, 3])
    """

    __slots__ = ("_again", "_source", "_taken")

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self._again: deque[Any] = deque()
        self._taken: list[list[Any]] = []

    def __next__(self) -> Any:
        item = self._again.popleft() if self._again else next(self._source)
        if self._taken:
            try:
                # What is done to an item is not done to the one that is given again.
                self._taken[-1].append(copy.deepcopy(item))
            except Exception:  # noqa: BLE001 - what cannot be copied
                self._taken[-1].append(item)
        return item

    def __getattr__(self, name: str) -> Any:
        if name in self.__slots__ or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def record(self) -> None:
        """From here on, what is taken is to be given again; recordings nest."""
        self._taken.append([])

    def replay(self) -> int:
        """Ends the last recording; how many items of it will be given again."""
        taken = self._taken.pop()
        self._again.extendleft(reversed(taken))
        return len(taken)

    @property
    def source(self) -> Iterator[Any] | Replayed:
        """What stands in a place from here on: the source itself where nothing of it is to be given again."""
        return self if self._again or self._taken else self._source


class Kept:
    """What objects hold, to be put back as it was: attributes, containers, counters, generators of random numbers.

    An object's attributes and a container's items are noted by reference, and put back where they are others. Through
    containers, samplers, datasets, loaders, transformers' collators, closures and objects of the user's own classes
    they are followed, the nearest 65,536; other objects of installed libraries are not entered. Tensors and arrays
    are copied up to ``limit`` elements each and 16 million in all. What a program shares (globals that a function
    names, its defaults, attributes of classes) stays bound as it is, for it may count what happens, but generators
    and objects in it are put back.

    An iterator that cannot go back (a generator, ``itertools.count()``, a pipe) is followed through attributes, lists,
    dicts and closures: until :meth:`restore` a :class:`Replayed` stands in its place, which gives again what was taken.

    Args:
        roots: The objects.
        limit: Elements of the largest tensor or array to copy.

    Attributes:
        iterators: Those that it met, in such places or others.
        replayed: By kind, how many items of them will be given again; filled by :meth:`restore`.

    Example:
        >>> counts, generator = {"read": 0}, torch.Generator().manual_seed(0)
        >>> kept = Kept([counts, generator])
        >>> counts["read"], first = 1, torch.rand(1, generator=generator)
        >>> kept.restore()
        >>> counts, torch.equal(first, torch.rand(1, generator=generator))
        ({'read': 0}, True)
    """

    def __init__(self, roots: Iterable[Any] = (), *, limit: int = SMALL) -> None:
        self._limit, self._left, self._waiting = limit, float(_COPIED), _FOLLOWED
        # The objects stay referenced, so that no id is taken twice.
        self._known: dict[int, Any] = {}
        self._in_place: dict[int, Any] = {}
        self._storages: set[int] = set()
        self._undo: list[Callable[[], Any]] = []
        self.iterators: list[Any] = []
        self.replayed: dict[str, int] = {}
        self._stands: dict[int, Replayed] = {}
        for root in roots:
            self._follow(self._note_attributes(root) if _has_attributes(root) else [root])

    @classmethod
    def of_modules(cls, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter]) -> Kept:
        """What modules keep in attributes, where a forward may put counters and caches; no tensor of a parameter."""
        kept = cls(limit=2**24)
        kept._left = math.inf
        buffers = [buffer for child in modules for buffer in child._buffers.values() if buffer is not None]
        tensors = [local(tensor) if is_sharded(tensor) else tensor for tensor in (*parameters, *buffers)]
        kept._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if _has_storage(tensor)} - {0}
        for child in modules:
            kept._waiting = _FOLLOWED
            kept._follow(kept._note_attributes(child, _MODULE_SLOTS))
            if hooks := [hook for name in _CALLED_HOOKS for hook in getattr(child, name).values()]:
                kept._follow(chain.from_iterable(map(_held_by, hooks)))
        for parameter in parameters:
            if hooks := [*(getattr(parameter, "_backward_hooks", None) or {}).values()]:
                kept._follow(chain.from_iterable(map(_held_by, hooks)))
        return kept

    def restore(self) -> None:
        """Puts everything back."""
        for stand in {id(stand): stand for stand in self._stands.values()}.values():
            if count := stand.replay():
                kind = type(stand._source).__name__
                self.replayed[kind] = self.replayed.get(kind, 0) + count
        with torch.no_grad():
            for undo in reversed(self._undo):
                undo()

    def _stand_in(self, items: Iterable[tuple[Any, Any]], put: Callable[[Any, Any], Any]) -> None:
        """Puts something that gives again into the places of iterators that cannot go back."""
        held = [pair for pair in items if type(pair[1]) not in _AT_NO_PLACE and self._cannot_go_back(pair[1])]
        for place, value in held:
            stand = self._stands.get(id(value))
            if stand is None:
                stand = value if isinstance(value, Replayed) else Replayed(value)
                stand.record()
                self._stands[id(value)] = self._stands[id(stand)] = stand
                self._known[id(value)], self._known[id(stand)] = value, stand
                self.iterators.append(value)
            put(place, stand)
            # The last to be undone here, when the place has its old value back.
            self._undo.append(partial(_put_source, put, place, stand))

    def _cannot_go_back(self, value: Any) -> bool:
        # A configuration, which every module may hold, takes long to say of what class it is, and is asked once.
        if id(value) in self._in_place:
            return False
        if _is_one_way(value):
            return True
        self._in_place[id(value)] = value
        return False

    def _note_attributes(self, owner: Any, leaving: frozenset[str] = _TRAINER_SLOTS) -> list[Any]:
        if id(owner) in self._known:
            return []
        self._known[id(owner)] = owner
        now = getattr(owner, "__dict__", None)
        held = {} if now is None else {name: value for name, value in now.items() if name not in leaving}
        if now is not None:
            before = dict(now)
            self._stand_in(held.items(), now.__setitem__)
            self._undo.append(partial(_put_back_attributes, now, before, leaving))
        for name in _slots(type(owner)):
            held[name] = getattr(owner, name, _MISSING)
            self._stand_in([(name, held[name])], partial(object.__setattr__, owner))
            self._undo.append(partial(_put_back_slot, owner, name, held[name]))
        return [*(value for value in held.values() if type(value) not in _PLAIN), type(owner)]

    def _follow(self, nearest: Iterable[Any]) -> None:
        queue = deque(nearest)
        while queue and self._waiting > 0:
            value = queue.popleft()
            kind = type(value)
            if kind in _PLAIN or id(value) in self._known or isinstance(value, (str, bytes, int, float, complex)):
                continue
            self._waiting -= 1
            if value.__class__ is kind and _is_inert(kind):
                pass
            elif isinstance(value, _CONTAINERS):
                queue.extend(self._note_container(value))
            elif isinstance(value, type):
                queue.extend(self._shared_by_class(value))
            elif isinstance(value, types.FunctionType):
                queue.extend(self._note_function(value))
            elif isinstance(value, types.MethodType):
                queue.extend((value.__self__, value.__func__))
            elif isinstance(value, partial):
                queue.extend((value.func, value.args, value.keywords))
            elif not self._note_leaf(value) and _is_entered(value):
                queue.extend(self._note_attributes(value))
            self._known[id(value)] = value

    def _shared_by_class(self, kind: type) -> Iterator[Any]:
        """What a class of the user's holds for all of its objects, and what its functions rest on."""
        if not _is_of_the_user(kind.__module__) or _goes_its_own_way(kind):
            return
        trains = issubclass(kind, nn.Module)
        for name, value in list(vars(kind).items()):
            function = getattr(value, "__func__", getattr(value, "fget", value))
            if not isinstance(function, types.FunctionType):
                yield from _in_shared(value)
            elif not trains or name.endswith(_ON_THE_WAY):
                yield function
        yield from kind.__bases__

    def _note_container(self, value: Any) -> list[Any]:
        attributes = self._note_attributes(value) if _is_entered(value) else []
        if not isinstance(value, tuple):
            held = next(kind for kind in (dict, list, set, deque) if isinstance(value, kind))(value)
            if not isinstance(value, set):
                pairs = held.items() if isinstance(held, dict) else enumerate(list(held))
                self._stand_in(pairs, value.__setitem__)
            self._undo.append(partial(_put_back_items, value, held))
        items = value.values() if isinstance(value, dict) else value
        return attributes + list(islice(items, self._waiting))

    def _note_function(self, function: types.FunctionType) -> Iterator[Any]:
        """Notes the closure; gives what is in it, in the defaults, and in the globals that the function names."""
        if not _is_of_the_user(str(function.__module__)):
            return
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            self._stand_in([("cell_contents", value)], partial(setattr, cell))
            self._undo.append(partial(setattr, cell, "cell_contents", value))
            yield value
        shared = [function.__defaults__, function.__kwdefaults__, vars(function), *_named_globally(function)]
        for value in shared:
            yield from _in_shared(value)

    def _note_leaf(self, value: Any) -> bool:
        """Notes what has a state of its own kind; whether it is of such a kind."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and self._may_copy(value.numel()):
                self._note_tensor(value)
        elif isinstance(value, np.ndarray):
            if value.flags.writeable and not value.dtype.hasobject and self._may_copy(value.size):
                self._undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, (bytearray, array)):
            if self._may_copy(len(value)):
                self._undo.append(partial(_put_back_numbers, value, value[:]))
        elif isinstance(value, torch.Generator):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):
            self._undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self._undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, np.random.BitGenerator):
            self._undo.append(partial(setattr, value, "state", value.state))
        elif isinstance(value, SynchronizedBase) and hasattr(value, "value"):
            self._undo.append(partial(setattr, value, "value", value.value))
        elif isinstance(value, io.IOBase):
            self._note_file(value)
        elif isinstance(value, Iterator):
            if hasattr(value, "__dict__"):
                return False
            # A repetition of one value without end is at no place.
            if not isinstance(value, repeat):
                self.iterators.append(value)
        else:
            return False
        return True

    def _may_copy(self, size: int) -> bool:
        fits = size <= min(self._limit, self._left)
        self._left -= size if fits else 0
        return fits

    def _note_tensor(self, tensor: Tensor) -> None:
        part = local(tensor)
        if not _has_storage(part) or part.untyped_storage().data_ptr() in self._storages:
            return
        held, version = part.detach().clone(), None if tensor.is_inference() else tensor._version
        recorded = tensor.requires_grad

        def put_back() -> None:
            # Only what was written to, because a graph may have saved the tensor.
            if version is None or tensor._version != version:
                local(tensor).copy_(held)
                _leave_graph(tensor, recorded)

        self._undo.append(put_back)

    def _note_file(self, file: io.IOBase) -> None:
        try:
            self._undo.append(partial(file.seek, file.tell()))
        except (OSError, ValueError):  # it is closed, or has no places, as a pipe
            if not file.closed and file.readable():
                self.iterators.append(file)


def _put_source(put: Callable[[Any, Any], Any], place: Any, stand: Replayed) -> None:
    put(place, stand.source)


def _is_one_way(value: Any) -> bool:
    """Whether an iterator cannot be put back to where it is."""
    if isinstance(value, io.IOBase):
        try:
            value.tell()
        except (OSError, ValueError):  # it is closed, a pipe, or has been read by lines
            return not value.closed and value.readable()
        return False
    return isinstance(value, Iterator) and not hasattr(value, "__dict__") and not isinstance(value, repeat)


def _leave_graph(tensor: Tensor, recorded: bool) -> None:
    """Takes a tensor that was written to out of the graph that it came into by that."""
    if tensor.requires_grad and not recorded and not tensor._is_view():
        tensor.detach_()


def _held_by(hook: Any, depth: int = 3) -> Iterator[Any]:
    """What a hook keeps: the object that it is of. What a function counts stays, as what a program shares does."""
    if not isinstance(hook, types.FunctionType):
        yield hook
        return
    for cell in (hook.__closure__ or ()) if depth else ():
        with suppress(ValueError):  # not assigned yet
            for value in _in_shared(cell.cell_contents):
                yield from _held_by(value, depth - 1)


def _put_back_attributes(now: dict[str, Any], held: Mapping[str, Any], leaving: frozenset[str]) -> None:
    if _same_items(now, held):
        return
    for name in [name for name in now if name not in held and name not in leaving]:
        del now[name]
    for name, value in held.items():
        if name not in leaving and (name not in now or now[name] is not value):
            now[name] = value


def _same_items(now: Mapping[Any, Any], held: Mapping[Any, Any]) -> bool:
    return len(now) == len(held) and all(map(is_, now, held)) and all(map(is_, now.values(), held.values()))


def _put_back_slot(owner: Any, name: str, held: Any) -> None:
    if getattr(owner, name, _MISSING) is not held:
        # Also of frozen classes.
        object.__delattr__(owner, name) if held is _MISSING else object.__setattr__(owner, name, held)


def _put_back_items(now: Any, held: Any) -> None:
    if isinstance(now, dict):
        same = _same_items(now, held)
    elif isinstance(now, set):
        same = len(now) == len(held) and now >= held
    else:
        same = len(now) == len(held) and all(map(is_, now, held))
    if not same:
        now.clear()
        (now.update if isinstance(now, (dict, set)) else now.extend)(held)


def _put_back_numbers(now: Any, held: Any) -> None:
    if now != held:
        now[:] = held


def _slots(kind: type) -> tuple[str, ...]:
    if issubclass(kind, nn.Module):
        return ()
    users = [base for base in kind.__mro__ if "__slots__" in vars(base) and _is_of_the_user(base.__module__)]
    named = [(base.__slots__,) if isinstance(base.__slots__, str) else tuple(base.__slots__) for base in users]  # type: ignore[attr-defined]
    # A subclass may put a property in a slot's place.
    slots = types.MemberDescriptorType
    return tuple(name for names in named for name in names if isinstance(getattr(kind, name, None), slots))


def _in_shared(value: Any, depth: int = 3) -> Iterator[Any]:
    """What there is in containers that stay as they are."""
    if isinstance(value, _CONTAINERS):
        for item in islice(value.values() if isinstance(value, dict) else value, _FOLLOWED if depth else 0):
            yield from _in_shared(item, depth - 1)
    elif not isinstance(value, (Tensor, np.ndarray)):
        yield value


def _named_globally(function: types.FunctionType) -> Iterator[Any]:
    """The values of the globals that a function names, also in modules of the user's."""
    names, attributes = _names_in(function.__code__)
    for value in (function.__globals__[name] for name in names if name in function.__globals__):
        if not isinstance(value, types.ModuleType):
            yield value
        elif _is_of_the_user(value.__name__):
            yield from (vars(value)[name] for name in attributes if name in vars(value))


@cache
def _names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that code names, and its attributes."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    named = [instruction.argval for instruction in dis.get_instructions(code) if instruction.opname == "LOAD_GLOBAL"]
    attributes = frozenset(code.co_names).difference(named)
    return frozenset(named).union(*(names for names, _ in inner)), attributes.union(*(other for _, other in inner))


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _has_attributes(value: Any) -> bool:
    # A module's are noted where its parameters and buffers are looked after.
    return hasattr(value, "__dict__") and not isinstance(
        value, (type, types.FunctionType, types.ModuleType, nn.Module, Tensor)
    )


def _is_entered(value: Any) -> bool:
    if type(value) in _CONTAINERS:
        return False
    if not _has_attributes(value) and (isinstance(value, (nn.Module, Tensor, type)) or not _slots(type(value))):
        return False
    if isinstance(value, _ENTERED):
        return True
    if type(value).__module__.startswith(_COLLATORS):
        return True
    return not _is_of_lightning(type(value)) and _is_of_the_user(type(value).__module__)


@lru_cache(maxsize=256)
def _is_inert(kind: type) -> bool:
    """Whether objects that say to be of this class hold nothing that is noted, as a library's configurations.

    Asked of the class, because some configurations take long to say of what class they are.
    """
    entered = issubclass(kind, _ENTERED) or kind.__module__.startswith(_COLLATORS)
    users = not _is_of_lightning(kind) and _is_of_the_user(kind.__module__)
    return not (entered or users or issubclass(kind, _NOTED))


def _is_of_lightning(kind: type) -> bool:
    """Whether it is a trainer or a callback, which goes its own way, or what a trainer is given."""
    return any(base.__module__.partition(".")[0] in _LIGHTNING for base in kind.__mro__)


def _goes_its_own_way(kind: type) -> bool:
    given = any(".core." in base.__module__ for base in kind.__mro__ if base.__module__.startswith(_LIGHTNING))
    return _is_of_lightning(kind) and not given


@cache
def _is_of_the_user(module: str) -> bool:
    """Whether a module is neither of Python, nor of this package, nor installed with others."""
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root == __name__.partition(".")[0]:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    installed = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")]
    if file is None or any(Path(file).is_relative_to(path) for path in installed):
        return file is None
    # Of the system, or of a path file.
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _uncompiled(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """A context in which nothing of modules is compiled, nor what was compiled of them is used.

    Modes, shapes and derivatives of an analysis would use up the times that dynamo compiles a function anew.
    """
    compiled = any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in modules)
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def _run_plainly(modules: Iterable[nn.Module]) -> Iterator[None]:
    with _uncompiled(modules), without_reentrant_checkpoints():
        yield


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _read_by(forward: Any) -> tuple[str, ...]:
    """Attributes that an overridden forward reads; none of torch's own, to which ``padding_idx`` means a gradient."""
    code = getattr(forward, "__code__", None)
    return () if forward is nn.Embedding.forward or code is None else code.co_names


@contextmanager
def preserved(module: nn.Module, *, training: bool | None = False) -> Iterator[nn.Module]:
    """Gives a module to an analysis and takes it back as it was: gradients, modes, buffers, attributes, random states.

    Gradients are set aside, not copied, and so are hooks that wait for them, backward hooks of modules too; buffers are
    copied and written back, and so is what the modules and their hooks keep (counters, caches, lists: see
    :class:`Kept`); the parameters' values are the business of :func:`~lightning_goldy.core.vector.applied`, but of
    embeddings with a ``max_norm``. Inside, gradients are enabled (Lightning's validation hooks run without) and those
    of embeddings dense, of every row (none has a ``padding_idx``) and not divided by how often a row is read
    (``scale_grad_by_freq``), a compiled module runs uncompiled, a reentrant checkpoint as one that is not, and, by
    default, the module is in evaluation mode.

    Args:
        module: The model.
        training: Mode inside: False for evaluation, True for training, None to leave each submodule's mode.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> model[0].weight.grad = torch.ones(2, 2)
        >>> with preserved(model):
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> model[0].weight.grad.sum().item(), model.training
        (4.0, True)
    """
    # Listed once, because a walk over the modules of a small model takes as long as a layer of it.
    children = modules_of(module)
    require_unscaled(module, children)
    unshard_guard(module, children)
    parameters = parameters_of(children)
    modes = [child.training for child in children]
    gradients, buffers, lengths = _Gradients(parameters, children), _Buffers(children), _Lengths(children)
    kept = Kept.of_modules(children, parameters)
    for child in children:
        if isinstance(child, _EMBEDDINGS):
            # Analyses calculate with gradients, which they want dense, and of every row that the forward reads.
            child.sparse = child.scale_grad_by_freq = False
            if isinstance(child, nn.Embedding) and "padding_idx" not in _read_by(type(child).forward):
                child.padding_idx = None
    # A sharded model's forward is a collective: a rank that failed before it tells the others there.
    guard = module.register_forward_pre_hook(_at_forward, prepend=True) if any(map(is_sharded, parameters)) else None
    with isolated_rng(), torch.inference_mode(False), torch.enable_grad(), _run_plainly(children):
        try:
            gradients.set_aside()
            if training is not None:
                # Not by train(), which some layers override to merge adapters into their weights.
                for child in children:
                    if child.training is not training:
                        child.training = training
            yield module
        finally:
            lengths.put_back()
            if guard is not None:
                guard.remove()
            unshard_guard(module)
            buffers.put_back()
            for child, mode in zip(children, modes, strict=True):
                if child.training is not mode:
                    child.training = mode
            kept.restore()
            gradients.put_back()


class _Gradients:
    """Gradients of parameters, whether they want any, hooks that wait for them, and all other hooks of modules."""

    def __init__(self, parameters: Sequence[nn.Parameter], children: Sequence[nn.Module]) -> None:
        self._held = [(parameter, parameter.grad, parameter.requires_grad) for parameter in parameters]
        # Whoever trains within such hooks (an optimizer in the backward pass, stages of ZeRO) would take these
        # gradients.
        waiting = [held for parameter in parameters if (held := parameter._post_accumulate_grad_hooks)]
        # Those of modules hear of the training's passes alone, too, and forward mode cannot pass them.
        waiting += [held for child in children for name in _BACKWARD_HOOKS if (held := getattr(child, name))]
        self._waiting = waiting
        # A forward may register hooks once, and mark that in an attribute, as transformers does to capture hidden
        # states: they go when the mark goes, or the training's own forward would register them again.
        slots = [getattr(child, name) for child in children for name in _HOOK_SLOTS]
        # Of most modules all are empty.
        self._hooks = [(held, dict(held) if held else _NONE) for held in (*waiting, *slots)]

    def set_aside(self) -> None:
        for parameter, _, _ in self._held:
            parameter.grad = None
        for held in self._waiting:
            held.clear()

    def put_back(self) -> None:
        for held, owned in self._hooks:
            if (held or owned) and list(held) != list(owned):
                held.clear()
                held.update(owned)
        for parameter, gradient, needed in self._held:
            if parameter.requires_grad is not needed:
                parameter.requires_grad_(needed)
            parameter.grad = gradient


class _Buffers:
    """Buffers by owner, because a forward may put a new tensor in a buffer's place, and copies of what is in them."""

    def __init__(self, children: Iterable[nn.Module]) -> None:
        self._owners = [
            (
                child,
                {
                    name: (buffer, None if buffer is None else (local(buffer).detach().clone(), buffer.requires_grad))
                    for name, buffer in child._buffers.items()
                },
            )
            for child in children
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for child, owned in self._owners:
            for name, (buffer, value) in owned.items():
                if buffer is not None and value is not None:
                    # Detached, also a buffer made in inference mode can be written to.
                    local(buffer).copy_(value[0])
                    _leave_graph(buffer, value[1])
                child._buffers[name] = buffer
            if len(child._buffers) != len(owned):
                for name in set(child._buffers) - set(owned):
                    del child._buffers[name]


class _Lengths:
    """Weights of embeddings that a forward pass shortens in place."""

    def __init__(self, children: Iterable[nn.Module]) -> None:
        weights = [child.weight for child in children if isinstance(child, _EMBEDDINGS) and child.max_norm]
        self._weights = [(weight, local(weight).detach().clone()) for weight in weights]

    @torch.no_grad()
    def put_back(self) -> None:
        for weight, before in self._weights:
            if not torch.equal(local(weight), before):
                local(weight).copy_(before)


def _at_forward(module: nn.Module, inputs: Any) -> None:
    meet_within("a forward pass of the sharded model")


@contextmanager
def undisturbed(trainer: Any, pl_module: nn.Module, *, training: bool | None = False) -> Iterator[nn.Module]:
    """The whole isolation of an analysis that runs inside a training loop.

    Everything of :func:`preserved`, for the unwrapped LightningModule (so DistributedDataParallel reduces nothing),
    under the trainer's own autocast, whose cache of low-precision weights is dropped on both sides. Where
    DistributedDataParallel takes account of gradients outside of its own passes, it does not see them.

    Args:
        trainer: The Lightning trainer.
        pl_module: Its LightningModule.
        training: Mode inside, as for :func:`preserved`.

    Yields:
        The LightningModule.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved(pl_module, training=training))
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(trainer.precision_plugin.forward_context())
        if reducer_counts(trainer):
            stack.enter_context(UnseenByReducer())
        yield pl_module
