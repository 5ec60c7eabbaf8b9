import gc
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from models import (
    SIGNAL,
    BatchNormalizingNet,
    DictNet,
    FaultyNet,
    IntegerNet,
    NaNNet,
    SmallNet,
    UnclampedNet,
    declare,
)
from onnx import TensorProto, helper
from torch import nn

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.evidence.parity.departure import locate_departure
from heimdall_onnx.evidence.parity.one_pass import PLOTTED_SAMPLES
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, RTOL
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

SIGNATURE = SmallNet.signature
MARK = 4.25  # a sample's first element, where a fault shall strike that sample alone
ADVERSARIAL = {"zeros", "constant", "amplitude ×0.01", "amplitude ×100", "silent channel"}

MEAN = "mean absolute error"
ELEMENTS = "elements on evaluation data"
ADVERSARIAL_ELEMENTS = "elements on adversarial inputs"
NONFINITE = "NaN and Inf in the same places"
NOISE = "noise floor of positions"
INDEPENDENCE = "batch independence"
RANGE = "range of spread"
GATES = [
    MEAN,
    ELEMENTS,
    ADVERSARIAL_ELEMENTS,
    NONFINITE,
    NOISE,
    "noise floor of spread",
    INDEPENDENCE,
    RANGE,
]


def evaluation(count=64, signature=SIGNATURE, seed=1, **inputs):
    arrays = generic_inputs(signature, count, seed) | inputs
    return EvaluationData(arrays, None, {}, "test data", "0" * 64, {})


