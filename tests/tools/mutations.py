"""The changes that tests/tools/mutate.py makes to a formula: one operator, constant, mask or argument at a time."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

Edit = Callable[[ast.AST], ast.AST]

OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
COMPARISONS = {
    ast.Lt: [ast.LtE, ast.Gt],
    ast.LtE: [ast.Lt, ast.GtE],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.LtE],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
}
# Calls by their last name: another function in its place, ...
RENAMED = {"maximum": "minimum", "max": "min", "expm1": "exp", "masked_sum": "masked_mean", "mean": "sum"}
RENAMED |= {"kl_k1": "kl_k3"}
RENAMED |= {second: first for first, second in RENAMED.items()}  # each of these for the other; those below one way
RENAMED |= {"rsqrt": "sqrt", "logsigmoid": "sigmoid", "zeros_like": "ones_like", "zeros": "ones"}
RENAMED |= {"new_zeros": "new_ones", "triu": "tril", "var": "std"}
# ... nothing but its receiver, ...
METHODS_DROPPED = {"clamp", "abs", "exp", "float", "double", "detach", "mul_", "split", "argsort", "scatter_add"}
# ... or nothing but its first argument.
FUNCTIONS_DROPPED = {
    "reversed", "expm1", "rsqrt", "abs", "exp", "whiten", "masked_sum", "masked_mean", "logsigmoid", "asarray"
}  # fmt: skip
MASKS = {"mask", "better", "tied"}
SWAPPED = {"kl_k1", "kl_k3", "gae", "per_token_rewards", "explained_variance", "where", "policy_loss", "whiten"}


def last_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def renamed(node: ast.Call, name: str) -> ast.Call:
    if isinstance(node.func, ast.Attribute):
        node.func.attr = name
    else:
        node.func.id = name  # type: ignore[attr-defined]
    return node


def edits(node: ast.AST) -> Iterator[Edit]:
    """Every change that this node allows; an edit gets a copy of the node and may change it."""
    if isinstance(node, ast.BinOp):
        yield from binary_edits(node)
    elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
        yield lambda n: set_field(n, "op", OPERATORS[type(n.op)]())
    elif isinstance(node, ast.UnaryOp):
        yield lambda n: n.operand  # a minus, a not or a ~ is lost
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        for kind in COMPARISONS[type(node.ops[0])]:
            yield lambda n, kind=kind: set_field(n, "ops", [kind()])
    elif isinstance(node, ast.BoolOp):
        other = ast.And if isinstance(node.op, ast.Or) else ast.Or
        yield lambda n: set_field(n, "op", other())
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield lambda n: set_field(n, "value", value)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield lambda n: set_field(n, "test", ast.UnaryOp(ast.Not(), n.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield lambda n: set_field(n, "ifs", [])
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and node.slice.id in MASKS:
        yield lambda n: n.value  # the mask is lost
    elif isinstance(node, ast.Call):
        yield from call_edits(node)


def binary_edits(node: ast.BinOp) -> Iterator[Edit]:
    if type(node.op) in OPERATORS:
        yield lambda n: set_field(n, "op", OPERATORS[type(n.op)]())
    if isinstance(node.op, (ast.Sub, ast.Div)):
        yield lambda n: ast.BinOp(n.right, n.op, n.left)  # a - b becomes b - a: winner and loser, new and old
    if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
        yield lambda n: n.left  # a term or a factor is lost
    if isinstance(node.op, (ast.Add, ast.Mult)):
        yield lambda n: n.right


def call_edits(node: ast.Call) -> Iterator[Edit]:
    name = last_name(node)
    method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") not in ("torch", "np")
    if name in RENAMED and not (name == "zeros" and not node.args):
        yield lambda n: renamed(n, RENAMED[name])
    if name in METHODS_DROPPED and method:
        yield lambda n: n.func.value
    if name in FUNCTIONS_DROPPED and not method and node.args:
        yield lambda n: n.args[0]
    if name in ("masked_sum", "masked_mean"):
        # The unmasked form.
        plain = "sum" if name == "masked_sum" else "mean"
        yield lambda n: ast.Call(ast.Attribute(n.args[0], plain, ast.Load()), [], [])
    if name == "where" and len(node.args) == 3:
        yield lambda n: n.args[1]  # the mask is lost
        yield lambda n: ast.Call(n.func, [n.args[0], n.args[2], n.args[1]], [])
    if name in SWAPPED and name != "where" and len(node.args) >= 2:
        yield lambda n: set_field(n, "args", [n.args[1], n.args[0], *n.args[2:]])
    if name == "clamp":
        for i in range(len(node.args)):
            # One side of a clamp is lost.
            yield lambda n, i=i: set_field(
                n, "args", [ast.Constant(None) if k == i else a for k, a in enumerate(n.args)]
            )
    for i, keyword in enumerate(node.keywords):
        if not isinstance(keyword.value, ast.Constant):
            continue
        if keyword.arg in ("unbiased", "shift_mean", "diagonal"):
            yield lambda n, i=i: set_field(n, "keywords", n.keywords[:i] + n.keywords[i + 1 :])


def set_field(node: ast.AST, name: str, value: object) -> ast.AST:
    setattr(node, name, value)
    return node
