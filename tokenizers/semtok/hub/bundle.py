"""Source of one module that runs without the rest of its package, made of the package's own sources.

An exported pipeline carries its code with it. That code is not written twice: the definitions that a
module needs from its package, and those that they need in turn, are copied as they stand, and what
nobody needs stays out. Names that only annotations of functions mention are not needed, as a bundle
evaluates none of these.
"""

import ast
import builtins
import importlib.util
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_WIDTH = 100
_OWN = {"__name__"}  # what every module has
_Assignment = ast.Assign | ast.AnnAssign
_Block = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def bundle(module: str, *, note: str = "") -> str:
    """The source of a module that imports nothing of its own package.

    Args:
        module: its dotted name; all of its definitions are kept, and of other modules of the package
            those that are needed.
        note: ends the docstring.

    Raises:
        ValueError: two things of one name, or a way of importing or defining that can't be copied.
    """
    found = _Bundle(module)
    root = found.read(module)
    for name in root.definitions:
        found.need(module, name)
    text = "\n\n".join(part for part in (root.docstring, note) if part)
    text = text.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    parts = [f'"""{text}\n"""' if "\n" in text else f'"""{text}"""']
    # Only where it must be: for long diffusers has read no annotations but evaluated ones.
    parts += ["from __future__ import annotations"] if found.needs_lazy_annotations() else []
    source = (
        "\n\n".join([*parts, *_import_blocks(found.imports)]) + _body(found.definitions()) + "\n"
    )
    compile(source, module, "exec", dont_inherit=True)
    return source


def requirements(source: str) -> list[str]:
    """The packages, beside Python's own, that a module's source imports when it is imported."""
    modules = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module or "")
    roots = {module.partition(".")[0] for module in modules}
    return sorted(roots - sys.stdlib_module_names)


# What a module defines and imports ---------------------------------------------------------------


@dataclass(frozen=True)
class _Definition:
    """A function, a class, or an assignment, at the top level of a module.

    Attributes:
        source: as it stands, with the comments right above it and the docstring right below it.
        needs: names of the module that are looked up when it runs.
        mentions: names in its annotations.
        imports_own: whether it imports from its own package when it runs.
    """

    module: str
    line: int
    source: str
    needs: frozenset[str]
    mentions: frozenset[str]
    is_block: bool
    imports_own: bool


@dataclass(frozen=True)
class _Import:
    """``from module import name as bound``, or ``import module as bound`` where ``name`` is None."""

    module: str
    name: str | None
    bound: str


@dataclass
class _Module:
    name: str
    docstring: str = ""
    definitions: dict[str, _Definition] = field(default_factory=dict)
    imports: dict[str, _Import] = field(default_factory=dict)
    imported_modules: list[str] = field(default_factory=list)
    others: list[tuple[int, frozenset[str]]] = field(default_factory=list)
    """Lines of other statements, and of repeated definitions, and the names that they mention."""
    has_lazy_annotations: bool = False


