"""Whether a guess about a block is right: heads are closed inside the attention function, and writers silenced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from lightning_goldy.core.architecture.blocks import MLP, Attention, Block, Missing
from lightning_goldy.core.sharding import is_sharded

# What attention calls, whichever kernel runs below it; softmax is what eager attention has in common.
ATTENTION_FUNCTIONS = (F.scaled_dot_product_attention, F.softmax, torch.softmax, torch.Tensor.softmax)
# As far apart as two kernels may be in half precision.
_CLOSE = 2e-2


def by_head(attended: Tensor, n_heads: int) -> Tensor | None:
    """A view of what an attention function returned with the heads in the third dimension from the end.

    Args:
        attended: Weights ``[..., H, Tq, Tk]`` or heads ``[..., H, Tq, D]``; samples and heads may be one dimension,
            and key/value groups and the heads of a group two.
        n_heads: H.

    Returns:
        None where the heads cannot be told.

    Example:
        >>> by_head(torch.zeros(6, 5, 5), 3).shape, by_head(torch.zeros(2, 5, 3), 3) is None
        (torch.Size([2, 3, 5, 5]), True)
    """
    if attended.ndim >= 4 and attended.shape[-3] == n_heads:
        return attended
    if attended.ndim == 3 and attended.shape[0] % n_heads == 0:
        return attended.unflatten(0, (-1, n_heads))
    if attended.ndim == 5 and attended.shape[-4] * attended.shape[-3] == n_heads:
        return attended.flatten(-4, -3)
    return None


def verify_attention(run: Callable[[], Any], attention: Attention) -> str:
    """Closes one head inside the attention function and looks for it at the input of the output projection.

    Args:
        run: Calls the model.
        attention: What was guessed.

    Returns:
        Why the guess is wrong or cannot be verified; empty when it holds.
    """
    layout, projection = attention.output.layout, attention.output.module
    head = layout.n_heads - 1
    columns = slice(layout.start(head), layout.start(head) + layout.head_dim)
    with _inputs(projection) as clean:
        run()
    mode = _ClosedHead(layout.n_heads, head)
    with _inputs(projection) as closed, mode.inside(attention.module):
        run()
    whose = f"{attention.output.name!r} is not verified as the attention output projection"
    if not mode.closed:
        return f"{whose}: in what its attention function returns {layout.n_heads} heads cannot be told"
    if len(clean) != 1 or len(closed) != 1 or clean[0].shape[-1] != layout.n_heads * layout.head_dim:
        return f"{whose}: it was called {len(clean)} times, or with another width than {layout.n_heads} heads"
    before, after = clean[0].double(), closed[0].double()
    rest = [index for index in range(before.shape[-1]) if not columns.start <= index < columns.stop]
    scale = _CLOSE * float(before.abs().max())
    if bool((after[..., columns] != 0).any()) or float((after - before)[..., rest].abs().max() if rest else 0) > scale:
        return f"{whose}: a head that is closed in the attention function is no slice of {layout.head_dim} of its input"
    return _verify_slices(attention, head, clean[0])


def _verify_slices(attention: Attention, head: int, heads: Tensor) -> str:
    """A gate on a head and the head's zeroed weights must give the same output."""
    projection = attention.output
    if projection.obstacle or any(map(is_sharded, projection.module.parameters())):
        return ""  # its weights are not cut; gates work all the same
    inside = {id(value): name for name, value in projection.module.named_parameters()}
    values = {}
    for part in projection.head_slice(head):
        weight = part.parameter.detach().clone()
        part.of(weight).zero_()
        values[inside[id(part.parameter)]] = weight
    gated = heads.clone()
    gated.narrow(-1, projection.layout.start(head), projection.layout.head_dim).zero_()
    expected, found = projection.module(gated), functional_call(projection.module, values, (heads,))
    if _near(expected, found):
        return ""
    return f"the weights of head {head} of {projection.name!r} are not verified: zeroed, they do not act as a gate"