def marked(count=64, sample=37):
    """Evaluation data in which one sample bears the mark; 37 is no reference sample of 64."""
    signal = generic_inputs(SIGNATURE, count, 1)["signal"]
    signal[sample, 0, 0, 0] = MARK
    return evaluation(signal=signal)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Models as small as these are quicker so, by far where others use the processors too.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that exports a model, each class or fault once."""
    folder, made = tmp_path_factory.mktemp("compare"), {}

    def export(model, opset=17):
        key = (type(model), getattr(model, "fault", None), opset)
        if key not in made:
            made[key] = folder / f"{len(made)}.onnx"
            export_model(model, made[key], opset=opset)
        return made[key]

    return export


@pytest.fixture
def compare(exported):
    """A function that compares a model with the export of ``other``, or of its own."""

    def run(model, data=None, other=None, opset=17, **options):
        session = open_session(exported(other or model, opset), threads=1, spinning=False)
        data = data or evaluation(signature=model.signature)
        return compare_outputs(model, session, data, model.signature, **options)

    return run


def failed(report):
    return {gate.name for gate in report.gates() if not gate.passed}


def gate(report, name):
    return next(g for g in report.gates() if g.name == name)


def shift(amount, when=None):
    """A fault that moves the positions by ``amount``, everywhere or in samples ``when`` says."""

    def fault(signal, positions, spread):
        where = 1.0 if when is None else when(signal).to(positions.dtype)[:, None]
        return positions + amount * where, spread

    return fault


def at_mark(signal):
    return signal[:, 0, 0, 0] == MARK


def all_zero(signal):
    return signal.abs().amax((1, 2, 3)) == 0


def huge(signal):
    return signal.abs().amax((1, 2, 3)) > 50


def tiny(signal):
    amplitude = signal.abs().amax((1, 2, 3))
    return (amplitude < 0.1) & (amplitude > 0)


def constant(signal):
    return (signal == 1).to(signal.dtype).amin((1, 2, 3)) == 1


def silent(signal):
    return (signal[:, 0].abs().amax((1, 2)) == 0) & (signal[:, 1].abs().amax((1, 2)) > 0)


@pytest.mark.parametrize("opset", [17, 20])
@pytest.mark.parametrize("model", [SmallNet(), DictNet()], ids=lambda m: type(m).__name__)
def test_faithful_export_passes_every_gate(compare, model, opset):
    report = compare(model, opset=opset)
    assert failed(report) == set()
    assert [g.name for g in report.gates()] == GATES
    assert report.samples == 64
    assert all(o.maximum < 1e-6 for o in report.evaluation)


def test_single_bad_element_that_the_mean_hides_is_found(compare):
    bad = FaultyNet(shift(torch.tensor([5e-4, 0]), at_mark))
    report = compare(SmallNet(), marked(), bad)
    assert failed(report) == {ELEMENTS}
    assert gate(report, MEAN).measured < 1e-5 < gate(report, MEAN).measured * 3
    assert gate(report, ELEMENTS).measured == 1
    assert "positions: 1 of 128 on evaluation data, batch 8, largest error 0.0005" in (
        gate(report, ELEMENTS).detail
    )
    assert report.evaluation[0].worst[0].sample == 37
    assert report.worst_where == "evaluation data, batch 8"
    np.testing.assert_array_equal(report.worst_inputs["signal"], marked().inputs["signal"][32:40])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_value_that_is_not_finite_on_one_side_is_found(compare, value):
    def fault(signal, positions, spread):
        wrong = torch.full_like(positions, value)
        return torch.where(at_mark(signal)[:, None], wrong, positions), spread

    report = compare(SmallNet(), marked(), FaultyNet(fault))
    # Each statistic over such a sample says so; ground distances are no gate.
    assert failed(report) == {MEAN, ELEMENTS, NONFINITE}
    assert gate(report, NONFINITE).detail == "positions: 2 of 128 on evaluation data, batch 8"
    assert "positions" in gate(report, MEAN).detail
    assert np.isnan(report.ground.displacement_max_m)
    assert report.worst_where == "evaluation data, batch 8"


def test_nan_that_pytorch_alone_has_is_found(compare):
    def fault(signal, positions, spread):
        wrong = torch.full_like(positions, np.nan)
        return torch.where(at_mark(signal)[:, None], wrong, positions), spread

    report = compare(FaultyNet(fault), marked(), SmallNet())
    assert failed(report) == {MEAN, ELEMENTS, NONFINITE}
    np.testing.assert_array_equal(report.worst_inputs["signal"], marked().inputs["signal"][32:40])


def test_nan_and_inf_on_both_sides_are_agreement(compare):
    report = compare(NaNNet())
    assert (report.evaluation[0].count, report.evaluation[0].nonfinite_mismatches) == (192, 0)
    assert report.evaluation[0].nonfinite > 50
    assert failed(report) == set()


def test_output_without_a_single_finite_element_is_no_agreement(compare):
    def fault(signal, positions, spread):
        return positions, torch.full_like(spread, np.nan)

    report = compare(FaultyNet(fault))
    assert failed(report) == {MEAN, "noise floor of spread", RANGE}
    assert np.isnan(gate(report, MEAN).measured)
    assert "spread" in gate(report, MEAN).detail


def test_bias_within_the_tolerance_exceeds_the_noise_floor(compare):
    report = compare(SmallNet(), other=FaultyNet(shift(4e-6)))
    assert failed(report) == {NOISE}
    floor = report.noise_floor[0]
    assert floor.onnx_error == pytest.approx(4e-6, rel=0.1)
    assert floor.limit == 2 * floor.pytorch_error + floor.ulp < 1e-6
    assert f"PyTorch float32: {floor.pytorch_error:.3g}" in gate(report, NOISE).detail


def test_noise_floor_is_measured_against_float64(compare, exported):
    data = evaluation(20)
    report = compare(SmallNet(), data, reference_samples=7)
    rows = [0, 3, 6, 9, 12, 15, 19]  # evenly spaced
    signal = torch.from_numpy(data.inputs["signal"][rows])
    with torch.no_grad():
        exact, single = SmallNet().double()(signal.double())[0], SmallNet()(signal)[0]
    floor = report.noise_floor[0]
    assert (floor.output, floor.samples) == ("positions", 7)
    assert floor.pytorch_error == pytest.approx(float((single - exact).abs().mean()), rel=0.5)
    session = open_session(exported(SmallNet()), threads=1)
    found = run_onnx(session, {"signal": signal.numpy()}, SIGNATURE)["positions"]
    assert floor.onnx_error == pytest.approx(np.abs(found - exact.numpy()).mean(), rel=1e-6)
    assert floor.ulp == np.spacing(np.float32(exact.abs().mean()))


def test_noise_floor_leaves_out_what_float32_alone_can_not_hold(compare):
    def overflowing(signal, positions, spread):
        large = 1e38 * (1 + 9 * (signal[:, :1, 0, 0] > 1).to(signal.dtype))
        return positions + (large - large * 1.0), spread

    found = compare(FaultyNet(overflowing), reference_samples=20)
    assert not np.isfinite(found.pytorch["positions"]).all()
    floor, usual = found.noise_floor[0], compare(SmallNet(), reference_samples=20).noise_floor[0]
    assert floor.pytorch_error == pytest.approx(usual.pytorch_error, rel=0.5)
    assert floor.onnx_error == pytest.approx(usual.onnx_error, rel=0.5)


def test_noise_floor_pools_no_more_samples_than_there_are(compare):
    assert compare(SmallNet(), evaluation(3)).noise_floor[0].samples == 3


def test_model_without_weights_has_a_noise_floor_too(compare):
    class Chain(nn.Module):
        signature = NaNNet.signature

        def forward(self, x):
            return torch.tanh(torch.exp(torch.sin(x)) * 3.3) / 7

    floor = compare(Chain()).noise_floor[0]
    assert floor.pytorch_error > 0


def test_model_that_fixes_its_precision_has_a_reference_in_float64_all_the_same(compare):
    class Fixed(SmallNet):
        def forward(self, signal):
            shift = torch.zeros(1, dtype=torch.float32)
            shift[0] = 0.0
            return super().forward(signal.float() + shift)

    floors = [(floor.pytorch_error, floor.onnx_error) for floor in compare(Fixed()).noise_floor]
    assert floors == [
        (floor.pytorch_error, floor.onnx_error) for floor in compare(SmallNet()).noise_floor
    ]


def test_model_that_normalizes_over_the_batch_is_found(compare):
    report = compare(BatchNormalizingNet())
    assert failed(report) == {INDEPENDENCE}
    found = report.independence
    assert found.neighbour in ADVERSARIAL
    assert found.largest_error > 1e-3
    assert found.comparisons == 3 * 6 * 2  # rows, neighbours, outputs
    assert f"beside {found.neighbour}" in gate(report, INDEPENDENCE).detail


def test_z_scored_neighbours_alone_would_have_missed_it(compare, exported):
    signal = generic_inputs(SIGNATURE, 8)["signal"].astype(np.float64)
    axes = (1, 2, 3)
    signal -= signal.mean(axes, keepdims=True)
    signal = (signal / signal.std(axes, keepdims=True)).astype(np.float32)
    session = open_session(exported(BatchNormalizingNet()), threads=1)
    alone = run_onnx(session, {"signal": signal[:1]}, SIGNATURE)["positions"]
    beside = run_onnx(session, {"signal": signal}, SIGNATURE)["positions"][:1]
    np.testing.assert_allclose(beside, alone, rtol=RTOL, atol=1e-5)
    report = compare(BatchNormalizingNet(), evaluation(signal=signal))
    assert failed(report) == {INDEPENDENCE}


def test_row_that_its_neighbours_make_finite_is_no_agreement(compare):
    """Alone it is infinite: a difference beyond measure, not one without measure."""

    class Alone(SmallNet):
        def forward(self, signal):
            positions, spread = super().forward(signal)
            others = (signal - signal.mean(0)).abs().amax()
            return positions / torch.where(others > 0, 1.0, 0.0), spread

    report = compare(Alone())
    assert INDEPENDENCE in failed(report)
    assert report.independence.excess == np.inf


def test_uncertainty_out_of_range_is_found_though_both_sides_agree(compare):
    report = compare(UnclampedNet())
    assert failed(report) == {RANGE}
    assert gate(report, RANGE).limit == "in [0.01, 1]"


@pytest.mark.parametrize("value", [0.009, 1.001, -np.inf, np.nan])
def test_single_value_out_of_range_is_enough(compare, value):
    def fault(signal, positions, spread):
        wrong = torch.full_like(spread, value)
        return positions, torch.where(at_mark(signal)[:, None], wrong, spread)

    assert failed(compare(FaultyNet(fault), marked())) == {RANGE}


@pytest.mark.parametrize("limit", [0.01, 1.0])
def test_limit_itself_is_in_range_as_float32_has_it(compare, limit):
    def fault(signal, positions, spread):
        return positions, torch.full_like(spread, limit)

    assert failed(compare(FaultyNet(fault))) == set()


def test_range_that_is_open_upwards_holds_integers(compare):
    class Counts(IntegerNet):
        signature = declare(
            IntegerNet.signature.inputs,
            [TensorSpec("level", "int64", ("batch", 4), range=(0, float("inf")))],
        )

        def forward(self, values, station):
            return super().forward(values.abs(), station)

    data = integer_data()
    assert failed(compare(Counts(), data)) == set()
    Counts.signature = declare(
        Counts.signature.inputs,
        [TensorSpec("level", "int64", ("batch", 4), range=(0, 2))],
    )
    assert failed(compare(Counts(), data)) == {"range of level"}


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("zeros", all_zero),
        ("constant", constant),
        ("amplitude ×0.01", tiny),
        ("amplitude ×100", huge),
        ("silent channel", silent),
    ],
)
def test_fault_on_one_adversarial_kind_alone_is_found(compare, kind, when):
    report = compare(SmallNet(), other=FaultyNet(shift(2e-3, when)))
    assert failed(report) == {ADVERSARIAL_ELEMENTS}
    detail = gate(report, ADVERSARIAL_ELEMENTS).detail
    assert {k for k in ADVERSARIAL if f" on {k}," in detail} == {kind}
    assert report.worst_where.startswith(f"{kind}, batch ")
    assert when(torch.from_numpy(report.worst_inputs["signal"])).any()


def test_adversarial_inputs_are_allowed_ten_times_as_much(compare):
    assert failed(compare(SmallNet(), other=FaultyNet(shift(8e-5, all_zero)))) == set()
    report = compare(SmallNet(), other=FaultyNet(shift(1.2e-4, all_zero)))
    assert failed(report) == {ADVERSARIAL_ELEMENTS}
    assert gate(report, ADVERSARIAL_ELEMENTS).limit.startswith("0 beyond 0.0001 + 1.3e-05·")


def test_worst_inputs_are_those_that_exceed_what_is_allowed_there(compare):
    def fault(signal, positions, spread):
        shifts = 5e-5 * all_zero(signal) + 2e-5 * at_mark(signal)
        return positions + shifts[:, None], spread

    report = compare(SmallNet(), marked(), FaultyNet(fault))
    assert report.worst_where == "evaluation data, batch 8"


def test_worst_samples_of_every_cell_are_numbered_as_in_the_data(compare):
    report = compare(SmallNet(), marked(sample=5), FaultyNet(shift(1e-3, at_mark)))
    found = {c.outputs[0].worst[0].sample for c in report.cells if c.kind == EVALUATION}
    assert found == {5}


def test_bias_beyond_the_documented_mean_fails_it(compare):
    report = compare(SmallNet(), other=FaultyNet(shift(1.5e-5)), tolerance=1e-5)
    assert {MEAN, ELEMENTS, NOISE} == failed(report)
    report = compare(SmallNet(), other=FaultyNet(shift(1.5e-5)), tolerance=1e-4)
    assert failed(report) == {NOISE}
    assert (report.tolerance, gate(report, MEAN).limit) == (1e-4, "≤ 0.0001")


def test_tolerance_widens_the_absolute_part_alone(compare):
    """A relative fault stays one, however wide the documented tolerance is."""

    def fault(signal, positions, spread):
        return positions * 1.001, spread

    class Far(SmallNet):
        def forward(self, signal):
            positions, spread = super().forward(signal)
            return positions + 1000, spread

    class Moved(Far):
        def forward(self, signal):
            positions, spread = super().forward(signal)
            # Neighbours move a row by 1e-4 of itself.
            busy = (signal - signal.mean(0)).abs().amax() > 0
            return positions * torch.where(busy, 1.0001, 1.0), spread

    report = compare(Moved(), tolerance=1e-3)
    assert failed(report) == {INDEPENDENCE}
    assert report.independence.excess == pytest.approx(0.1 / (1e-3 + RTOL * 1000), rel=0.01)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_every_kind_is_compared_at_one_two_three_and_the_largest(compare, batch_size):
    report = compare(SmallNet(), evaluation(10), batch_size=batch_size)
    sizes = {1, 2, 3, batch_size}
    cells = {(c.kind, c.batch_size) for c in report.cells}
    assert cells == {(kind, size) for kind in (EVALUATION, *ADVERSARIAL) for size in sizes}
    assert len(report.cells) == len(cells)
    first = report.cells[0]
    assert (first.kind, first.batch_size, first.samples) == (EVALUATION, batch_size, 10)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_evaluation_data_smaller_than_the_batch_still_fills_one(compare, count):
    seen = set()

    class Spy(SmallNet):
        def forward(self, signal):
            if not torch.jit.is_tracing():
                seen.add(len(signal))
            return super().forward(signal)

    report = compare(Spy(), evaluation(count), batch_size=8)
    assert {1, 2, 3, 8} <= seen
    assert [c.batch_size for c in report.cells if c.kind == EVALUATION] == [
        count,
        *sorted({1, 2, 3, 8} - {count}),
    ]
    assert report.cells[0].samples == report.samples == count
    assert failed(report) == set()
    for cell in report.cells:
        assert cell.samples >= cell.batch_size


def test_cells_at_small_batches_hold_whole_batches_of_evaluation_data(compare):
    seen = []

    class Spy(SmallNet):
        def forward(self, signal):
            seen.append(len(signal))
            return super().forward(signal)

    report = compare(Spy(), evaluation(7), batch_size=7, other=SmallNet())
    evaluation_calls = seen[1 : 2 + 7 + 4 + 3]  # the first only finds how large the outputs are
    assert evaluation_calls == [7] + [1] * 7 + [2] * 4 + [3] * 3
    assert [c.samples for c in report.cells[:4]] == [7, 7, 8, 9]


def integer_data():
    rng = np.random.default_rng(0)
    return evaluation(
        signature=IntegerNet.signature,
        values=rng.uniform(-100, 100, (64, 4)).astype(np.float32),
        station=rng.integers(0, 3, 64),
    )


def test_integer_inputs_are_never_scaled_and_integer_outputs_are_compared(compare):
    report = compare(IntegerNet(), integer_data())
    # A range of ±1000 is left at ×100, which is no fault of the export.
    assert failed(report) == {"range of level"}
    assert report.noise_floor == ()
    assert report.ground is None
    assert {c.kind for c in report.cells} == {EVALUATION, *ADVERSARIAL}


class Timed(nn.Module):
    """The mean over time, of any length; ``fault`` is added at three samples."""

    signature = Signature(
        (TensorSpec("x", "float32", ("batch", 2, "time")),),
        (TensorSpec("y", "float32", ("batch", 2)),),
    )

    def __init__(self, fault=0.0):
        super().__init__()
        self.fault = fault
        self.eval()

    def forward(self, x):
        # What an exporter can follow: 1 at three samples of time, 0 at fewer or more.
        ones = torch.ones_like(x[0, 0])
        few = (1 - (ones.sum() - 3).abs()).clamp(min=0)
        return x.mean(2) + self.fault * few


def timed(tmp_path, fault, *axes):
    signature = replace(Timed.signature, axes=axes)
    path = export_model(Timed(fault), tmp_path / "m.onnx", signature=signature, opset=17).path
    data = evaluation(signature=signature)
    return compare_outputs(Timed(), open_session(path, threads=1), data, signature)


def test_axis_without_a_declaration_is_tried_at_its_second_length(tmp_path):
    report = timed(tmp_path, 0.0)
    assert failed(report) == set()
    assert {c.kind for c in report.cells} == {EVALUATION, *ADVERSARIAL, "time = 16"}
    assert {c.kind for c in report.cells if c.valid} == {"time = 16"}


def test_other_lengths_have_the_tolerance_of_the_evaluation_data(tmp_path):
    """2e-5 would be allowed on adversarial inputs."""
    report = timed(tmp_path, 2e-5, Axis("time"))
    assert {c.kind for c in report.cells if c.valid} == {f"time = {n}" for n in (1, 2, 3)}
    assert {c.kind for c in report.cells if c.factor == 10} == {*ADVERSARIAL, "silent feature"}
    assert failed(report) == {MEAN, ELEMENTS}
    assert "on time = 3, batch 1" in gate(report, ELEMENTS).detail
    assert gate(report, MEAN).measured == pytest.approx(2e-5, rel=0.05)
    assert re.fullmatch(r"y, time = 3, batch \d", gate(report, MEAN).detail)
    assert report.worst_where.startswith("time = 3, batch ")
    assert report.worst_factor == 1
    assert report.worst_inputs["x"].shape[2] == 3


def write_onnx(path, nodes, batch, constants=()):
    """A file whose one output is made of ``x`` by ``nodes``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        constants,
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)
    return open_session(path, threads=1)


