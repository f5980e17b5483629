import ast
from functools import partial

import pytest
import torch

from cmdgen.world.motions import DRAWS, POSE, VIEW, evaluate
from cmdgen.world.tables import Layer, Motion, Scene, Size, Tables, read, read_tables

TIME, DRAWN = torch.linspace(0, 1, 5)[None].double(), torch.rand(DRAWS, 3, 1).double()
DISCS = {"paint": "discs", "gap": 0.2, "rows": [0, 1], "radii": [0.1, 0.2], "colours": ["ffffff"]}


def test_a_formula_is_arithmetic_over_time_and_draws() -> None:
    path = {"arc": "fraction(2 * t + u)", "up": "4 * arc * (1 - arc) ** 2", "angle": "-ease(t) + wave(t)"}
    results = evaluate(path, TIME, DRAWN)
    arc = (2 * TIME + DRAWN[0]) % 1
    assert torch.equal(results["up"], 4 * arc * (1 - arc) ** 2)  # type: ignore[arg-type]
    ease = TIME * TIME * (3 - 2 * TIME)
    expected = -ease + torch.sin(2 * torch.pi * TIME)
    assert torch.allclose(results["angle"], expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("formula", ["w", "open(t)", "t.shape", "t[0]", "t if u else v", "t / u", "abs(t, u)", "'t'"])
def test_a_formula_is_nothing_else(formula: str) -> None:
    with pytest.raises(ValueError, match="is not part of a formula"):
        evaluate({"up": formula}, TIME, DRAWN)


def test_every_formula_moves_something() -> None:
    for motion in read_tables().motions.values():
        results = evaluate(motion.path, TIME, DRAWN)
        names = {
            node.id
            for formula in motion.path.values()
            for node in ast.walk(ast.parse(formula))
            if isinstance(node, ast.Name)
        }
        moved = POSE.keys() | (VIEW.keys() if motion.camera else set())
        assert results.keys() <= moved | names, motion.name
        assert results.keys() & moved, motion.name


def test_layers_are_read_with_their_painters() -> None:
    layer = read(Layer, {**DISCS, "speed": 1, "span": [0.5, 1]}, "here")
    assert layer.speed == 1.0 and type(layer.speed) is float and layer.span == (0.5, 1.0)
    assert isinstance(layer.paint, partial) and layer.paint.func.__name__ == "discs"
    assert layer.paint.keywords["rows"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("hint", "value", "message"),
    [
        (Size, {"words": ["small"]}, "here: missing a required argument: 'factor'"),
        (Size, {"words": ["small"], "factor": 1, "fator": 2}, "here: got an unexpected .* 'fator'"),
        (Size, {"words": ["small", 3], "factor": 1}, r"here.words\[1\]: got 3, expected .*str"),
        (Size, {"words": "small", "factor": 1}, "here.words: got 'small', expected tuple"),
        (Size, {"words": [], "factor": True}, "here.factor: got True, expected .*float"),
        (Motion, {"name": "x", "path": {}, "verbs": [["a"]]}, r"verbs\[0\]: got 1 .* expected 2"),
        (Layer, {**DISCS, "sped": 1}, "here: got an unexpected keyword argument 'sped'"),
        (Layer, {"paint": "discs", "gap": 1}, "here: missing a required argument"),
        (Layer, {"paint": "nothing"}, "here: unknown painter 'nothing'"),
        (Scene, {"name": "x", "layers": [3]}, "here: missing a required argument"),
        (Tables, 3, "here: got 3, expected"),
    ],
)
def test_what_does_not_fit_is_named(hint: type, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(hint, value, "here")