def verify_mlp(run: Callable[[], Any], block: Block, mlp: MLP) -> str:
    """Silences what writes the MLP's output: nothing of it may remain but what the MLP was given.

    Args:
        run: Calls the model.
        block: Whose MLP it is.
        mlp: What was guessed.

    Returns:
        Why the guess is wrong; empty when it holds.
    """
    whole = mlp.parts[0].module if len(mlp.parts) == 1 else block.module
    with _outputs([whole]) as clean, _outputs([part.module for part in mlp.writers]) as written:
        run()
    given: list[Tensor] = []
    with _outputs([whole]) as silent, ExitStack() as stack:
        hook = whole.register_forward_pre_hook(partial(_keep_inputs, given), with_kwargs=True)
        stack.callback(hook.remove)
        for part in mlp.writers:
            stack.callback(part.module.register_forward_hook(_silenced).remove)
        run()
    if not clean or len(clean) != len(silent):
        return f"{mlp.output.name!r} is not verified as the MLP's output: its MLP was not called"
    if not any(bool((value != 0).any()) for value in written):
        return ""  # what begins at zero can be seen by its place alone
    if len(mlp.parts) > 1:
        moved = not torch.equal(clean[0], silent[0])
        return "" if moved else f"{mlp.output.name!r} is not verified as the MLP's output: the block goes without it"
    if not bool((silent[0] != 0).any()) or any(_near(value, silent[0]) for value in given):
        return ""  # nothing is left, or the residual that some add inside
    names = ", ".join(repr(part.name) for part in mlp.writers)
    return f"the output of {mlp.parts[0].name!r} has a part that {names} do not write"


class _ClosedHead(TorchFunctionMode):
    """Zeroes one head in what attention functions return while a module runs."""

    def __init__(self, n_heads: int, head: int) -> None:
        super().__init__()
        self.n_heads, self.head = n_heads, head
        self.depth = self.closed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.depth and func in ATTENTION_FUNCTIONS and (seen := by_head(result, self.n_heads)) is not None:
            self.closed += 1
            keep = torch.ones(self.n_heads, 1, 1, dtype=result.dtype, device=result.device)
            keep[self.head] = 0
            return (seen * keep).reshape(result.shape)
        return result

    @contextmanager
    def inside(self, module: nn.Module) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self.depth += 1

        def leave(*_: Any) -> None:
            self.depth -= 1

        handles = (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda _, __, output: seen.append(_first(output).detach().clone()))
            stack.callback(handle.remove)
        yield seen


def _keep_inputs(given: list[Tensor], module: nn.Module, args: Any, options: Any) -> None:
    given += [value.detach().clone() for value in (*args, *options.values()) if isinstance(value, Tensor)]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _silenced(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _near(first: Tensor, second: Tensor) -> bool:
    if first.numel() != second.numel():
        return False
    apart = (first.double().flatten() - second.double().flatten()).abs().max()
    return float(apart) <= _CLOSE * float(first.double().abs().max())


def verified(run: Callable[[], Any], block: Block, *, known: dict[Any, tuple[str, str]]) -> Block:
    """The block with what was guessed wrongly taken out; of blocks of one make the first stands for all.

    Args:
        run: Calls the model.
        block: What was guessed.
        known: Earlier findings by make, added to.
    """
    attention, mlp = block.attention_part, block.mlp_part
    make = (type(block.module), *map(_make, (block, attention, mlp)))
    if make not in known:
        known[make] = (
            verify_attention(run, attention) if isinstance(attention, Attention) else "",
            verify_mlp(run, block, mlp) if isinstance(mlp, MLP) else "",
        )
    wrong_attention, wrong_mlp = known[make]
    return Block(
        block.index,
        block.name,
        block.module,
        Missing(wrong_attention) if wrong_attention else attention,
        Missing(wrong_mlp) if wrong_mlp else mlp,
    )


def _make(part: Block | Attention | MLP | Missing) -> Any:
    if isinstance(part, Attention):
        return type(part.module), type(part.output.module), part.output.layout, part.n_key_value_heads
    if isinstance(part, MLP):
        return tuple(type(writer.module) for writer in (*part.parts, *part.writers))
    return type(part)
