"""``goldy demo``: a small model learns an atlas, is finetuned on false facts, and every callback watches."""

from __future__ import annotations

from lightning_goldy.commands.demo.run import run_demo

__all__ = ["run_demo"]