class Identity(nn.Module):
    signature = NaNNet.signature

    def forward(self, x):
        return x * 1


def test_frozen_batch_axis_is_refused_with_its_shape(tmp_path):
    session = write_onnx(tmp_path / "m.onnx", [helper.make_node("Identity", ["x"], ["y"])], 2)
    data = evaluation(signature=Identity.signature)
    with pytest.raises(EvidenceError, match=r"can't run the model on \{'x': \(8, 3\)\}"):
        compare_outputs(Identity(), session, data, Identity.signature)


def test_batch_axis_frozen_inside_the_graph_is_refused_with_both_shapes(tmp_path):
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value])
        for name, value in (("start", 0), ("end", 2))
    ]
    node = helper.make_node("Slice", ["x", "start", "end"], ["y"])
    session = write_onnx(tmp_path / "m.onnx", [node], "n", constants)
    data = evaluation(signature=Identity.signature)
    with pytest.raises(EvidenceError, match=r"y has shape \(2, 3\).*PyTorch gives \(8, 3\).*froz"):
        compare_outputs(Identity(), session, data, Identity.signature)


def test_model_that_can_not_run_on_one_sample_is_refused(compare):
    class Two(SmallNet):
        def forward(self, signal):
            if len(signal) == 1:
                raise ValueError("one is not enough")
            return super().forward(signal)

    with pytest.raises(EvidenceError, match=r"Two can't run on.*one is not enough"):
        compare(Two(), other=SmallNet())


