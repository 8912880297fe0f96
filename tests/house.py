"""The house in figures: files and lines, crowded folders, files that serve one other, and who imports whom.

    python tests/house.py

prints them. A file serves one other when exactly one file, other than a package's ``__init__``, imports it: then it may
be a fragment of that file.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_goldy"

LAYERS: dict[str, set[str]] = {
    "core": set(),
    "analysis": {"core"},
    "optim": {"core"},
    "data": {"core"},
    "report": {"core"},
    "training": {"core", "analysis", "optim", "data"},
    "callbacks": {"core", "analysis", "optim", "data", "training", "report"},
    "commands": {"core", "analysis", "optim", "data", "training", "report", "callbacks"},
    "cli": {"core", "analysis", "optim", "data", "training", "report", "callbacks", "commands"},
    "compat": {"core", "analysis", "report"},
}
"""What each layer may import besides itself."""

AT_ROOT = {"__init__", "cli", "compat"}
"""Modules at the package's root: its names, its command, and the door for code written against an earlier package."""


@dataclass(frozen=True)
class Import:
    """One module that imports another; ``at_top`` where that happens when it is imported itself.

    ``typed`` where it never happens, as only the types of annotations are imported.
    """

    importer: str
    imported: str
    at_top: bool
    typed: bool = False


def modules() -> dict[str, Path]:
    """Every module of the package by dotted name."""
    paths = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(known: dict[str, Path]) -> list[Import]:
    """Every import of a module of the package by another."""
    edges: set[tuple[str, str, bool, bool]] = set()
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typed = {node for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            for target in _targets(node, known):
                edges.add((name, target, node in tree.body, node in typed))
    return [Import(*edge) for edge in sorted(edges) if edge[0] != edge[1]]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _targets(node: ast.AST, known: dict[str, Path]) -> list[str]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
        assert node.module is not None
        members = [f"{node.module}.{alias.name}" for alias in node.names]
        return [member if member in known else node.module for member in members]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    return []


def layer_of(module: str) -> str:
    """The part of the house that a module is in.

    >>> layer_of("lightning_goldy.core.space"), layer_of("lightning_goldy")
    ('core', '__init__')
    """
    return [*module.split("."), "__init__"][1]


def wrong_arrows(edges: list[Import]) -> list[str]:
    """Imports that a layer is not allowed."""
    wrong = []
    for edge in edges:
        importer, imported = layer_of(edge.importer), layer_of(edge.imported)
        if "__init__" in (importer, imported) or importer == imported:
            continue
        if imported not in LAYERS.get(importer, set()):
            wrong.append(f"{edge.importer} imports {edge.imported}")
    return wrong


def cycles(edges: list[Import], known: dict[str, Path]) -> list[list[str]]:
    """Groups of folders that import one another.

    What an ``__init__`` re-exports from below does not count, nor does the package's own ``__init__``, which imports
    nothing: modules take the version from it.
    """

    def folder(module: str) -> str:
        return module if known[module].name == "__init__.py" else module.rpartition(".")[0]

    graph: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        ends = {folder(edge.importer), folder(edge.imported)}
        if known[edge.importer].name != "__init__.py" and len(ends) == 2 and PACKAGE not in ends:
            graph[folder(edge.importer)].add(folder(edge.imported))
    return [group for group in _components(graph) if len(group) > 1]


def circles(edges: list[Import]) -> list[list[str]]:
    """Groups of modules that import one another when they are imported or run; imports for annotations do not count."""
    graph: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        if not edge.typed and edge.imported != PACKAGE:
            graph[edge.importer].add(edge.imported)
    return [group for group in _components(graph) if len(group) > 1]


def strays() -> list[str]:
    """Files in the package's folders that are none of it, such as what a merge leaves behind."""
    own = {".py", ".css", ".csv", ".html", ".js"}
    paths = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.suffix not in own and path.name != "py.typed")


def _components(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components: nodes that reach one another."""
    nodes = sorted({*graph, *(target for targets in graph.values() for target in targets)})
    reached = {node: _reachable(graph, node) for node in nodes}
    components: dict[frozenset[str], None] = {}
    for node in nodes:
        components[frozenset(other for other in nodes if other in reached[node] and node in reached[other])] = None
    return [sorted(component) for component in components]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, waiting = {start}, [start]
    while waiting:
        fresh = graph.get(waiting.pop(), set()) - seen
        seen |= fresh
        waiting += fresh
    return seen


def served_once(edges: list[Import], known: dict[str, Path]) -> dict[str, str]:
    """Files that exactly one other imports, and that other."""
    importers: dict[str, set[str]] = defaultdict(set)
    for edge in edges:
        if known[edge.importer].name != "__init__.py":
            importers[edge.imported].add(edge.importer)
    return {
        module: next(iter(importers[module]))
        for module, path in known.items()
        if path.name != "__init__.py" and len(importers[module]) == 1
    }


def line_counts(known: dict[str, Path]) -> dict[str, int]:
    """Lines of each file, all of them."""
    return {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in known.items()}


def folder_sizes(known: dict[str, Path]) -> Counter[str]:
    """Files of each folder."""
    return Counter(str(path.parent.relative_to(ROOT)) for path in known.values())


def main() -> int:
    """Prints the figures; 1 when an import goes the wrong way."""
    known = modules()
    edges = imports(known)
    lines, sizes, single = line_counts(known), folder_sizes(known), served_once(edges, known)
    crowded = sizes.most_common(1)[0]
    print(f"lines {sum(lines.values()):,}, files {len(known)}, most in a folder {crowded[1]} ({crowded[0]}), ", end="")
    print(f"longest file {max(lines.values())} lines, files with one importer {len(single)}:")
    for module, importer in single.items():
        print(f"  {lines[module]:4d} {module.removeprefix(f'{PACKAGE}.')} <- {importer.removeprefix(f'{PACKAGE}.')}")
    arrows = Counter((layer_of(edge.importer), layer_of(edge.imported)) for edge in edges)
    for layer in LAYERS:
        targets = [
            f"{target} {count}" for (source, target), count in sorted(arrows.items()) if source == layer != target
        ]
        print(f"{layer} -> {', '.join(targets) or 'nothing'}")
    problems = [*wrong_arrows(edges), *(" <-> ".join(group) for group in (*cycles(edges, known), *circles(edges)))]
    problems += strays()
    for problem in problems:
        print(f"wrong: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
