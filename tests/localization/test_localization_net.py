import math
import re

import pytest
import torch
from torch import nn

from heimdall_onnx.common.errors import CheckpointError, ParameterError
from heimdall_onnx.localization.network import BACKBONES, LocalizationNet, localization_signature

# Channels and depths of "A ConvNet for the 2020s", section 3; last stochastic depth as published.
# Atto is of "ConvNeXt V2", appendix A.
SIZES = {
    "tiny": ((96, 192, 384, 768), (3, 3, 9, 3), 0.1),
    "small": ((96, 192, 384, 768), (3, 3, 27, 3), 0.4),
    "medium": ((128, 256, 512, 1024), (3, 3, 27, 3), 0.5),
    "large": ((192, 384, 768, 1536), (3, 3, 27, 3), 0.5),
    "atto": ((40, 80, 160, 320), (2, 2, 6, 2), 0.1),
}
PARAMETERS = {"tiny": 28_032_996, "large": 196_638_276}
CENTROID, SCALE_M = (50.0152, 9.0112), 250e3


def torchvision_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dict of torchvision's ConvNeXt, without the classifier."""
    channels, depths, _ = SIZES[size]
    shapes = {
        "features.0.0.weight": (channels[0], 3, 4, 4),
        "features.0.0.bias": (channels[0],),
        "features.0.1.weight": (channels[0],),
        "features.0.1.bias": (channels[0],),
    }
    for stage, (dim, depth) in enumerate(zip(channels, depths, strict=True)):
        for block in range(depth):
            at = f"features.{2 * stage + 1}.{block}"
            shapes[f"{at}.layer_scale"] = (dim, 1, 1)
            for layer, weight, bias in (
                (0, (dim, 1, 7, 7), dim),
                (2, (dim,), dim),
                (3, (4 * dim, dim), 4 * dim),
                (5, (dim, 4 * dim), dim),
            ):
                shapes[f"{at}.block.{layer}.weight"] = weight
                shapes[f"{at}.block.{layer}.bias"] = (bias,)
        if stage < 3:
            at = f"features.{2 * stage + 2}"
            shapes[f"{at}.0.weight"] = shapes[f"{at}.0.bias"] = (dim,)
            shapes[f"{at}.1.weight"] = (channels[stage + 1], dim, 2, 2)
            shapes[f"{at}.1.bias"] = (channels[stage + 1],)
    return shapes


def published(size: str) -> dict[str, torch.Tensor]:
    """Random weights in torchvision's layout, the classifier included."""
    generator = torch.Generator().manual_seed(1)
    width = SIZES[size][0][-1]
    shapes = torchvision_shapes(size) | {
        "classifier.0.weight": (width,),
        "classifier.0.bias": (width,),
        "classifier.2.weight": (1000, width),
        "classifier.2.bias": (1000,),
    }
    return {n: 0.02 * torch.randn(s, generator=generator) for n, s in shapes.items()}


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return LocalizationNet(backbone_size="tiny").eval()


@pytest.mark.parametrize("size", SIZES)
def test_backbone_has_torchvisions_names_and_shapes(size):
    with torch.device("meta"):
        model = LocalizationNet(backbone_size=size)
    found = {
        "features." + name.removeprefix("backbone.0."): tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.startswith("backbone.")
    }
    assert found == torchvision_shapes(size)
    if size in PARAMETERS:
        assert model.get_params_count()["total"] == PARAMETERS[size]


def test_large_is_the_default_with_372_entries():
    with torch.device("meta"):
        model = LocalizationNet()
    assert model.backbone_size == "large"
    assert len(model.state_dict()) == 372
    assert model.position_head[0].in_features == 1536