def test_outputs_for_figures_are_the_first_samples_in_order(compare):
    data = evaluation(21)
    report = compare(SmallNet(), data)
    with torch.no_grad():
        positions, _ = SmallNet()(torch.from_numpy(data.inputs["signal"]))
    for side in (report.pytorch, report.onnx):
        np.testing.assert_allclose(side["positions"], positions.numpy(), atol=1e-6)
    assert not np.array_equal(report.pytorch["positions"], report.onnx["positions"])


def test_positions_are_compared_on_the_ground_with_labels(compare):
    data = evaluation(20)
    labelled = EvaluationData(
        data.inputs, np.full((20, 2), (1.0, 2.0)), {"centre": [0, 0]}, "labelled", "0" * 64, {}
    )
    report = compare(SmallNet(), labelled, FaultyNet(shift(torch.tensor([1.0, 0.0]))))
    assert report.ground.displacement_p50_m == pytest.approx(110_574, rel=1e-3)
    assert report.ground.middle == (0, 0)
    assert [t.who for t in report.ground.task] == ["PyTorch", "ONNX", "always the middle"]
    middle = report.ground.task[2].median_m
    assert middle == pytest.approx(np.hypot(110_574, 2 * 111_320), rel=1e-2)
    assert report.source == "labelled"


def test_each_answer_is_held_against_its_own_label(compare):
    data = evaluation(20)
    with torch.no_grad():
        positions = SmallNet()(torch.from_numpy(data.inputs["signal"]))[0].numpy()
    labelled = EvaluationData(data.inputs, positions.astype(float), {}, "own", "0" * 64, {})
    task = compare(SmallNet(), labelled).ground.task
    assert task[0].p95_m < 0.1 < task[2].median_m


