import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn

from heimdall_onnx.common.errors import DataError, EvidenceError, ParameterError
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.signature import Signature, TensorSpec

COUNT, CLASSES = 60, 4


def signature(*outputs):
    specs = (TensorSpec(name, dtype, ("batch", *shape)) for name, dtype, shape in outputs)
    return Signature((TensorSpec("x", "float32", ("batch", 3)),), tuple(specs))


LOGITS = signature(("logits", "float32", (CLASSES,)))


def value_of(spec, outputs, labels, takes=LOGITS):
    (metric,) = metrics_for(spec, takes, {"labels": labels})
    rows = metric.rows(outputs, labels)
    assert len(rows) == len(labels)
    if metric.ranked is not None:
        return metric.ranked(rows, labels)
    return float(metric.score(rows.sum(axis=0, keepdims=True), np.array([float(len(rows))]))[0])


@pytest.fixture
def classified():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, COUNT)
    logits = rng.normal(size=(COUNT, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    return {"logits": logits.astype(np.float32)}, labels


def test_values_are_those_of_scikit_learn(classified):
    outputs, labels = classified
    shares = torch.from_numpy(outputs["logits"]).softmax(1).double().numpy()
    shares /= shares.sum(axis=1, keepdims=True)
    best = shares.argmax(axis=1)
    expected = {
        "top1": sklearn.accuracy_score(labels, best),
        "top5": 1.0,
        "f1": sklearn.f1_score(labels, best, average="macro"),
        "iou": sklearn.jaccard_score(labels, best, average="macro"),
        "nll": sklearn.log_loss(labels, shares),
        "auroc": sklearn.roc_auc_score(labels, shares, multi_class="ovr"),
        "map": sklearn.average_precision_score(np.eye(CLASSES)[labels], shares),
        "torchmetrics.classification:MulticlassCohenKappa:higher": sklearn.cohen_kappa_score(
            labels, best
        ),
    }
    for name, value in expected.items():
        assert value_of(name, outputs, labels) == pytest.approx(value, abs=1e-5), name
    # Probabilities are worth what the logits are that they come from.
    as_shares = {"logits": shares.astype(np.float32)}
    assert value_of("nll", as_shares, labels) == pytest.approx(expected["nll"], abs=1e-5)
    assert 0 < value_of("ece", outputs, labels) < 1


def test_regressions_have_a_value_for_each_label():
    rng = np.random.default_rng(1)
    labels, found = rng.normal(size=(2, COUNT, 2))
    takes = signature(("y", "float64", (2,)))
    for name, score in (("rmse", "root_mean_squared_error"), ("mae", "mean_absolute_error")):
        expected = getattr(sklearn, score)(labels.ravel(), found.ravel())
        assert value_of(name, {"y": found}, labels, takes) == pytest.approx(expected)
    column = value_of("mae", {"y": found[:, :1]}, labels[:, 0], signature(("y", "float64", (1,))))
    assert column == pytest.approx(np.abs(labels[:, 0] - found[:, 0]).mean())


@pytest.mark.parametrize("last", [False, True])
def test_elements_that_nobody_labelled_do_not_count(last):
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, (8, 5, 6))
    scores = rng.normal(size=(8, 2, 5, 6)).astype(np.float32)
    right = (scores.argmax(axis=1) == labels)[:, 1:].mean()
    labels[:, 0] = 255
    takes = signature(("map", "float32", (2, 5, 6)))
    given = np.moveaxis(scores, 1, -1) if last else scores
    assert value_of("top1", {"map": given}, labels, takes) == pytest.approx(right)


def test_a_sample_of_which_nobody_knows_anything_is_neither_right_nor_wrong(classified):
    outputs, labels = classified
    known = labels.copy()
    known[5] = -1
    for name in ("top1", "nll"):
        (metric,) = metrics_for(name, LOGITS, {"labels": known})
        rows = metric.rows(outputs, known)[:, 0]
        assert np.flatnonzero(np.isnan(rows)).tolist() == [5]


def test_classes_that_are_answered_are_held_against_labels_of_any_shape():
    classes, labels = np.array([0, 1, 2]), np.array([[0], [2], [2]])
    takes = signature(("classes", "int64", ()))
    assert value_of("top1", {"classes": classes}, labels, takes) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="a class for each of them"):
        value_of("top1", {"classes": classes}, np.zeros((3, 2)), takes)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_one_number_stands_for_two_classes(threshold):
    labels = np.array([0, 1, 1, 0, 1, 0])
    scores = np.array([[0.1], [0.9], [0.2], [0.4], [0.7], [0.6]], np.float32) - (0.5 - threshold)
    takes = signature(("score", "float32", (1,)))
    assert value_of("top1", {"score": scores}, labels, takes) == pytest.approx(4 / 6)
    assert value_of("auroc", {"score": scores}, labels, takes) == pytest.approx(
        sklearn.roc_auc_score(labels, scores)
    )