@pytest.mark.parametrize("head", ["position_head", "uncertainty_head"])
def test_heads_are_the_specified_layers(tiny, head):
    assert [str(layer) for layer in getattr(tiny, head)] == [
        "Linear(in_features=768, out_features=128, bias=True)",
        str(torch.nn.BatchNorm1d(128)),
        "ReLU()",
        "Dropout(p=0.3, inplace=False)",
        "Linear(in_features=128, out_features=64, bias=True)",
        str(torch.nn.BatchNorm1d(64)),
        "ReLU()",
        "Dropout(p=0.2, inplace=False)",
        "Linear(in_features=64, out_features=2, bias=True)",
    ]


def test_stochastic_depth_grows_linearly_to_the_published_probability():
    for size, (_, _, last) in SIZES.items():
        with torch.device("meta"):
            model = LocalizationNet(backbone_size=size)
        found = [m.probability for m in model.modules() if hasattr(m, "probability")]
        count = sum(BACKBONES[size].depths)
        assert found == pytest.approx([last * i / (count - 1) for i in range(count)])


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_outputs_follow_the_batch(tiny, batch):
    with torch.no_grad():
        positions, uncertainties = tiny(torch.randn(batch, 3, 128, 32))
    assert positions.shape == uncertainties.shape == (batch, 2)


def test_uncertainties_stay_within_limits_and_positions_do_not():
    torch.manual_seed(0)
    model = LocalizationNet(uncertainty_min=0.6, uncertainty_max=0.8, backbone_size="tiny").eval()
    with torch.no_grad():
        model.position_head[8].bias.copy_(torch.tensor([500.0, -500.0]))
        inputs = torch.randn(1, 3, 128, 32)
        for bias, limit in ((-50.0, 0.6), (50.0, 0.8)):
            model.uncertainty_head[8].bias.fill_(bias)
            positions, uncertainties = model(inputs)
            torch.testing.assert_close(uncertainties, torch.full((1, 2), limit))
    torch.testing.assert_close(positions, torch.tensor([[500.0, -500.0]]), atol=1, rtol=0)
    assert model.signature == localization_signature((0.6, 0.8))


def test_uncertainty_between_the_limits_is_the_softplus(tiny):
    inputs = torch.randn(3, 3, 128, 32)
    with torch.no_grad():
        raw = tiny.uncertainty_head(tiny.backbone(inputs).flatten(1))
        torch.testing.assert_close(tiny(inputs)[1], torch.log1p(raw.exp()))


def test_eval_is_deterministic_and_train_is_not(tiny):
    inputs = torch.randn(4, 3, 128, 32)
    with torch.no_grad():
        torch.testing.assert_close(tiny(inputs), tiny(inputs), atol=0, rtol=0)
        try:
            tiny.train()
            assert not torch.equal(tiny(inputs)[0], tiny(inputs)[0])
        finally:
            tiny.eval()


def test_stochastic_depth_skips_whole_rows_and_keeps_the_mean():
    with torch.device("meta"):
        layers = [m for m in LocalizationNet().modules() if hasattr(m, "probability")]
    depth = layers[-1].train()  # skips half
    torch.manual_seed(0)
    out = depth(torch.ones(4000, 2, 3, 3)).flatten(1)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert (out == out[:, :1]).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.06)
    assert torch.equal(depth.eval()(torch.ones(4, 2, 3, 3)), torch.ones(4, 2, 3, 3))


def test_pretrained_file_in_torchvisions_layout_loads_strictly(tmp_path):
    weights = published("tiny")
    torch.save(weights, tmp_path / "convnext.pth")
    model = LocalizationNet(pretrained=tmp_path / "convnext.pth", backbone_size="tiny")
    for name, value in model.backbone[0].state_dict().items():
        assert torch.equal(value, weights[f"features.{name}"]), name


def test_pretrained_file_of_another_size_is_refused(tmp_path):
    weights = published("tiny")
    del weights["features.3.1.layer_scale"]
    weights["features.0.0.bias"] = torch.zeros(7)
    weights["features.9.bias"] = torch.zeros(1)
    torch.save(weights, tmp_path / "convnext.pth")
    with pytest.raises(CheckpointError) as caught:
        LocalizationNet(pretrained=str(tmp_path / "convnext.pth"), backbone_size="tiny")
    for name in ("3.1.layer_scale", "0.0.bias", "9.bias"):
        assert re.search(rf"\b{re.escape(name)}", str(caught.value))