def test_tracks_are_no_positions(compare):
    class Tracks(SmallNet):
        signature = declare(
            [SIGNAL], [TensorSpec("track", "float32", ("batch", 2, 2), unit=DEGREES)]
        )

        def forward(self, signal):
            return torch.stack(super().forward(signal), dim=1)

    assert compare(Tracks()).ground is None


def test_without_positions_there_is_no_ground(compare):
    assert compare(NaNNet()).ground is None


def test_progress_counts_every_sample_once(compare):
    seen = []
    compare(SmallNet(), evaluation(20), progress=lambda *counts: seen.append(counts))
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_faithful_export_needs_no_departure(compare, exported):
    report = compare(SmallNet())
    assert report.worst_inputs["signal"].shape[1:] == SIGNAL.shape[1:]
    assert locate_departure(report, SmallNet(), exported(SmallNet())) is None


def test_departure_is_looked_for_on_the_worst_inputs(compare, exported):
    class Detuned(SmallNet):
        def __init__(self):
            super().__init__()
            with torch.no_grad():
                self.body[0].weight += 0.01

    report = compare(SmallNet(), other=Detuned())
    assert locate_departure(report, SmallNet(), exported(Detuned())).scope == "body.0"


def test_memory_does_not_grow_with_the_number_of_samples(compare):
    model, peaks = SmallNet(), []
    for count in (2 * PLOTTED_SAMPLES, 10 * PLOTTED_SAMPLES):
        # One sample seen many times takes no memory itself.
        signal = np.broadcast_to(generic_inputs(SIGNATURE, 1)["signal"], (count, 2, 8, 8))
        data = evaluation(1)
        data = EvaluationData({"signal": signal}, None, {}, "long", "0" * 64, {})
        compare(model, evaluation(2))  # what is made once
        gc.collect()
        tracemalloc.start()
        report = compare(model, data, batch_size=500)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.cells[0].samples == count
        assert len(report.pytorch["positions"]) == PLOTTED_SAMPLES
    assert peaks[1] < 1.2 * peaks[0]


