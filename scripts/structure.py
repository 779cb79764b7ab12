"""How a checkout's library code is cut: sizes, imports, comments and density of its files.

    python scripts/structure.py ROOT [--json] [--list]

Counted is what lies in the folders vlm, data, train and index; links such as vlm/data are not followed, tests and
scripts are left out. "Files" are the modules without the package faces (an `__init__.py` under 40 lines), which
hold no idea of their own; lines, imports and circles are counted over all of them.
"""

import argparse
import ast
import io
import json
import os
import statistics
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDERS = ("vlm", "data", "train", "index")
"""Folders of the library, below the root of a checkout; all but `vlm` are packages inside `vlm`."""

FACE_LINES = 40
"""An `__init__.py` with fewer lines is a package's face."""

COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Module:
    """One file of the library, parsed."""

    name: str
    """Its full name, as `vlm.data.order`; a package has the name of its folder."""
    path: str
    """Below the root."""
    text: str
    tree: ast.Module

    @property
    def num_lines(self) -> int:
        """Lines of the file, blank ones too."""
        return len(self.text.splitlines())

    @property
    def is_package(self) -> bool:
        """Whether it is an `__init__.py`."""
        return self.path.endswith("__init__.py")

    @property
    def is_face(self) -> bool:
        """Whether it is a short `__init__.py`."""
        return self.is_package and self.num_lines < FACE_LINES


def read_modules(root: Path) -> dict[str, Module]:
    """Every module of the library, by its name."""
    modules = {}
    for folder in FOLDERS:
        for place, folders, files in os.walk(root / folder):  # links are not followed
            folders.sort()
            for file in sorted(files):
                if file.endswith(".py"):
                    path = (Path(place) / file).relative_to(root)
                    name = module_name(path)
                    text = (root / path).read_text(encoding="utf-8")
                    modules[name] = Module(name, str(path), text, ast.parse(text))
    return modules


def module_name(path: Path) -> str:
    """`data/sources/table.py` is `vlm.data.sources.table`."""
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts if parts[0] == "vlm" else ("vlm", *parts))


# --- imports -----------------------------------------------------------------------------------------------------


def imported_by(module: Module, statements: Iterable[ast.stmt | ast.AST], modules: dict[str, Module]) -> set[str]:
    """Names of the modules that the import statements among `statements` load by name.

    `from vlm.files import sha256_of` is an import of vlm.files; `from vlm.data import arrays` one of vlm.data.arrays.
    """
    found = set()
    for node in statements:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(module, node)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in modules else base)
    return {name for name in found if name in modules and name != module.name}


def absolute_base(module: Module, node: ast.ImportFrom) -> str:
    """The module an import is from, with the leading dots of a relative one resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def top_level_statements(tree: ast.Module) -> Iterator[ast.AST]:
    """What runs as the module is imported: all but bodies of functions and of `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (*FUNCTIONS, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (strongly connected components, Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                circles.append(sorted(group))

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * len(graph) + 1000))
    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(circles)


# --- what a file looks like ---------------------------------------------------------------------------------------


def count_comments(module: Module) -> int:
    """Lines that have a comment: a whole line, or the end of one. `#!` counts, `# pyright: ignore` too."""
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    return len({token.start[0] for token in tokens if token.type == tokenize.COMMENT})


def is_packed(node: ast.AST) -> bool:
    """Whether a statement is `a, b = x, y`."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
    )


def functions_of(module: Module) -> list[tuple[int, int, str]]:
    """Lines without the docstring, lines, and `file:line name` of each function; decorators are not counted."""
    functions = []
    for node in ast.walk(module.tree):
        if isinstance(node, FUNCTIONS):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            own = lines - len((ast.get_docstring(node) or "").splitlines())
            functions.append((own, lines, f"{module.path}:{node.lineno} {node.name}"))
    return functions


def repeated_names(modules: Iterable[Module]) -> dict[str, list[str]]:
    """File names that occur twice, but for package faces and vlm/cli/X beside one other X."""
    places = defaultdict(list)
    for module in modules:
        if not module.is_package:
            places[Path(module.path).name].append(module.path)
    repeated = {}
    for name, paths in sorted(places.items()):
        elsewhere = [path for path in paths if path != f"vlm/cli/{name}"]
        if len(elsewhere) > 1:
            repeated[name] = sorted(paths)
    return repeated


def quantile(values: list[int], share: float) -> float:
    """The value below which a share of the values lies, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# --- all of it ----------------------------------------------------------------------------------------------------