def test_missing_pretrained_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        LocalizationNet(pretrained=tmp_path / "absent.pth", backbone_size="tiny")


def test_published_weights_come_from_the_hub_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    weights = published("tiny")
    torch.save(weights, cache / "convnext_tiny-983f1562.pth")
    model = LocalizationNet(pretrained=True, backbone_size="tiny")
    assert torch.equal(model.backbone[0][0][0].bias, weights["features.0.0.bias"])


def test_unreachable_published_weights_are_a_checkpoint_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Nothing listens on port 9 of the loopback, so the download fails at once, on any network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"convnext_tiny-983f1562\.pth.*pretrained=False"):
        LocalizationNet(pretrained=True, backbone_size="tiny")
    assert capsys.readouterr().out == ""


def test_frozen_backbone_leaves_the_heads_trainable():
    model = LocalizationNet(freeze_backbone=True, backbone_size="tiny")
    counts = model.get_params_count()
    heads = sum(
        p.numel() for h in (model.position_head, model.uncertainty_head) for p in h.parameters()
    )
    assert counts["trainable"] == heads
    assert counts["frozen"] == counts["total"] - heads
    assert counts["total"] == PARAMETERS["tiny"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_size": "tinny"}, "large, .*tiny, atto; found 'tinny'"),
        ({"backbone_size": "xxl"}, "found 'xxl'$"),
        ({"uncertainty_min": 1.0}, "uncertainty_min < uncertainty_max"),
        ({"uncertainty_min": 0.0}, "0 < uncertainty_min"),
        ({"uncertainty_max": float("inf")}, "uncertainty_max=inf"),
        ({"uncertainty_min": float("nan")}, "uncertainty_min=nan"),
        ({"centroid": CENTROID}, "together.*scale_m=None"),
        ({"centroid": (90.0, 0.0), "scale_m": 1.0}, "at a pole"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ParameterError, match=message):
        LocalizationNet(**{"backbone_size": "tiny"} | arguments)


def test_no_weights_are_published_for_atto(monkeypatch):
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("asked")
    )
    with pytest.raises(CheckpointError, match="no weights are published for this size"):
        LocalizationNet(pretrained=True, backbone_size="atto")


def framed(**options):
    torch.manual_seed(0)
    return LocalizationNet(
        **{"backbone_size": "atto", "centroid": CENTROID, "scale_m": SCALE_M} | options
    )


