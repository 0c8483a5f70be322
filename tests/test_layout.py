"""The house keeps its rules: who imports whom, and how the loop reads."""

import ast
import io
import re
import tokenize
from copy import deepcopy
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOOR = {"train", "methods", "loss", "advantage", "buffer", "rollout", "model", "reward", "eval"}
MATHS = {"loss", "advantage", "buffer", "reward"}
BELOW_FAMILY = {"loss", "advantage", "buffer", "rollout", "infra", "family"}
LOOP_LINES, LOOP_IFS = 60, 6


def module(path):
    """infra/data.py -> "infra.data", infra/__init__.py -> "infra"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {}  # module -> path, tests included
for folder in (".", "infra", "family", "tools", "tests"):
    FILES |= {module(path): path for path in sorted((ROOT / folder).glob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
CODE = {name for name in FILES if not name.startswith("tests.")}


def part(name):
    """infra.data -> "infra", loss -> "loss"."""
    return name.partition(".")[0]


def imports(tree):
    """Dotted names that `tree` imports, anywhere in it; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name):
    """The project's modules that module `name` imports."""
    return {other for other in imports(TREES[name]) if other in CODE}


class WhenImported(ast.NodeTransformer):
    """Takes out what is not run when a file is imported."""

    def visit_FunctionDef(self, node):
        return None

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node):
        main = ast.unparse(node.test) == "__name__ == '__main__'"
        return None if main else self.generic_visit(node)


def strangers(names, allowed):
    """{module: what it imports of ours that is not in the `allowed` parts of the house}."""
    found = {name: {other for other in ours(name) if part(other) not in allowed} for name in names}
    return {name: others for name, others in found.items() if others}


def test_the_door_holds_the_papers_nouns():
    assert {name for name in CODE if (ROOT / f"{name}.py").exists()} == DOOR


def test_infra_imports_nothing_from_the_door_or_the_family():
    assert strangers({name for name in CODE if part(name) == "infra"}, {"infra"}) == {}


def test_the_maths_import_only_infra_and_each_other():
    assert strangers(MATHS, MATHS | {"infra"}) == {}


def test_the_family_imports_only_what_lies_below_it():
    assert strangers({name for name in CODE if part(name) == "family"}, BELOW_FAMILY) == {}


def test_nothing_imports_the_tools():
    others = {name for name in CODE if part(name) != "tools"}
    assert strangers(others, {part(name) for name in CODE} - {"tools"}) == {}


def test_no_circle():
    order = list(TopologicalSorter({name: ours(name) for name in CODE}).static_order())
    assert order.index("infra.config") < order.index("methods") < order.index("train")


def test_no_file_imports_vllm_or_torch_distributed_when_it_is_imported():
    heavy = re.compile(r"(vllm|torch\.distributed)(\.|$)")
    found = {}
    for name in CODE:
        for other in filter(heavy.match, imports(WhenImported().visit(deepcopy(TREES[name])))):
            found.setdefault(name, set()).add(other)
    assert found == {}


def test_every_file_has_a_docstring():
    assert [name for name, tree in TREES.items() if not ast.get_docstring(tree)] == []


# The loop.


def function(name, within):
    (found,) = (
        node
        for node in TREES[within].body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    return found


def behaviours():
    """Names of the classes that have a method `rollouts`."""
    found = set()
    for name in CODE:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ClassDef):
                if "rollouts" in {getattr(item, "name", None) for item in node.body}:
                    found.add(node.name)
    return found


def test_the_training_function_names_no_method_and_no_behaviour():
    import methods

    train = function("train", "train")
    if ast.get_docstring(train):
        train.body = train.body[1:]
    assert {"remix-ppo", "ppo"} <= set(methods.ROWS) and {"Colocated", "Recorded"} <= behaviours()
    source = ast.unparse(train)  # without comments
    words = set(re.findall(r"[\w-]+", source))
    assert words & (set(methods.ROWS) | behaviours()) == set()


def test_the_loop_fits_a_screen_and_asks_little():
    loops = [node for node in ast.walk(function("train", "train")) if isinstance(node, ast.For)]
    (loop,) = (node for node in loops if ast.unparse(node.target) == "step")
    assert loop.end_lineno - loop.lineno + 1 <= LOOP_LINES
    lines = FILES["train"].read_text(encoding="utf-8").splitlines()
    text = "\n".join(lines[loop.lineno - 1 : loop.end_lineno])
    # every if that is read: statements, elif, conditional expressions, those of comprehensions
    tokens = tokenize.generate_tokens(io.StringIO(f"if 1:\n{text}\n").readline)
    ifs = [token for token in tokens if token.string in ("if", "elif")]
    assert len(ifs) - 1 <= LOOP_IFS