@pytest.mark.parametrize(
    ("outputs", "labels", "expected"),
    [
        ((("logits", "float32", (4,)),), np.zeros(5, np.int64), "top1"),
        ((("classes", "int64", ()),), np.zeros(5, np.int64), "top1"),
        ((("masks", "float32", (2, 8, 8)),), np.zeros((5, 8, 8), np.int64), "iou"),
        ((("tokens", "float32", ("words", 9)),), np.zeros((5, 7), np.int64), "top1"),
        ((("y", "float32", (2,)),), np.zeros((5, 2)), "rmse"),
    ],
)
def test_labels_and_outputs_decide_where_nobody_does(outputs, labels, expected):
    assert [m.name for m in metrics_for("", signature(*outputs), {"labels": labels})] == [expected]
    assert metrics_for("", signature(*outputs), {}) == ()


def test_of_errors_with_a_unit_a_share_is_lost_and_else_a_difference():
    rmse, top1 = metrics_for("rmse, top1", LOGITS, {"labels": np.zeros(1)})
    assert rmse.loss(2.0, 2.1) == pytest.approx(0.05)
    assert rmse.loss(0.0, 0.0) == 0
    assert top1.loss(0.9, 0.88) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("topp1", "did you mean top1"),
        ("localization", "needs an output in degrees"),
        ("no.such.module:function", "the metric can't be used: .*no module"),
        ("metrics_of_one_own:undirected", "write .*:higher or .*:lower"),
    ],
)
def test_what_is_no_metric_is_refused_with_what_to_do(spec, problem, tmp_path, monkeypatch):
    (tmp_path / "metrics_of_one_own.py").write_text("def undirected(outputs, labels): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ParameterError, match=problem):
        metrics_for(spec, LOGITS, {"labels": np.zeros(3, np.int64)})


def test_a_metric_without_its_labels_is_refused():
    with pytest.raises(ParameterError, match="top1 needs the array `labels`"):
        metrics_for("top1", LOGITS, {})


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (np.full(COUNT, CLASSES), r"go up to 4, and the answers have 4 classes"),
        (np.zeros((COUNT, 3), np.int64), r"--ignore labels"),
    ],
)
def test_labels_that_fit_no_answer_are_refused(classified, labels, problem):
    with pytest.raises(DataError, match=problem):
        value_of("top1", classified[0], labels)


def test_functions_of_ones_own_give_a_value_for_each_sample(classified, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def margin(outputs, labels):\n"
        "    return outputs[range(len(labels)), labels]\n"
        "margin.higher_is_better = True\n"
        "def one(outputs, labels):\n"
        "    return 1.0\n"
        "def broken(outputs, labels):\n"
        "    raise KeyError('a key')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outputs, labels = classified
    (metric,) = metrics_for("mine:margin", LOGITS, {"labels": labels})
    assert (metric.name, metric.higher) == ("margin", True)
    mean = outputs["logits"][np.arange(COUNT), labels].mean()
    assert value_of("mine:margin", outputs, labels) == pytest.approx(mean)
    for name, problem in (
        ("one", r"value for each of 60 samples"),
        ("broken", "KeyError: 'a key'"),
    ):
        with pytest.raises(EvidenceError, match=problem):
            value_of(f"mine:{name}:lower", outputs, labels)