def _read(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise ValueError(f"{name}: no module with a source")
    text = Path(spec.origin).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    module = _Module(name, ast.get_docstring(tree) or "")
    body = tree.body[1:] if module.docstring else tree.body
    for place, node in enumerate(body):
        following = body[place + 1] if place + 1 < len(body) else None
        if isinstance(node, ast.Import | ast.ImportFrom):
            _add_import(module, node)
        elif isinstance(node, _Block | _Assignment) and (names := _bound(node)):
            definition = _definition(name, node, following, lines)
            repeated = module.definitions.keys() & names
            module.others.append((node.lineno, frozenset(repeated)))
            module.definitions |= dict.fromkeys(names, definition)
        elif not _is_text(node):
            mentioned = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            module.others.append((node.lineno, frozenset(mentioned)))
    return module


def _add_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    if isinstance(node, ast.ImportFrom):
        if node.level or any(alias.name == "*" for alias in node.names):
            raise ValueError(
                f"{module.name}, line {node.lineno}: relative and star imports can't be bundled"
            )
        if node.module == "__future__":
            module.has_lazy_annotations = True
            return
        assert node.module is not None
        module.imported_modules.append(node.module)
        for alias in node.names:
            bound = alias.asname or alias.name
            module.imports[bound] = _Import(node.module, alias.name, bound)
        return
    for alias in node.names:
        module.imported_modules.append(alias.name)
        bound = alias.asname or alias.name.partition(".")[0]
        module.imports[bound] = _Import(alias.name, None, alias.asname or alias.name)


def _bound(node: ast.stmt) -> list[str]:
    """The names that a definition gives; none where it also changes something else."""
    if isinstance(node, _Block):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]
    flat = [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    names = [target.id for target in flat if isinstance(target, ast.Name)]
    return names if len(names) == len(flat) else []


def _definition(
    module: str, node: ast.stmt, following: ast.stmt | None, lines: list[str]
) -> _Definition:
    decorators = [d.lineno for d in getattr(node, "decorator_list", ())]
    begin, end = min([node.lineno, *decorators]), node.end_lineno or node.lineno
    if isinstance(node, _Assignment) and following is not None and _is_text(following):
        end = following.end_lineno or end
    while begin > 1 and lines[begin - 2].startswith("#"):
        begin -= 1
    root = module.partition(".")[0]
    return _Definition(
        module,
        node.lineno,
        "\n".join(lines[begin - 1 : end]),
        _needs(node),
        frozenset(_mentions(node)),
        isinstance(node, _Block),
        _imports_own(node, root),
    )


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports_own(node: ast.stmt, package: str) -> bool:
    names = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            names += [alias.name for alias in inner.names]
        elif isinstance(inner, ast.ImportFrom):
            names.append(package if inner.level else inner.module or "")
    return package in {name.partition(".")[0] for name in names}


# The names that a definition needs ---------------------------------------------------------------


def _needs(node: ast.stmt) -> frozenset[str]:
    """Names that a definition looks up in its module: Python's own analysis of scopes, without
    annotations."""
    bare = _WithoutAnnotations().visit(ast.parse(ast.unparse(node)))
    source = ast.unparse(ast.fix_missing_locations(bare))
    tables, names = [symtable.symtable(source, "definition", "exec")], set()
    while tables:
        table = tables.pop()
        names |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and s.is_global()}
        tables += table.get_children()
    return frozenset(names)


def _mentions(node: ast.stmt) -> Iterator[str]:
    for inner in ast.walk(node):
        annotations = [getattr(inner, key, None) for key in ("annotation", "returns")]
        for annotation in annotations:
            if annotation is not None:
                yield from (n.id for n in ast.walk(annotation) if isinstance(n, ast.Name))


class _WithoutAnnotations(ast.NodeTransformer):
    """Removes annotations, but for those of a class's attributes, which pydantic evaluates."""

    def __init__(self) -> None:
        self._in_class = False

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._scope(node, in_class=True)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._scope(node, in_class=False)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._scope(node, in_class=False)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> list[ast.stmt]:
        kept: list[ast.stmt] = [ast.Expr(node.annotation)] if self._in_class else [ast.Pass()]
        if node.value is not None:
            kept.append(ast.Assign([node.target], self.visit(node.value)))
        return kept

    def _scope(self, node: ast.AST, *, in_class: bool) -> ast.AST:
        outer, self._in_class = self._in_class, in_class
        self.generic_visit(node)
        self._in_class = outer
        return node


# What is needed of all modules -------------------------------------------------------------------


