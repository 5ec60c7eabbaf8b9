"""One model of the parameters, whichever way they arrive."""

import json
import os
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from mlflow.utils import validation
from mlflow.utils.validation import _validate_model_alias_name
from papermill.cli import _resolve_type
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from pydantic import ValidationError
from traitlets.config import Config

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import (
    PROFILES,
    ReleaseParameters,
    check_parameters,
    injected_values,
    parameters_of_notebook,
)
from heimdall_onnx.model.onnx.export import OPSETS
from heimdall_onnx.report.notebook import notebook_path


def test_defaults_are_those_of_the_notebook_in_its_order():
    inspected = papermill.inspect_notebook(str(notebook_path()))
    namespace: dict = {}
    (cell,) = [
        c
        for c in nbformat.read(notebook_path(), 4).cells
        if "parameters" in c.metadata.get("tags", [])
    ]
    exec(cell.source, namespace)
    namespace.pop("__builtins__")
    namespace.pop("__annotations__", None)
    assert list(inspected) == list(ReleaseParameters.model_fields)
    fields = ReleaseParameters.model_fields.items()
    assert {n: f.get_default(call_default_factory=True) for n, f in fields} == namespace


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, "models/localization"),
        ({"name": "heimdall-localization-onnx"}, "models/localization"),
        ({"name": "my-classifier"}, "models/my-classifier"),
        ({"name": "my-classifier", "prefix": ""}, "models/my-classifier"),
        ({"name": "my-classifier", "prefix": "models/localization"}, "models/localization"),
        ({"prefix": "elsewhere/deep"}, "elsewhere/deep"),
    ],
)
def test_folder_of_releases_is_called_after_their_model_unless_it_is_given(given, folder):
    made = check_parameters(given)
    assert made.prefix == folder
    assert check_parameters(made.model_dump()) == made


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("", "heimdall-localization-onnx"),
        ("heimdall_onnx:LocalizationNet", "heimdall-localization-onnx"),
        ("heimdall_onnx_mine:Net", "net"),
        ("nets/deep.py:MyUNet2", "my-u-net2"),
        ("transformers:BertModel.from_pretrained", "bert-model"),
        ("nets:build_lstm", "build-lstm"),
        ("nets:__", "model"),
    ],
)
def test_model_without_a_name_is_called_after_its_class(model, name):
    made = check_parameters({"model": model})
    assert (made.name, made.prefix) == (
        name,
        "models/localization" if "localization" in name else f"models/{name}",
    )
    assert check_parameters({"model": model, "name": "mine"}).name == "mine"


def test_every_problem_is_named_at_once_with_the_nearest_names():
    with pytest.raises(ParameterError) as caught:
        check_parameters({"tolerence": 1, "batch_size": "many", "profile": "quik", "zzz": 1})
    message = str(caught.value)
    assert "tolerence is not a parameter; did you mean tolerance" in message
    assert "batch_size = 'many'" in message
    assert "profile = 'quik'" in message
    assert "zzz is not a parameter; known are" in message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("checkpiont", "checkpoint"),
        ("evaldata", "eval_data"),
        ("batchsize", "batch_size or latency_batch_size"),
        ("fold_constants", "do_constant_folding"),
        ("tolerances", "tolerance"),
    ],
)
def test_unknown_name_suggests_the_nearest(name, nearest):
    with pytest.raises(ParameterError, match=f"{name} is not a parameter; did you mean {nearest}"):
        check_parameters({name: 1})


def passed_on_the_command_line(text):
    """What papermill makes of ``-p NAME text``."""
    return _resolve_type(text)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("tolerance", "1e-4", 1e-4),
        ("tolerance", "1", 1.0),
        ("batch_size", "4", 4),
        ("publish", "True", True),
        ("publish", "false", False),
        ("measure_latency", "false", False),
        ("exclusive_cores", "true", True),
        ("do_constant_folding", "False", False),
        ("profile", "audit", "audit"),
        ("model_kwargs", '{"backbone_size": "tiny"}', {"backbone_size": "tiny"}),
        ("model_kwargs", "", {}),
        ("threads", "2", 2),
        ("run_id", "0123abc_-", "0123abc_-"),
    ],
)
def test_text_is_coerced_as_papermill_passes_it(name, text, value):
    for given in (text, passed_on_the_command_line(text)):
        found = getattr(check_parameters({name: given}), name)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["2024", "1e5", "True", "None"])
def test_name_that_papermill_took_for_something_else_is_refused_not_rewritten(text):
    given = passed_on_the_command_line(text)
    assert not isinstance(given, str)
    with pytest.raises(ParameterError, match=r"name = .*valid string"):
        check_parameters({"name": given})


