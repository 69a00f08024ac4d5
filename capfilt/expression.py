"""Conditions that a user writes over a pair's columns, as in `width >= 200 and itm_prob > 0.4`.

The text is read by Python's own parser, and every node must be on the short list below before it is
turned into an Arrow expression: nothing is ever evaluated as Python.
"""

import ast
from collections.abc import Callable
from typing import Any

from capfilt.errors import ConfigError

SCORE_COLUMNS = ("pair_id", "key", "source", "caption", "uid", "itm_prob", "itc_sim")
IMAGE_COLUMNS = ("url", "width", "height", "original_width", "original_height", "exif", "sha256")
COLUMNS = (*SCORE_COLUMNS, *IMAGE_COLUMNS)
"""What an expression may name: columns of `scores/`, and of `images/` for the pair's picture."""

NUMBERS = ("itm_prob", "itc_sim", "width", "height", "original_width", "original_height")
"""Those of them that are numbers; the others are texts."""

_COMPARE = {
    ast.Eq: "equal",
    ast.NotEq: "not_equal",
    ast.Lt: "less",
    ast.LtE: "less_equal",
    ast.Gt: "greater",
    ast.GtE: "greater_equal",
}
_ARITHMETIC = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply"}
_TEXT_FUNCTIONS = {
    "contains": "match_substring",
    "startswith": "starts_with",
    "endswith": "ends_with",
    "matches": "match_substring_regex",
}
FUNCTIONS = ("abs", "len", "lower", "words", *_TEXT_FUNCTIONS)
"""What an expression may call: `words(caption) >= 3`, `contains(lower(caption), "stock")`, …"""

LONGEST = 2000


def columns_of(text: str) -> tuple[str, ...]:
    """The columns that an expression names, in the order of `COLUMNS`.

    Raises:
        ConfigError: it can't be read, or holds something that is not allowed.
    """
    tree = _parse(text)
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return tuple(name for name in COLUMNS if name in named)


def own_columns_of(text: str) -> tuple[str, ...]:
    """The columns of the user's own table that an expression names, as in `own.aesthetic`; sorted.

    Raises:
        ConfigError: it can't be read, or holds something that is not allowed.
    """
    tree = _parse(text)
    return tuple(sorted({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}))


def compile_expression(text: str) -> Any:
    """An expression as a `pyarrow.compute.Expression` over `COLUMNS`.

    A comparison with a value that is missing is neither true nor false, as in SQL, so a condition
    on it does not hold; ask with `is None`.

    Args:
        text: comparisons (also chained, and `in` a list), `and`, `or`, `not`, `+ - * /`, numbers,
            texts, `None`, the functions of `FUNCTIONS`, and `own.name` for a column `name` of the
            user's own table.

    Raises:
        ConfigError: it can't be read, or holds something that is not allowed.
    """
    return _Compiler(text).boolean(_parse(text))


def _parse(text: str) -> ast.expr:
    if not text.strip() or len(text) > LONGEST:
        raise ConfigError(f"expression {text[:80]!r}: expected 1 to {LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = getattr(error, "msg", None) or str(error)
        raise ConfigError(
            f"expression {text!r} can't be read ({what}); write it as in "
            "'width >= 200 and itm_prob > 0.4'"
        ) from None
    _check(tree, text)
    return tree


def _check(node: ast.expr, text: str, depth: int = 0) -> None:
    """Refuses every node that is not on the list, before anything is built from it."""

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"expression {text!r}: {ast.unparse(node)!r} {why}")

    if depth > 50:
        raise ConfigError(f"expression {text!r}: more than 50 levels of nesting")
    children: list[ast.expr]
    match node:
        case ast.BoolOp():
            children = node.values
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            children = [node.operand]
        case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()):
            children = [node.left, node.right]
        case ast.Compare():
            children = [node.left]
            for operation, right in zip(node.ops, node.comparators, strict=True):
                if isinstance(operation, ast.Is | ast.IsNot):
                    if not (isinstance(right, ast.Constant) and right.value is None):
                        raise refuse("compares with `is`, which is for None only; use ==")
                elif isinstance(operation, ast.In | ast.NotIn):
                    items = right.elts if isinstance(right, ast.List | ast.Tuple) else []
                    if not items or not all(_is_value(item) for item in items):
                        raise refuse("needs a list of values after `in`, as in source in ['web']")
                    children.extend(items)
                else:
                    children.append(right)
        case ast.Name():
            if node.id not in COLUMNS:
                raise refuse(f"is no column; there are {', '.join(COLUMNS)}")
            children = []
        case ast.Attribute(value=ast.Name(id="own")):
            children = []
        case ast.Constant():
            if not isinstance(node.value, bool | int | float | str):
                raise refuse("is no number, text or truth value (None goes with `is` only)")
            if isinstance(node.value, int) and node.value >= 1 << 63:
                raise refuse("is too large for a whole number of 64 bits; write it as in 1e30")
            children = []
        case ast.Call():
            name = node.func.id if isinstance(node.func, ast.Name) else None
            if name not in FUNCTIONS or node.keywords:
                raise refuse(f"is no function here; there are {', '.join(FUNCTIONS)}")
            wanted = 2 if name in _TEXT_FUNCTIONS else 1
            if len(node.args) != wanted:
                raise refuse(f"has {len(node.args)} arguments, expected {wanted}")
            if wanted == 2 and not (
                isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str)
            ):
                raise refuse("needs a text in quotes as its second argument")
            children = list(node.args)
        case _:
            raise refuse("is not allowed; comparisons, and, or, not, + - * / and functions are")
    for child in children:
        _check(child, text, depth + 1)


