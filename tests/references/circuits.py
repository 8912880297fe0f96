"""Patched runs by hand: one forward pass per reader, with modules named family by family."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.circuits import CircuitGraph, PromptPairs

# Norm before attention, queries, keys, values, output projection, norm after; norm before the MLP, the MLP, norm after.
SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = ("input_layernorm", *SEPARATE, "self_attn.o_proj", "", "post_attention_layernorm", "mlp", "")
FAMILIES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "gpt2": ("transformer.h", "ln_f", ("ln_1", *["attn.c_attn"] * 3, "attn.c_proj", "", "ln_2", "mlp", "")),
    "llama": ("model.layers", "norm", LLAMA),
    "qwen3": ("model.layers", "norm", LLAMA),
    "phi3": ("model.layers", "norm", ("input_layernorm", *["self_attn.qkv_proj"] * 3, *LLAMA[4:])),
    "gpt_neox": (
        "gpt_neox.layers",
        "final_layer_norm",
        (
            "input_layernorm",
            *["attention.query_key_value"] * 3,
            "attention.dense",
            "",
            "post_attention_layernorm",
            "mlp",
            "",
        ),
    ),
    "gpt_bigcode, one key": (
        "transformer.h",
        "ln_f",
        ("ln_1", *["attn.c_attn"] * 3, "attn.c_proj", "", "ln_2", "mlp", ""),
    ),
    "persimmon": (
        "model.layers",
        "final_layernorm",
        (
            "input_layernorm",
            *["self_attn.query_key_value"] * 3,
            "self_attn.dense",
            "",
            "post_attention_layernorm",
            "mlp",
            "",
        ),
    ),
    "gemma2": (
        "model.layers",
        "norm",
        (
            "input_layernorm",
            *SEPARATE,
            "self_attn.o_proj",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "mlp",
            "post_feedforward_layernorm",
        ),
    ),
}


def in_float64(model: Any) -> Any:
    """The model in float64, and so its norms, which compute in float32 of themselves."""

    def forward(norm: Any, stream: Tensor) -> Tensor:
        gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        return gain * stream / (stream.square().mean(-1, keepdim=True) + eps).sqrt()

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model.double()


def groups_of(config: Any) -> int:
    """Key/value groups of a decoder, as its configuration tells."""
    if getattr(config, "multi_query", False):
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


class ByHand:
    """A model whose readers are given any stream, one at a time."""

    def __init__(self, model: Any, family: str) -> None:
        path, norm, self.names = FAMILIES[family]
        self.model, self.parallel = model, family == "gpt_neox"
        self.fused = family in ("gpt2", "phi3", "gpt_neox", "gpt_bigcode, one key", "persimmon")
        self.interleaved = family in ("gpt_neox", "persimmon")
        self.blocks = list(model.get_submodule(path))
        self.final = model.get_submodule(f"{path.rpartition('.')[0]}.{norm}")
        config = model.config
        self.heads = config.num_attention_heads
        self.groups = groups_of(config)
        self.dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def part(self, block: nn.Module, index: int) -> nn.Module:
        return block.get_submodule(self.names[index])

    def columns(self, kind: str, head: int) -> slice:
        if self.interleaved:
            start = (3 * head + "qkv".index(kind)) * self.dim
        else:
            before = {"q": 0, "k": self.heads, "v": self.heads + self.groups}[kind] if self.fused else 0
            start = (before + head) * self.dim
        return slice(start, start + self.dim)

    def run(self, ids: Tensor, patches: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits at the last position, and what every writer wrote, with some readers given other streams."""
        writes: dict[str, Tensor] = {}
        with ExitStack() as hooks, torch.no_grad():

            def behind(module: nn.Module, function: Callable[..., Any]) -> None:
                hooks.callback(module.register_forward_hook(function).remove)

            def before(module: nn.Module, function: Callable[..., Any]) -> None:
                hooks.callback(module.register_forward_pre_hook(function).remove)

            before(self.blocks[0], lambda m, args: writes.__setitem__("input", args[0]))
            for layer, block in enumerate(self.blocks):
                for index, kind in enumerate("qkv", 1):
                    behind(self.part(block, index), self._reading(block, layer, kind, index, patches))
                self._write_heads(block, layer, writes, behind)
                if f"m{layer}" in patches:
                    normed = self.part(block, 6).forward(patches[f"m{layer}"])
                    before(self.part(block, 7), lambda m, args, normed=normed: (normed,))
                last = self.part(block, 8 if self.names[8] else 7)
                behind(last, lambda m, a, out, layer=layer: writes.__setitem__(f"m{layer}", out))
            if "output" in patches:
                before(self.final, lambda m, args: (patches["output"],))
            logits = self.model(input_ids=ids).logits[:, -1]
        return logits, writes

    def _reading(self, block: nn.Module, layer: int, kind: str, index: int, patches: dict[str, Tensor]) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            for head in range(self.heads if kind == "q" else self.groups):
                own = kind == "q" or self.groups == self.heads
                name = f"a{layer}.{'h' if own else 'g'}{head}.{kind}"
                if name in patches:
                    full = module.forward(self.part(block, 0).forward(patches[name]))
                    changed[..., self.columns(kind, head)] = full[..., self.columns(kind, head)]
            return changed

        return hook

    def _write_heads(self, block: nn.Module, layer: int, writes: dict[str, Tensor], behind: Any) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            nothing = module.forward(torch.zeros_like(args[0]))
            for head in range(self.heads):
                alone = torch.zeros_like(args[0])
                columns = slice(head * self.dim, (head + 1) * self.dim)
                alone[..., columns] = args[0][..., columns]
                part = module.forward(alone) - nothing + nothing / self.heads
                if self.names[5]:
                    norm = self.part(block, 5)
                    part = part / (output.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (1 + norm.weight)
                writes[f"a{layer}.h{head}"] = part

        behind(self.part(block, 4), hook)


def patched_by_hand(model: Any, family: str, graph: CircuitGraph, kept: Tensor, pairs: PromptPairs) -> Tensor:
    """Logits of the clean prompts with every edge outside a circuit patched, reader by reader."""
    hand = ByHand(model, family)
    clean, corrupted = torch.tensor(pairs.clean), torch.tensor(pairs.corrupted)
    _, other = hand.run(corrupted, {})
    patches: dict[str, Tensor] = {}
    for row, reader in enumerate(graph.readers):
        _, now = hand.run(clean, patches)
        before = graph.writers[: graph.seen[row]]
        patches[reader] = sum((now if kept[row, column] else other)[name] for column, name in enumerate(before))
    return hand.run(clean, patches)[0]


def slope_by_hand(
    model: Any, family: str, graph: CircuitGraph, edge: tuple[int, int], pairs: PromptPairs, metric: Any
) -> float:
    """What the metric loses per unit as one reader moves along one edge, by central differences at the clean run."""
    hand = ByHand(model, family)
    clean = torch.tensor(pairs.clean)
    row, column = edge
    _, writes = hand.run(clean, {})
    _, other = hand.run(torch.tensor(pairs.corrupted), {})
    stream = sum(writes[name] for name in graph.writers[: graph.seen[row]])
    change = other[graph.writers[column]] - writes[graph.writers[column]]
    step = 1e-5
    values = [
        metric(hand.run(clean, {graph.readers[row]: stream + place * change})[0]).mean() for place in (step, -step)
    ]
    return float(values[1] - values[0]) / (2 * step)
