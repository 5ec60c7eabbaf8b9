"""The benchmark's cases: that each is one of its own, and that what comes of them is judged."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    return lambda name: importlib.import_module(f"cases.{name}")


def test_every_case_has_a_name_and_an_end_of_its_own(cases):
    found = cases("run").cases()
    assert len(found) > 400
    assert {case.should for case in found.values()} == {"release", "ask", "refuse", "either"}
    assert [*cases("run").cases(["data: float16", "nothing of it*"])] == ["data: float16"]


def test_other_weights_and_other_errors_are_told_apart(cases):
    case, nets, steps = (cases(name) for name in ("case", "nets", "steps"))
    model, world = f"{nets.__name__}:Net", nets.WORLD

    def tried(should, tree, right, **more):
        made = case.Case("made", should, case.saved(tree), model, lambda: right, **more)
        return steps.try_case(made)

    both = {"model": world.state, "ema": world.ema}
    asked = tried("ask", lambda: both, [world.state, world.ema])
    assert (asked.happened, asked.right) == ("ask", True)
    missed = tried("ask", lambda: both, [world.state])
    assert not missed.right
    assert "other weights" in missed.said
    refused = tried("refuse", dict, [], says="holds no weights")
    assert (refused.happened, refused.right) == ("refuse", True)
    assert not tried("refuse", dict, [], says="something else").right
    assert not tried("release", dict, []).right
    broken = tried("either", lambda: 1 / 0, [])
    assert (broken.happened, broken.right) == ("traceback", False)
    assert "ZeroDivisionError" in str(broken)
    chosen = {"options": {"weights": "ema"}}
    wrong = tried("release", lambda: both, [world.state], **chosen)
    assert wrong.wrong.startswith("other weights than PyTorch loads")
    assert not wrong.right
    right = tried("release", lambda: both, [world.ema], **chosen)
    assert (right.happened, right.right, right.wrong) == ("release", True, "")
    run = cases("run")
    assert run.sums([right, wrong, broken]) == (["made"], ["made"], ["made"])
    assert run.counted([right, broken]) == "1 of 1 to release, 0 of 1 to either; not made"


def test_file_with_other_answers_is_found(cases, tmp_path):
    case, nets, steps = (cases(name) for name in ("case", "nets", "steps"))
    import torch

    from heimdall_onnx import export_model, load_checkpoint

    path = case.saved(lambda: nets.WORLD.state)(tmp_path)
    made = case.Case("made", "release", lambda folder: path, f"{nets.__name__}:Net")
    loaded = load_checkpoint(path, model=made.model)
    exported = export_model(loaded.model, tmp_path / "m.onnx", opset=17)
    assert steps.other_answers(made, loaded, exported.path) == ""
    with torch.no_grad():
        loaded.model.head.bias[1] += 0.01
    assert "score is off by" in steps.other_answers(made, loaded, exported.path)