def test_with_a_frame_the_answers_are_those_of_the_heads_in_degrees():
    model, inputs = framed(uncertainty_max=10.0).eval(), torch.randn(3, 3, 128, 32)
    with torch.no_grad():
        offsets, deviations = model.local(inputs)
        positions, uncertainties = model(inputs)
        bare = model.position_head(model.backbone(inputs).flatten(1))
    assert torch.equal(offsets, bare)
    expected = model.frame.normalize(positions.double().numpy())
    torch.testing.assert_close(offsets, torch.tensor(expected).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(uncertainties, deviations * model.frame.degrees_per_unit)
    assert (positions - torch.tensor(CENTROID)).abs().max() < 20  # near the centroid from the start


def test_a_limit_that_json_gives_as_a_whole_number_can_be_exported():
    # `clamp` has no form that takes a whole and a broken number.
    model = framed(uncertainty_max=10)
    assert [type(end) for end in (model.uncertainty_min, model.uncertainty_max)] == [float, float]
    assert model.signature.outputs[1].range == (0.01, 10.0)


@pytest.mark.parametrize(("bias", "limit"), [(-50.0, 0.6), (50.0, 0.8)])
@pytest.mark.parametrize("training", [True, False])
def test_with_a_frame_the_limits_are_in_degrees(bias, limit, training):
    model = framed(uncertainty_min=0.6, uncertainty_max=0.8).train(training)
    inputs = torch.randn(2, 3, 128, 32)
    with torch.no_grad():
        model.uncertainty_head[8].bias.fill_(bias)
        _, uncertainties = model(inputs)
        _, deviations = model.local(inputs)
    assert uncertainties.min() >= torch.tensor(0.6)
    assert uncertainties.max() <= torch.tensor(0.8)
    torch.testing.assert_close(uncertainties, torch.full((2, 2), limit))
    in_degrees = deviations * model.frame.degrees_per_unit
    torch.testing.assert_close(in_degrees, torch.full((2, 2), limit))


def test_a_frame_loads_strictly_and_a_model_without_one_has_no_trace_of_it():
    model, bare = framed(), LocalizationNet(backbone_size="atto")
    added = model.state_dict().keys() - bare.state_dict().keys()
    assert added == {"frame.centroid", "frame.degrees_per_unit", "frame.deviation_scale"}
    other = framed(centroid=(0.0, 0.0), scale_m=1.0)
    other.load_state_dict(model.state_dict(), strict=True)
    torch.testing.assert_close(other.frame.centroid, torch.tensor(CENTROID))
    with pytest.raises(ParameterError, match="no frame"):
        bare.local(torch.zeros(1, 3, 128, 32))


def test_in_mixed_precision_degrees_stay_fine():
    model, inputs = framed().eval(), torch.randn(4, 3, 128, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        offsets, deviations = model.local(inputs)
        positions, uncertainties = model(inputs)
    assert offsets.dtype == torch.bfloat16
    assert positions.dtype == uncertainties.dtype == deviations.dtype == torch.float32
    steps = positions - torch.tensor(CENTROID)
    assert (steps.bfloat16().float() - steps).abs().max() < 0.25  # no steps of a degree's quarter
    assert not torch.equal(positions, positions.bfloat16().float())


@pytest.mark.parametrize("wanted", [0.005, 0.5, 2.0])
def test_in_training_an_uncertainty_finds_back_into_its_limits(wanted):
    """Descent moves the head's answer towards what the loss wants, whichever side it starts on."""
    for start in (0.001, 5.0):
        model = LocalizationNet(
            backbone_size="atto", uncertainty_min=0.01, uncertainty_max=1.0
        ).train()
        last = model.uncertainty_head[-1]
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(math.expm1(start)))  # what softplus makes start of
        _, uncertainties = model(torch.zeros(2, 3, 32, 32))
        (uncertainties - wanted).square().sum().backward()
        limited = min(max(start, 0.01), 1.0)
        if limited == wanted or (start < 0.01 > wanted) or (start > 1.0 < wanted):
            assert (last.bias.grad == 0).all()  # nothing to be gained outside
        else:
            assert (last.bias.grad.sign() == (1 if limited > wanted else -1)).all()


def test_mirrored_inputs_are_the_same_inputs_mirrored():
    model, inputs = LocalizationNet(backbone_size="atto"), torch.randn(2, 3, 128, 32)
    torch.manual_seed(0)
    seen = {
        next(
            i
            for i, axes in enumerate(([], [2], [3], [2, 3]))
            if torch.equal(found, inputs.flip(axes))
        )
        for (found,) in (model.augment(inputs) for _ in range(40))
    }
    assert seen == {0, 1, 2, 3}


def test_calibrating_leads_to_the_limit_and_no_further():
    model = framed(uncertainty_min=0.01, uncertainty_max=1.0).eval()
    inputs = torch.randn(2, 3, 128, 32)
    with torch.no_grad():
        model.uncertainty_head[8].bias.fill_(50.0)
        model.frame.deviation_scale.fill_(3.0)
        _, uncertainties = model(inputs)
        _, deviations = model.local(inputs)
    torch.testing.assert_close(uncertainties, torch.ones(2, 2))
    in_degrees = deviations * model.frame.degrees_per_unit
    torch.testing.assert_close(in_degrees, torch.ones(2, 2))  # training is not calibrated