def measure(root: Path) -> tuple[dict[str, object], dict[str, object]]:
    """The figures, and the lists behind them.

    Raises:
        SystemExit: there is no library code below `root`.
    """
    modules = read_modules(root)
    if not modules:
        raise SystemExit(f"There are no Python files in {', '.join(FOLDERS)} below {root}.")
    files = [module for module in modules.values() if not module.is_face]
    sizes = [module.num_lines for module in files]
    lines = sum(module.num_lines for module in modules.values())
    nodes = {name: list(ast.walk(module.tree)) for name, module in modules.items()}
    edges = {name: imported_by(module, nodes[name], modules) for name, module in modules.items()}
    at_top = {name: imported_by(module, top_level_statements(module.tree), modules) for name, module in modules.items()}
    num_edges = sum(map(len, edges.values()))
    num_importers = Counter(name for imported in edges.values() for name in imported)
    lonely = sorted(module.path for module in files if num_importers[module.name] == 1)
    unused = sorted(module.path for module in files if num_importers[module.name] == 0)
    functions = [function for module in modules.values() for function in functions_of(module)]
    function_lines = [total for _, total, _ in functions]
    longest_own, longest, longest_name = max(functions, key=lambda function: function[1])
    num_comments = sum(map(count_comments, modules.values()))
    num_comprehensions = sum(isinstance(node, COMPREHENSIONS) for walked in nodes.values() for node in walked)
    num_packed = sum(is_packed(node) for walked in nodes.values() for node in walked)
    circles = find_circles(at_top)
    repeated = repeated_names(modules.values())
    fan_out = Counter({modules[name].path: len(imported) for name, imported in edges.items()})
    fan_in = Counter({modules[name].path: number for name, number in num_importers.items()})

    def share(condition: Iterable[bool]) -> float:
        return round(100 * sum(condition) / len(files), 1)

    figures: dict[str, object] = {
        "files": len(files),
        "package_faces": len(modules) - len(files),
        "lines": lines,
        "file_lines_p25": quantile(sizes, 0.25),
        "file_lines_median": statistics.median(sizes),
        "file_lines_p75": quantile(sizes, 0.75),
        "file_lines_p90": round(quantile(sizes, 0.9), 1),
        "file_lines_max": max(sizes),
        "files_under_60_percent": share(size < 60 for size in sizes),
        "files_under_100_percent": share(size < 100 for size in sizes),
        "files_over_300": sum(size > 300 for size in sizes),
        "files_over_700": sum(size > 700 for size in sizes),
        "directories": len({Path(module.path).parent for module in modules.values()}),
        "import_edges": num_edges,
        "import_edges_per_1000_lines": round(1000 * num_edges / lines, 1),
        "fan_out_median": statistics.median(fan_out[module.path] for module in files),
        "fan_out_p90": quantile([fan_out[module.path] for module in files], 0.9),
        "fan_out_max": max(fan_out.values()),
        "files_with_one_importer": len(lonely),
        "files_with_one_importer_percent": round(100 * len(lonely) / len(files), 1),
        "files_with_no_importer": len(unused),
        "comments_per_100_lines": round(100 * num_comments / lines, 2),
        "comprehensions_per_1000_lines": round(1000 * num_comprehensions / lines, 1),
        "packed_assignments_per_1000_lines": round(1000 * num_packed / lines, 1),
        "functions": len(functions),
        "function_lines_median": statistics.median(function_lines),
        "function_lines_p95": quantile(function_lines, 0.95),
        "function_lines_max": longest,
        "function_lines_max_without_docstring": max(own for own, _, _ in functions),
        "functions_over_60_lines": sum(own > 60 for own, _, _ in functions),
        "import_circles": len(circles),
        "file_names_twice": len(repeated),
    }
    lists: dict[str, object] = {
        "longest_function": f"{longest_name} ({longest} lines, {longest_own} without docstring)",
        "most_imports": [f"{path} {number}" for path, number in fan_out.most_common(8)],
        "most_imported": [f"{path} {number}" for path, number in fan_in.most_common(8)],
        "circles": circles,
        "file_names_twice": repeated,
        "files_over_300": sorted(f"{module.path} {module.num_lines}" for module in files if module.num_lines > 300),
        "files_under_60": sorted(f"{module.path} {module.num_lines}" for module in files if module.num_lines < 60),
        "files_with_one_importer": lonely,
        "files_with_no_importer": unused,
    }
    return figures, lists


def main() -> None:
    """Print the figures of one checkout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="root of a checkout")
    parser.add_argument("--json", action="store_true", help="print figures and lists as JSON")
    parser.add_argument("--list", action="store_true", help="print the files behind the figures too")
    arguments = parser.parse_args()
    figures, lists = measure(arguments.root)
    if arguments.json:
        print(json.dumps({"figures": figures, "lists": lists}, indent=2, ensure_ascii=False))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<44}{value:>10,}")
    for name in lists if arguments.list else ("longest_function", "most_imports", "most_imported", "circles"):
        value = lists[name]
        print(f"\n{name.replace('_', ' ')}:")
        if isinstance(value, dict):
            value = [f"{key}: {', '.join(paths)}" for key, paths in value.items()]
        for line in value if isinstance(value, list) else [value]:
            print("  ", " ⇄ ".join(line) if isinstance(line, list) else line)


if __name__ == "__main__":
    main()