def _is_value(node: ast.expr) -> bool:
    """Whether a node is a value as it is written; -1 is one, which Python reads as minus and 1."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant)


class _Compiler:
    """From checked nodes to Arrow expressions."""

    def __init__(self, text: str) -> None:
        import pyarrow.compute as pc

        self.text = text
        self.pc = pc

    def boolean(self, node: ast.expr) -> Any:
        match node:
            case ast.BoolOp():
                parts = [self.boolean(value) for value in node.values]
                join: Callable[[Any, Any], Any] = (
                    self.pc.and_kleene if isinstance(node.op, ast.And) else self.pc.or_kleene
                )
                found = parts[0]
                for part in parts[1:]:
                    found = join(found, part)
                return found
            case ast.UnaryOp(op=ast.Not()):
                return self.pc.invert(self.boolean(node.operand))
            case ast.Compare():
                return self._compare(node)
            case ast.Constant(value=bool()):
                return self.pc.scalar(node.value)
            case ast.Call(func=ast.Name(id=name)) if name in _TEXT_FUNCTIONS:
                subject, pattern = node.args
                assert isinstance(pattern, ast.Constant)
                options: dict[str, Any] = {"pattern": pattern.value}
                return getattr(self.pc, _TEXT_FUNCTIONS[name])(self.value(subject), **options)
        raise ConfigError(
            f"expression {self.text!r}: {ast.unparse(node)!r} is a value, and a condition is needed"
        )

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Name():
                column = self.pc.field(node.id)
                # an area must not wrap around at 32 bits
                return column.cast("float64") if node.id in NUMBERS else column
            case ast.Attribute():
                return self.pc.field(f"own.{node.attr}")
            case ast.Constant():
                return self.pc.scalar(node.value)
            case ast.UnaryOp(op=ast.USub()):
                return self.pc.negate(self.value(node.operand))
            case ast.BinOp(op=ast.Div()):
                # as Python divides: two whole numbers give a fraction
                left, right = self.value(node.left), self.value(node.right)
                return self.pc.divide(left.cast("float64"), right.cast("float64"))
            case ast.BinOp():
                name = _ARITHMETIC[type(node.op)]
                return getattr(self.pc, name)(self.value(node.left), self.value(node.right))
            case ast.Call(func=ast.Name(id=name)) if name not in _TEXT_FUNCTIONS:
                inner = self.value(node.args[0])
                if name == "abs":
                    return self.pc.abs(inner)
                if name == "len":
                    return self.pc.utf8_length(inner)
                if name == "lower":
                    return self.pc.utf8_lower(inner)
                trimmed = self.pc.utf8_trim_whitespace(inner)
                split = self.pc.utf8_split_whitespace(trimmed)
                empty = self.pc.equal(trimmed, self.pc.scalar(""))
                return self.pc.if_else(empty, self.pc.scalar(0), self.pc.list_value_length(split))
        raise ConfigError(
            f"expression {self.text!r}: {ast.unparse(node)!r} is a condition, and a value is needed"
        )

    def _compare(self, node: ast.Compare) -> Any:
        found = None
        left = node.left
        for operation, right in zip(node.ops, node.comparators, strict=True):
            if isinstance(operation, ast.Is | ast.IsNot):
                part = self.pc.is_null(self.value(left))
                part = part if isinstance(operation, ast.Is) else self.pc.invert(part)
            elif isinstance(operation, ast.In | ast.NotIn):
                assert isinstance(right, ast.List | ast.Tuple)
                subject = self.value(left)
                part = None
                for item in right.elts:
                    same = self.pc.equal(subject, self.value(item))
                    part = same if part is None else self.pc.or_kleene(part, same)
                part = part if isinstance(operation, ast.In) else self.pc.invert(part)
            else:
                part = getattr(self.pc, _COMPARE[type(operation)])(
                    self.value(left), self.value(right)
                )
            found = part if found is None else self.pc.and_kleene(found, part)
            left = right
        return found