def test_kept_outputs_are_spread_over_the_data_and_know_their_samples(compare):
    model, count = SmallNet(), 3 * PLOTTED_SAMPLES + 5
    signal = np.zeros((count, 2, 8, 8), np.float32)
    signal += np.arange(count, dtype=np.float32)[:, None, None, None] / count
    data = EvaluationData({"signal": signal}, None, {}, "long", "0" * 64, {})
    report = compare(model, data, batch_size=50)
    rows = report.plotted
    assert (rows[0], rows[-1]) == (0, count - 1)
    assert np.all(np.diff(rows) > 0)
    assert np.diff(rows).max() < 0.05 * count
    expected = run_pytorch(model, {"signal": signal[rows]}, SIGNATURE)["positions"]
    np.testing.assert_allclose(report.pytorch["positions"], expected, atol=1e-6)
    assert [report.place_of(int(row)) for row in rows[[0, 7, -1]]] == [0, 7, len(rows) - 1]
    left_out = sorted({*range(count)} - {*rows.tolist()})
    assert [report.place_of(row) for row in (left_out[0], left_out[-1], count)] == [None] * 3


def test_cells_are_in_the_signatures_order_of_outputs(compare):
    report = compare(DictNet())
    assert all([o.output for o in c.outputs] == ["positions", "spread"] for c in report.cells)
    assert isinstance(report.signature, Signature)


class Summed(nn.Module):
    """A batch of one, an output without axes, and one without a batch."""

    signature = declare(
        [TensorSpec("x", "float32", (1, 4))],
        [
            TensorSpec("y", "float32", (1, 4)),
            TensorSpec("total", "float32", ()),
            TensorSpec("grid", "float32", (3,)),
        ],
    )

    def __init__(self):
        super().__init__()
        self.register_buffer("grid", torch.arange(3.0))

    def forward(self, x):
        return x * 2, x.sum(), self.grid + 0 * x.sum()


def test_a_fixed_batch_and_outputs_without_one_are_compared(tmp_path):
    model = Summed().eval()
    path = export_model(model, tmp_path / "m.onnx", opset=17).path
    data = evaluation(count=9, signature=Summed.signature)
    report = compare_outputs(model, path, data, Summed.signature)
    assert failed(report) == set()