class _Bundle:
    """Follows names from definition to definition."""

    def __init__(self, module: str) -> None:
        self.package = module.partition(".")[0]
        self.root = module
        self.imports: dict[str, _Import] = {}
        self._modules: dict[str, _Module] = {}
        self._definitions: dict[str, _Definition] = {}
        self._whose: dict[str, tuple[str, str]] = {}
        """What each name means: something from somewhere, the same for all who use it."""

    def read(self, name: str) -> _Module:
        """A module's definitions and imports."""
        if name not in self._modules:
            self._modules[name] = _read(name)
        return self._modules[name]

    def need(self, module: str, name: str) -> None:
        """Takes in what ``name`` means in a module, and what that needs."""
        own = self.read(module)
        if name in own.definitions:
            self._define(own, name)
        elif name in own.imports:
            imported = own.imports[name]
            if not self._is_own(imported.module):
                return self._import(module, name, imported)
            if imported.name is None or imported.bound != imported.name:
                raise ValueError(f"{module}: import {name} from {imported.module} by its own name")
            self.need(imported.module, imported.name)
        elif hasattr(builtins, name):
            self._claim(name, "builtins", name)
        elif name not in _OWN:
            raise ValueError(f"{module}: '{name}' is defined nowhere that can be bundled")

    def definitions(self) -> list[_Definition]:
        """In an order in which each can be run: modules after those that they import."""
        begun: set[str] = set()
        order: list[str] = []

        def visit(name: str) -> None:
            if name in begun or name not in self._modules:
                return
            begun.add(name)
            for imported in self._modules[name].imported_modules:
                visit(imported)
            order.append(name)

        visit(self.root)
        unique = {(d.module, d.line): d for d in self._definitions.values()}
        return sorted(unique.values(), key=lambda d: (order.index(d.module), d.line))

    def needs_lazy_annotations(self) -> bool:
        """Whether annotations name what the bundle does not have (yet)."""
        known = self._definitions.keys() | self.imports.keys() | vars(builtins).keys()
        return any(not d.mentions <= known for d in self._definitions.values()) or any(
            module.has_lazy_annotations for module in self._modules.values()
        )

    def _define(self, module: _Module, name: str) -> None:
        self._claim(name, module.name, name)
        if name in self._definitions:
            return
        definition = self._definitions[name] = module.definitions[name]
        for line, mentioned in module.others:
            if name in mentioned:
                raise ValueError(
                    f"{module.name}, line {line}: defines '{name}' again or does something with it, "
                    "which a bundle would lose"
                )
        if definition.imports_own:
            raise ValueError(
                f"{module.name}, line {definition.line}: '{name}' imports from {self.package} when it runs"
            )
        for needed in sorted(definition.needs):
            self.need(module.name, needed)
        for mentioned in sorted(definition.mentions - definition.needs):
            imported = module.imports.get(mentioned)
            if imported is not None and not self._is_own(imported.module):
                self._import(module.name, mentioned, imported)

    def _import(self, module: str, name: str, imported: _Import) -> None:
        self._claim(name, imported.module, imported.name or "")
        self.imports[name] = imported

    def _claim(self, name: str, module: str, original: str) -> None:
        """Raises ValueError where a name means two things."""
        meaning = self._whose.setdefault(name, (module, original))
        if meaning != (module, original):
            raise ValueError(
                f"two things named '{name}' are needed: of {meaning[0]} and of {module}; rename one"
            )

    def _is_own(self, module: str) -> bool:
        return module.partition(".")[0] == self.package


# Text --------------------------------------------------------------------------------------------


def _import_blocks(imports: dict[str, _Import]) -> Iterator[str]:
    """Import statements: Python's own modules, then all others."""
    modules: dict[str, list[str]] = {}
    plain = set()
    for imported in imports.values():
        if imported.name is None:
            renamed = imported.bound != imported.module
            plain.add(f"import {imported.module}" + (f" as {imported.bound}" if renamed else ""))
            continue
        renamed = imported.bound != imported.name
        entry = imported.name + (f" as {imported.bound}" if renamed else "")
        modules.setdefault(imported.module, []).append(entry)
    statements = [*sorted(plain), *(_from(m, sorted(modules[m])) for m in sorted(modules))]
    for of_python in (True, False):
        chosen = [
            statement
            for statement in statements
            if (statement.split()[1].partition(".")[0] in sys.stdlib_module_names) == of_python
        ]
        if chosen:
            yield "\n".join(chosen)


def _from(module: str, names: list[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= _WIDTH:
        return line
    return "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])


def _body(definitions: list[_Definition]) -> str:
    text, previous = "", None
    for definition in definitions:
        close = previous is not None and not (previous.is_block or definition.is_block)
        text += ("\n" if close else "\n\n\n") + definition.source
        previous = definition
    return text