def test_each_profile_measures_more_than_the_one_before():
    smoke, quick, audit = (vars(PROFILES[name]) for name in ("smoke", "quick", "audit"))
    unlimited = {"max_samples": None}
    assert all(smoke[name] < quick[name] for name in quick.keys() - {"max_samples", "min_seconds"})
    assert all(quick[name] < audit[name] for name in quick.keys() - {"max_samples"})
    assert quick.items() >= unlimited.items() <= audit.items()
    # As many calls as the 99th percentile needs, whoever is timed.
    assert audit["calls"] == audit["variant_calls"] == 1024


@pytest.mark.parametrize(
    "values",
    [
        {"model_kwargs": "{"},
        {"model_kwargs": "[1]"},
        {"model_kwargs": "3"},
        {"model_kwargs": "[" * 100_000},
        {"tolerance": 0},
        {"tolerance": -1e-5},
        {"tolerance": float("nan")},
        {"tolerance": "inf"},
        {"tolerance": True},
        {"seed": True},
        {"seed": -1},
        {"threads": -1},
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"latency_batch_size": 5000},
        {"publish": "perhaps"},
        {"checkpoint": None},
        {"profile": "Quick"},
        {"name": " "},
        {"name": "<script>"},
        {"name": "a/b"},
        {"name": ".."},
        {"name": "a\nb"},
        {"name": "a\n"},
        {"name": "a b"},
        {"name": "a" * 201},
        {"prefix": "../other"},
        {"prefix": "a/../b"},
        {"prefix": "/a"},
        {"prefix": "a/"},
        {"prefix": "a//b"},
        {"prefix": "a\n"},
        {"bucket": "Upper"},
        {"bucket": "ab"},
        {"bucket": "a/b"},
        {"bucket": "abc\n"},
        {"bucket": "-abc"},
        {"run_id": "a b"},
        {"run_id": "../a"},
        {"run_id": "-a"},
        {"run_id": "a\n"},
        {"alias": "latest"},
        {"alias": "Latest"},
        {"alias": "v3"},
        {"alias": "V12"},
        {"alias": "a.b"},
        {"alias": "a\n"},
        {"alias": "<b>"},
        {"variants": "int8"},
        {"variants": "int8-minmax,all"},
        {"variants": ""},
        {"max_loss": -0.01},
        {"max_loss": float("inf")},
        {"confidence": 1.0},
        {"min_coverage": False},
        {"max_displacement_sigma": 0},
        {"max_output_noise": True},
        {"measure_latency": "sometimes"},
        {"exclusive_cores": 2},
    ],
    ids=lambda v: json.dumps(v)[:40],
)
def test_unusable_values_are_refused(values):
    with pytest.raises(ParameterError, match=next(iter(values))):
        check_parameters(values)


@pytest.mark.parametrize("variants", ["none", "all", "fp32", "int8-minmax, int4-weights"])
def test_variants_are_taken_by_name(variants):
    assert check_parameters({"variants": variants}).variants == variants


@pytest.mark.parametrize("variants", ["all", "fp32", "int8-minmax"])
def test_variants_need_latency(variants):
    with pytest.raises(ParameterError, match=r"variants = .*need measure_latency = True; found"):
        check_parameters({"measure_latency": False, "variants": variants})
    assert check_parameters({"variants": variants}).measure_latency
    assert not check_parameters({"measure_latency": "False", "variants": "none"}).measure_latency


@pytest.mark.parametrize("alias", ["staging", "v1a", "version1", "vnext", "latest2", "A_b-c"])
def test_alias_that_only_looks_like_a_reserved_one_is_taken_by_mlflow_too(alias):
    assert check_parameters({"alias": alias}).alias == alias
    _validate_model_alias_name(alias)
    # Not every MLflow of the range looks for what is reserved in a function of its own.
    getattr(validation, "_validate_model_alias_name_reserved", str)(alias)


def test_every_opset_that_can_be_exported_can_be_asked_for_and_no_other():
    for opset in range(40):
        if opset in OPSETS:
            assert check_parameters({"opset": opset}).opset == opset
        else:
            with pytest.raises(ParameterError, match="opset"):
                check_parameters({"opset": opset})


def test_unset_text_and_zero_threads_mean_no_choice():
    made = ReleaseParameters()
    assert (made.eval_data_path, made.thread_count) == (None, None)
    made = check_parameters({"eval_data": "e.npz", "threads": 3, "output_dir": "out"})
    assert (made.eval_data_path, made.thread_count) == (Path("e.npz"), 3)
    assert made.onnx_path == Path("out/model.onnx")


def test_profiles_measure_at_least_what_is_documented():
    limits = {name: check_parameters({"profile": name}).limits for name in PROFILES}
    assert (limits["smoke"].calls, limits["smoke"].max_samples) == (30, 8)
    assert limits["quick"].calls >= 200
    assert (limits["audit"].calls, limits["audit"].min_seconds) == (1024, 60)
    assert limits["quick"].max_samples is limits["audit"].max_samples is None


def test_parameters_can_not_be_changed_afterwards():
    with pytest.raises(ValidationError):
        ReleaseParameters().tolerance = 1.0


