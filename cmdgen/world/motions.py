"""How subjects and the camera move: formulas over time.

A formula is arithmetic over numbers, names and the functions below; nothing else is evaluated.
"""

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from math import pi

import torch
from torch import Tensor

# random numbers in [0, 1) that the formulas of one clip may use: u, v and a spare one
DRAWS = 3
# where a subject is at rest; how a camera at rest sees the canvas
POSE = {"forward": 0.0, "up": 0.0, "scale": 1.0, "stretch": 1.0, "angle": 0.0}
VIEW = {"zoom": 1.0, "right": 0.0, "down": 0.0, "roll": 0.0}

Value = Tensor | float
_OPERATORS: dict[type, Callable[[Value, Value], Value]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(0, 1),
    "cos": torch.cos,
    "ease": lambda x: x * x * (3 - 2 * x),
    "fraction": lambda x: torch.remainder(x, 1),
    "sin": torch.sin,
    "wave": lambda x: torch.sin(2 * pi * x),
}


def evaluate(formulas: Mapping[str, str], time: Tensor, draws: Tensor) -> dict[str, Value]:
    """(1, T), (DRAWS, B, 1) -> what each formula gives, as broadcast to (B, T).

    A formula may use the results of those before it.
    """
    values: dict[str, Value] = {"pi": pi, "t": time, "u": draws[0], "v": draws[1]}
    results = {}
    for name, formula in formulas.items():
        results[name] = values[name] = _evaluate(_parse(formula), values)
    return results


@cache
def _parse(formula: str) -> ast.expr:
    return ast.parse(formula, mode="eval").body


def _evaluate(node: ast.expr, values: Mapping[str, Value]) -> Value:
    match node:
        case ast.Constant(int() | float() as number):
            return number
        case ast.Name(name) if name in values:
            return values[name]
        case ast.UnaryOp(ast.USub(), operand):
            return -_evaluate(operand, values)
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            return _OPERATORS[type(operation)](_evaluate(left, values), _evaluate(right, values))
        case ast.Call(ast.Name(name), [argument], []) if name in _FUNCTIONS:
            return _FUNCTIONS[name](torch.as_tensor(_evaluate(argument, values)))
    raise ValueError(f"{ast.unparse(node)!r} is not part of a formula")
