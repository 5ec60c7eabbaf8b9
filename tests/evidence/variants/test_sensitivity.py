import numpy as np
import pytest
from families import Triangulator
from models import BlockNet

from heimdall_onnx.evidence.variants.recipes import VariantJob, make_variant
from heimdall_onnx.evidence.variants.sensitivity import (
    GroupNoise,
    NoiseProfile,
    noise_profile,
    relative_error,
)
from heimdall_onnx.model.examples import Examples, generic_inputs
from heimdall_onnx.model.onnx.export import export_model

INPUTS = generic_inputs(BlockNet.signature, 16)
MODULES = [name for name, _ in BlockNet().named_modules(remove_duplicate=False)]


@pytest.fixture(scope="module", params=[14, 20])
def fp32(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_model(BlockNet().eval(), path, signature=BlockNet.signature, opset=request.param)
    return path


def test_groups_are_blocks_and_single_layers(fp32):
    profile = noise_profile("fp32", fp32, fp32, MODULES, INPUTS)
    groups = {group.scope: group.nodes for group in profile.groups}
    assert {scope: len(nodes) for scope, nodes in groups.items()} == {
        "stem": 1,
        "blocks.0": 2,
        "blocks.1": 2,
        "blocks.2": 2,
        "position_head": 1,
        "spread_head": 1,
    }
    nodes = [node for group in groups.values() for node in group]
    assert len(nodes) == len(set(nodes)) == 9


def test_the_block_that_is_hard_to_round_is_found_and_spared(fp32, tmp_path):
    target = tmp_path / "int8.onnx"
    make_variant("int8-minmax", VariantJob(fp32, target, INPUTS, (), tmp_path))
    profile = noise_profile("int8-minmax", fp32, target, MODULES, INPUTS)
    (worst,) = profile.most_sensitive(1)
    assert worst.scope == f"blocks.{BlockNet.hard}"
    assert worst.noise > 5 * worst.entering
    make_variant("int8-minmax", VariantJob(fp32, target, INPUTS, worst.nodes, tmp_path))
    spared = noise_profile("int8-minmax", fp32, target, MODULES, INPUTS)
    by_scope = {group.scope: group.noise for group in spared.groups}
    assert by_scope[worst.scope] < worst.noise / 5
    assert by_scope["blocks.2"] < 0.05


def test_fp32_against_itself_has_no_noise(fp32):
    profile = noise_profile("fp32", fp32, fp32, MODULES, INPUTS)
    assert len(profile.groups) == 6
    assert profile.samples == 16
    assert all(group.noise == group.entering == group.added == 0 for group in profile.groups)


def test_relative_error_is_rms_over_rms():
    reference = np.array([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference, reference + np.array([0.5, 0.0])) == pytest.approx(0.1)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    infinite = np.array([1.0, -np.inf, np.nan, 2.0])
    assert relative_error(infinite, infinite) == 0
    assert relative_error(infinite, infinite[[1, 0, 2, 3]]) == np.inf
    assert relative_error(np.zeros(2), np.ones(2)) == np.inf
    assert relative_error(reference, np.array([np.nan, 4.0])) == np.inf
    assert relative_error(reference, np.ones(3)) == np.inf


def test_groups_are_ordered_though_some_noise_is_infinite():
    inf = float("inf")
    groups = [
        GroupNoise(scope, (), noise, entering)
        for scope, noise, entering in (("a", 0.1, 0), ("b", inf, inf), ("c", 5, 0), ("d", inf, 1))
    ]
    profile = NoiseProfile("int8", tuple(groups), 8)
    assert [group.scope for group in profile.most_sensitive(3)] == ["d", "c", "a"]


@pytest.mark.parametrize("opset", [14, pytest.param(20, marks=pytest.mark.slow)])
def test_products_that_no_module_has_to_itself_are_groups_of_their_own(opset, tmp_path):
    model = Triangulator()
    path = tmp_path / "model.onnx"
    export_model(model, path, signature=model.signature, opset=opset)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    inputs = Examples(model.signature, model).valid(4)
    profile = noise_profile("fp32", path, path, modules, inputs)
    groups = {group.scope: group.nodes for group in profile.groups}
    alone = {name for name in groups if name not in modules}
    # Queries by keys and weights by values, in each of two layers.
    assert len(alone) == 4
    assert all(groups[name] == (name,) for name in alone)
    assert {"embed", "layers.0.query", "layers.1.mix", "pool", "answer"} <= groups.keys()
    assert all(group.noise == group.entering == 0 for group in profile.groups)