AWKWARD = {
    "tolerence": 1.0,
    "text": "# Parameters\nfake = 1",
    "nested": {"a": [1, {"b = 2": "c = 3"}]},
    "quotes": "'''\"\"\"\n# Parameters\nalso_fake = 1",
    "nothing": None,
    "not_a_number": float("nan"),
    "checkpoint": "/a/b.pt",
}


@pytest.mark.parametrize("comment", ["Parameters", "Parameters of the nightly run"])
def test_names_that_papermill_injects_are_found_in_the_cell_it_writes(comment):
    notebook = parameterize_notebook(
        load_notebook_node(str(notebook_path())), AWKWARD, comment=comment
    )
    sources = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert injected_values(sources).keys() == set(AWKWARD)


def test_injected_cell_as_a_kernel_sees_it_is_checked(tmp_path):
    """Through the history that IPython keeps, as the notebook's own cell reads it."""
    notebook = parameterize_notebook(
        load_notebook_node(str(notebook_path())), {"tolerence": 1.0, "seed": 7}
    )
    (injected,) = [
        c.source for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])
    ]
    on_no_disk = Config({"HistoryManager": {"enabled": False}})
    shell = InteractiveShell(config=on_no_disk, ipython_dir=str(tmp_path))
    for source in ("import math\n%pwd", "scratch = 1\n# Parameters", injected):
        assert shell.run_cell(source, store_history=True).success
    with pytest.raises(ParameterError, match=r"tolerence .*did you mean tolerance") as caught:
        parameters_of_notebook(shell.user_ns)
    assert "scratch" not in str(caught.value)
    assert "seed" not in str(caught.value)
    del shell.user_ns["tolerence"]
    assert parameters_of_notebook(shell.user_ns).seed == 7


def test_what_was_injected_is_what_is_used(tmp_path):
    """An editor has dropped the tag, so papermill puts its cell before the one of parameters."""
    notebook = load_notebook_node(str(notebook_path()))
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.metadata["tags"] = []
            own = cell.source
    first = parameterize_notebook(notebook, {"checkpoint": "mine.pt"}).cells[0].source
    shell = InteractiveShell(
        config=Config({"HistoryManager": {"enabled": False}}), ipython_dir=str(tmp_path)
    )
    for source in (first, own):
        assert shell.run_cell(source, store_history=True).success
    with pytest.raises(ParameterError, match=r"checkpoint = '' is used.* given 'mine.pt'.* tag"):
        parameters_of_notebook(shell.user_ns)
    shell.run_cell(first, store_history=True)
    assert parameters_of_notebook(shell.user_ns).checkpoint == "mine.pt"


def test_unknown_injected_name_is_refused_and_a_variable_of_the_user_is_not():
    namespace = {"In": ["", "# Parameters\ntolerence = 1"], "tolerence": 1, "scratch": 2}
    with pytest.raises(ParameterError, match="did you mean tolerance"):
        parameters_of_notebook(namespace)
    assert parameters_of_notebook({"In": ["scratch = 2"], "scratch": 2}) == ReleaseParameters()
    assert parameters_of_notebook({"seed": 3}).seed == 3


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_batch_sizes_are_powers_of_two_up_to_the_largest(largest, sizes):
    assert ReleaseParameters(batch_size=largest).batch_sizes == sizes


def test_quick_takes_few_samples_for_the_dear_reference():
    assert PROFILES["quick"].reference_samples <= 32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"opset": 16**5000}, "opset = <int"),
        ({"model_kwargs": [16**5000]}, r"model_kwargs = \[?<"),
        ({"profile": "\x1b[2J"}, r"profile = '\\x1b\[2J': "),
        ({"bucket": "\ud800"}, r"bucket = '\\ud800': "),
        ({"name": "x" * 10**6}, "name = 'x{100,200}…: "),
        ({"\x1b[2J": 1}, r"\\x1b\[2J is not a parameter"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_value_that_can_not_be_shown_is_abbreviated(values, message):
    with pytest.raises(ParameterError, match=message) as caught:
        check_parameters(values)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("code", ["seed = (", "seed = \0", "seed = " + "-" * 100_000 + "1"])
def test_injected_cell_that_is_no_python_is_a_parameter_error(code):
    with pytest.raises(ParameterError, match="cell of parameters can't be read: "):
        injected_values(["# Parameters\n" + code])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint", os.fsdecode(b"\xff.ckpt")),
        ("model_kwargs", {"a": ["\ud800"]}),
        ("model_kwargs", {"a": b"bytes"}),
        ("model_kwargs", '{"a": NaN}'),
    ],
)
def test_value_that_no_notebook_can_hold_is_a_parameter_error(name, value):
    with pytest.raises(ParameterError, match=f"{name} = .*can't be written as JSON in UTF-8"):
        check_parameters({name: value})
