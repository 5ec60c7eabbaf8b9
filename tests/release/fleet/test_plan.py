"""Which items a fleet has, and how a plan that can't be used is refused."""

from __future__ import annotations

import json
import pickle
import time
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_onnx.common.errors import ParameterError, StoreError
from heimdall_onnx.common.parameters import ReleaseParameters
from heimdall_onnx.release.fleet import files as fleet_files
from heimdall_onnx.release.fleet.plan import plan_checkpoints, read_plan
from heimdall_onnx.services.store import Bucket


@pytest.fixture
def folder(tmp_path):
    """A folder of plans and checkpoints, whose names could be wildcards."""
    here = tmp_path / "plans [x]"
    for name in ("models/a.ckpt", "models/b.ckpt", "runs/1/best.ckpt", "runs/2/best.ckpt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).touch()
    (here / "eval.npz").touch()
    return here


@pytest.fixture
def plan(folder):
    """Writes a plan and reads it."""

    def read(content: str | bytes, name="july.yml"):
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_plan(path)

    return read


@pytest.fixture
def refused(plan):
    """What is said of a plan that can't be used."""

    def read(content: str | bytes, name="july.yml") -> str:
        with pytest.raises(ParameterError) as raised:
            plan(content, name)
        return str(raised.value)

    return read


@pytest.fixture
def objects(s3, bucket):
    """Puts objects into the bucket, and gives its name."""

    def put(*keys: str) -> str:
        for key in keys:
            bucket.upload_bytes(b"", key)
        return bucket.name

    return put


def files(plan, folder) -> list[str]:
    return [item.checkpoint.removeprefix(f"{folder}/") for item in plan.items]


def test_each_combination_with_each_checkpoint_but_for_what_is_left_out(plan, folder):
    found = plan(
        """\
name: fleet-1
parameters: {profile: smoke, bucket: some-bucket, eval_data: eval.npz}
checkpoints: [models/b.ckpt, "models/a.*", "runs/*/best.ckpt"]
matrix: {opset: [14, 20], model: ["pkg.mod:A", "pkg.mod:B"]}
exclude:
  - {checkpoint: models/*, opset: "14"}
  - {checkpoint: runs/1/best.ckpt, opset: 20, model: "pkg.mod:B"}
include: [{checkpoint: models/a.ckpt, opset: 9, model: "pkg.mod:C", memory: 8GiB}]
memory: 4 GiB
"""
    )
    assert found.name == "fleet-1"
    assert [item.number for item in found.items] == list(range(1, 13))
    assert [
        (file, item.parameters.opset, item.parameters.model[-1], item.memory_bytes >> 30)
        for file, item in zip(files(found, folder), found.items, strict=True)
    ] == [
        ("models/b.ckpt", 20, "A", 4),
        ("models/b.ckpt", 20, "B", 4),
        ("models/a.ckpt", 20, "A", 4),
        ("models/a.ckpt", 20, "B", 4),
        ("runs/1/best.ckpt", 14, "A", 4),
        ("runs/1/best.ckpt", 14, "B", 4),
        ("runs/1/best.ckpt", 20, "A", 4),
        ("runs/2/best.ckpt", 14, "A", 4),
        ("runs/2/best.ckpt", 14, "B", 4),
        ("runs/2/best.ckpt", 20, "A", 4),
        ("runs/2/best.ckpt", 20, "B", 4),
        ("models/a.ckpt", 9, "C", 8),
    ]
    for item in found.items:
        assert Path(item.checkpoint).is_absolute()
        assert item.parameters.eval_data == str(folder / "eval.npz")
        assert (item.parameters.profile, item.parameters.bucket) == ("smoke", "some-bucket")
        own = ReleaseParameters()
        assert item.parameters.checkpoint == own.checkpoint
        assert (item.parameters.publish, item.parameters.output_dir) == (False, "")
    assert found.items[4].label == "5: 1/best.ckpt, A, opset 14"
    assert len({id(item.parameters) for item in found.items}) == 5
    assert pickle.loads(pickle.dumps(found)) == found


def test_values_of_matrix_and_include_replace_those_of_all(plan):
    found = plan(
        """\
parameters: {opset: 9, threads: 1, model_kwargs: {a: 1}}
checkpoints: [models/a.ckpt]
matrix: {opset: [14]}
include: [{checkpoint: models/a.ckpt}, {checkpoint: models/b.ckpt, model_kwargs: '{"b": [2]}'}]
"""
    )
    assert found.name == "july"
    assert [(i.parameters.opset, i.parameters.model_kwargs) for i in found.items] == [
        (14, {"a": 1}),
        (9, {"a": 1}),
        (9, {"b": [2]}),
    ]
    assert {item.parameters.threads for item in found.items} == {1}
    assert {item.memory_bytes for item in found.items} == {None}


def test_names_are_filled_with_the_checkpoints_own(plan, folder):
    for name in ("runs/1/März 1.ckpt", "runs/1/x.y.pt"):
        (folder / name).touch()
    found = plan(
        """\
parameters: {name: "net-{stem}", prefix: "models/{parent}-{stem}/x"}
checkpoints: [runs/1/*]
exclude: [{name: "net-x.y"}]
include: [{checkpoint: runs/2/best.ckpt, name: "{parent}"}]
"""
    )
    assert [(item.parameters.name, item.parameters.prefix) for item in found.items] == [
        ("net-M-rz-1", "models/1-M-rz-1/x"),
        ("net-best", "models/1-best/x"),
        ("2", "models/2-best/x"),
    ]


def test_what_is_left_out_may_be_told_by_the_checkpoints_own_name(plan, refused):
    text = "parameters: {name: 'net-{stem}'}\ncheckpoints: ['models/*']\n"
    found = plan(
        text + "matrix: {opset: [9, 14]}\nexclude: [{checkpoint: '**/b*', name: 'net-{stem}'}]"
    )
    assert [item.parameters.name for item in found.items] == ["net-a", "net-a"]
    assert "there is nothing to release" in refused(text + "exclude: [{name: 'net-{stem}'}]")


def test_values_that_do_not_fit_each_other_are_said_with_their_checkpoint(plan, refused, folder):
    text = "checkpoints: [models/a.ckpt]\nparameters: {variants: all}\n"
    text += "matrix: {measure_latency: [true, false]}\n"
    said = refused(text)
    assert f"line 3, matrix: {folder}/models/a.ckpt: variants = 'all': " in said
    assert said.count("\n") == 1
    left = plan(text.replace("variants: all", "variants: none"))
    assert [item.parameters.measure_latency for item in left.items] == [True, False]


def test_data_of_an_evaluation_may_be_a_folder_others_not(plan, refused, folder):
    found = plan("include: [{checkpoint: models/a.ckpt, eval_data: runs}]").items[0]
    assert found.parameters.eval_data == str(folder / "runs")
    said = refused("include: [{checkpoint: models/a.ckpt, calibration_data: runs}]")
    assert "expected a file, found a folder" in said


def test_a_name_that_can_not_be_made_is_said_with_its_checkpoint(refused, plan, folder):
    (folder / "models/_.ckpt").touch()
    text = 'parameters: {name: "{stem}"}\ncheckpoints: [models/*]\n'
    said = refused(text)
    assert f"line 2, checkpoints: {folder}/models/_.ckpt: name = '_': " in said
    assert said.count("\n") == 1
    assert len(plan(text + "exclude: [{checkpoint: models/_.ckpt}]").items) == 2
    assert "include[0]" in refused('include: [{checkpoint: models/_.ckpt, name: "{stem}"}]')


def test_the_pattern_that_finds_checkpoints_leaves_them_out(plan, refused, folder):
    # The folder's own name has a wildcard in it, which stands for itself.
    for pattern in ("**/best.ckpt", f"{folder}/runs/[12]/*", "runs/../runs/*/best.ckpt"):
        found = plan(f"checkpoints: ['{pattern}', models/a.ckpt]")
        assert files(found, folder) == ["runs/1/best.ckpt", "runs/2/best.ckpt", "models/a.ckpt"]
        singles = "".join(f"\n- {{checkpoint: '{item.checkpoint}'}}" for item in found.items)
        assert plan(f"include:{singles}\n").items == found.items
        text = f"checkpoints: ['{pattern}']\nexclude: [{{checkpoint: '{pattern}'}}]\n"
        assert "there is nothing to release" in refused(text)


def test_a_plan_may_be_read_from_anywhere_by_any_path(plan, folder, monkeypatch):
    expected = plan("checkpoints: [models/*]")
    monkeypatch.chdir(folder / "runs")
    assert read_plan("../july.yml") == expected
    assert files(read_plan("../july.yml"), folder) == ["models/a.ckpt", "models/b.ckpt"]


def test_the_text_is_the_same_plan_elsewhere_and_for_good(plan, folder, tmp_path, monkeypatch):
    found = plan(
        """\
parameters: {name: "{parent}-{stem}", eval_data: eval.npz, tolerance: 1e-4}
checkpoints: ["runs/*/best.ckpt"]
matrix: {model_kwargs: [{a: 1}, {a: true}], threads: [1, 2]}
include: [{checkpoint: models/a.ckpt, memory: 1GB}]
"""
    )
    (folder / "runs/3").mkdir()
    (folder / "runs/3/best.ckpt").touch()
    copy = tmp_path / "some where" / "plan of july.json"
    copy.parent.mkdir()
    copy.write_text(found.text)
    monkeypatch.chdir(copy.parent)
    again = read_plan(copy)
    assert again == found
    assert again.text == found.text
    # As YAML it is the same, so that anybody's tools read it.
    copy.write_text("# a comment\n" + found.text)
    assert read_plan(copy) == found
    given = json.loads(found.text)
    assert given["parameters"]["alias"] == ReleaseParameters().alias
    assert not {"checkpoint", "publish", "output_dir", "run_id"} & given["parameters"].keys()
    assert "memory" not in given
    assert json.loads(plan("checkpoints: [models/*]\nmemory: 1GB").text)["memory"] == 10**9


def test_every_problem_is_said_with_its_line_and_place(refused, folder):
    said = refused(
        """\
parameters:
  tolerence: 1
  publish: true
  eval_data: nothing.npz
  name: "{stem}-{epoch}"
  prefix: "{"
matrix:
  opset: [14, 99]
  run_id: [a]
  threads: 3
include:
  - {checkpoint: models/c.ckpt, memory: 4}
  - {opset: 14}
  - {checkpoint: models/a.ckpt, checkpont: x}
  - {checkpoint: models/c.ckpt}
exclude:
  - {}
  - {checkpoint: "models/**.ckpt"}
chekpoints: []
checkpoints: [models, "*.pt", models/a.ckpt, models/*]
memory: lots
"""
    )
    lines = said.splitlines()
    assert lines[0] == f"the plan {folder}/july.yml can't be used:"
    said = {line.removeprefix("  - ").partition(": ")[0]: line for line in lines[1:]}
    for place, words in {
        "line 2, parameters": "tolerence is not a parameter; did you mean tolerance",
        "line 3, parameters": "publish = True: can't be set here; the fleet sets it for each item",
        "line 4, parameters": f"eval_data = 'nothing.npz': expected a file, found none at {folder}",
        "line 5, parameters": "only {stem} and {parent} can be filled in",
        "line 6, parameters": "prefix = '{': only",
        "line 8, matrix.opset[1]": "opset = 99: Input should be less than or equal to 23",
        "line 9, matrix.run_id[0]": "run_id = 'a': can't be set here",
        "line 10, matrix.threads": "expected a list of values, found 3",
        "line 12, include[0].memory": "expected bytes, or a size as 4GiB, from 1MiB, found 4",
        "line 12, include[0].checkpoint": f"expected a file, found none at {folder}/models/c.ckpt",
        "line 13, include[1].checkpoint": "is missing",
        "line 14, include[2]": "checkpont is not a parameter; did you mean checkpoint?",
        "line 15, include[3].checkpoint": f"expected a file, found none at {folder}/models/c.ckpt",
        "line 17, exclude[0]": "expected a checkpoint or parameters, found neither",
        "line 18, exclude[1].checkpoint": "'models/**.ckpt' can't be a pattern",
        "line 19, chekpoints": "is not known here; did you mean checkpoints?",
        "line 20, checkpoints[0]": f"expected a file, found a folder at {folder}/models",
        "line 20, checkpoints[1]": "no file matches '*.pt'",
        "line 20, checkpoints[3]": "models/a.ckpt: there already, by 'models/a.ckpt'",
        "line 21, memory": "found lots",
    }.items():
        assert words in said.pop(place)
    assert said == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found nothing"),
        ("- a", "expected `checkpoints` or `include`"),
        ("3", "found 3"),
        ("{}", "there is nothing to release"),
        ("checkpoints: []", "there is nothing to release"),
        ("checkpoints:", "expected a list of paths"),
        ("checkpoints: [3]", "line 1, checkpoints[0]: expected a list of paths"),
        ("checkpoints: [null]", "found nothing"),
        ("checkpoints: ['']", "found"),
        (b"\xff\xfe\x00", "no YAML of a plan"),
        ("a: [", "line 1, column 5"),
        ("a: &a [x]\nb: *a", "line 2, column 4: found an alias"),
        ("name: a\nname: b", "line 2, column 1: the key 'name' is there twice"),
        ('{"name": "a",\n "name": "b"}', "line 2, column 2: the key 'name' is there twice"),
        ("{" + "9" * 5000, "no YAML"),
        ("[" * 3_000, "nested too deeply"),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ("x" * (1 << 20) + "x", "or at most 1,048,576 bytes of YAML, found 1,048,577"),
        ("x" * ((64 << 20) + 1), "at most 67,108,864 bytes, found more"),
        ("checkpoints: ['a\\0.ckpt', \"b\\0*\", models/b.ckpt]", "checkpoints[1]: expected"),
        (f"checkpoints: [{'a' * 300}]", "found none that can be looked at (File name too long)"),
        ('include: [{checkpoint: models/a.ckpt, eval_data: "a\\0/../b"}]', "found none at"),
        ('{"\\ud800": 1}', "one of its keys is no text"),
        ('{"parameters": {"\\ud800": 1}}', "parameters"),
        ('{"include": [{"checkpoint": "models/a.ckpt", "\\ud800": 1}]}', "include"),
        ('{"include": [{"checkpoint": "\\ud800"}]}', "include[0].checkpoint: expected a path"),
        ("checkpoints: [models/c.ckpt]", "checkpoints[0]: expected a file, found none at"),
        ("checkpoints: [nowhere/*.ckpt]", "no file matches 'nowhere/*.ckpt'"),
        ("checkpoints: ['models/a.ckpt/*']", "no file matches"),
        ("checkpoints: ['*/../a.ckpt']", "no .. behind a wildcard"),
        ("checkpoints: [models/a.ckpt, ./models/a.ckpt]", "there already, by 'models/a.ckpt'"),
        ("checkpoints: ['models/*', '*/?.ckpt']", "a.ckpt and 1 more: there already"),
        ("include: [{checkpoint: 'models/*'}]", "expected a file, found none"),
        (
            "include: [{checkpoint: models/a.ckpt, eval_data: x}]",
            "eval_data = 'x': expected a file",
        ),
        (
            "include: [{checkpoint: models/a.ckpt, calibration_data: x}]",
            "calibration_data = 'x': exp",
        ),
        ("include: [{checkpoint: models/a.ckpt, eval_data: 's3://b'}]", "expected s3://bucket/key"),
        ("include: [{checkpoint: models/a.ckpt, output_dir: x}]", "output_dir = 'x': can't be set"),
        ("include: [{checkpoint: models/a.ckpt, memory: true}]", "include[0].memory: expected"),
        ("include: [{checkpoint: models/a.ckpt, memory: 4 GiB!}]", "include[0].memory: expected"),
        ("include: [{checkpoint: models/a.ckpt, memory: 4 Gbit}]", "include[0].memory: expected"),
        ("include: [{checkpoint: models/a.ckpt, name: 2024-01-01}]", "valid string"),
        ("checkpoints: [models/a.ckpt]\nmatrix: {opset: []}", "matrix.opset: expected a list"),
        ("checkpoints: [models/a.ckpt]\nmatrix: {opset: [14, '14']}", "is there twice as in 1:"),
        ("checkpoints: [models/a.ckpt]\nname: a b", "name: name = 'a b'"),
        ("checkpoints: [models/a.ckpt]\nname: 7", "a name, in quotes"),
        ("include: [{checkpoint: models/a.ckpt}]\nmatrix: {opset: [9]}", "no `checkpoints` to"),
        ("checkpoints: [models/a.ckpt]\nexclude: [{checkpoint: models/a}]", "nothing like this"),
        ("checkpoints: [models/a.ckpt]\nexclude: [{opset: 14}]", "nothing like this"),
        ("checkpoints: ['models/*']\nexclude: [{checkpoint: '**/a*'}, {opset: 9}]", "exclude[1]:"),
        ("include: [{checkpoint: models/a.ckpt}]\nexclude: [{opset: 20}]", "nothing like this"),
        (
            "checkpoints: [models/a.ckpt]\n"
            "include: [{checkpoint: models/a.ckpt, alias: staging, memory: 1GB}]",
            "include[0]: ",
        ),
        (
            "checkpoints: [models/a.ckpt]\n"
            f"matrix: {{seed: {list(range(400))}, threads: {list(range(400))}}}",
            "expected at most 100,000 items, found 160,000",
        ),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_what_can_not_be_used_is_refused_in_words_and_soon(content, words, refused):
    started = time.perf_counter()
    said = refused(content)
    assert words in said
    assert len(said) < 1000
    assert time.perf_counter() - started < 10


def test_a_deep_value_is_kept_as_it_is_or_refused(plan):
    said = []
    for depth in range(600, 1000, 50):
        deep = "[" * depth + "]" * depth
        item = f'{{"checkpoint": "models/a.ckpt", "model_kwargs": {{"a": {deep}}}}}'
        try:
            found = plan(f'{{"include": [{item}]}}')
        except ParameterError as error:
            said.append(str(error))
        else:
            assert json.dumps(found.items[0].parameters.model_kwargs["a"]) == deep
    assert 0 < len(said) < 8
    for text in said:
        assert "nested too deeply" in text or "can't be written as JSON" in text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_brings_anything_but_a_plan_or_a_parameter_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "damaged plans"
    folder.mkdir(exist_ok=True)
    (folder / "a.ckpt").touch()
    content = bytearray(
        b'name: x\nparameters: {name: "n-{stem}", eval_data: ""}\ncheckpoints: ["*.ckpt"]\n'
        b"matrix: {opset: [14, 20]}\nexclude: [{checkpoint: a*, opset: 14}]\n"
        b"include: [{checkpoint: a.ckpt, opset: 9, memory: 8GiB}]\n"
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    (folder / "plan.yml").write_bytes(bytes(content))
    try:
        found = read_plan(folder / "plan.yml")
    except ParameterError:
        return
    (folder / "again.json").write_text(found.text)
    assert read_plan(folder / "again.json") == found


def test_a_file_that_can_not_be_read_is_said(refused, folder, tmp_path):
    with pytest.raises(ParameterError, match="No such file"):
        read_plan(tmp_path / "nothing.yml")
    with pytest.raises(ParameterError, match="directory"):
        read_plan(tmp_path)
    said = refused("checkpoints: [models/a.ckpt]", name="a b.yml")
    assert "name = 'a b'" in said
    assert "so give one" in said


@pytest.mark.parametrize(
    ("text", "size"),
    [("1MiB", 1 << 20), ("1.5 GB", 1_500_000_000), ("2048kib", 2 << 20), ("3000000", 3_000_000)],
)
def test_sizes(text, size, plan):
    found = plan(f"checkpoints: [models/a.ckpt]\nmemory: {text}").items[0].memory_bytes
    assert (found, type(found)) == (size, int)


# In a bucket


@pytest.mark.services
def test_checkpoints_in_a_bucket(plan, s3, objects, folder, monkeypatch):
    bucket = objects("07/a.ckpt", "07/b.ckpt", "07/b.txt", "07/deep/c.ckpt", "08/d[1].ckpt", "e.pt")
    asked = []

    def list_stored(bucket: str, prefix: str) -> tuple[str, ...]:
        asked.append(prefix)
        return Bucket(s3, bucket).list_keys(prefix)

    monkeypatch.setattr(fleet_files, "list_stored", list_stored)
    found = plan(
        f"""\
parameters: {{name: "{{parent}}-{{stem}}", eval_data: "s3://elsewhere/some data.npz"}}
checkpoints:
  - s3://{bucket}/07/*.ckpt
  - s3://{bucket}/**/deep/*
  - models/a.ckpt
  - s3://{bucket}/e.pt
exclude: [{{checkpoint: "s3://*/07/a.ckpt"}}]
include:
  - {{checkpoint: "s3://{bucket}/08/d[1].ckpt"}}
""".replace("s3://*/07/a.ckpt", f"s3://{bucket}/07/a*")
    )
    assert [(item.checkpoint, item.parameters.name) for item in found.items] == [
        (f"s3://{bucket}/07/b.ckpt", "07-b"),
        (f"s3://{bucket}/07/deep/c.ckpt", "deep-c"),
        (f"{folder}/models/a.ckpt", "models-a"),
        (f"s3://{bucket}/e.pt", f"{bucket}-e"),
        (f"s3://{bucket}/08/d[1].ckpt", "08-d-1-"),
    ]
    assert {item.parameters.eval_data for item in found.items} == {"s3://elsewhere/some data.npz"}
    # No more is listed than is asked for.
    assert asked == ["07/", "", "e.pt", "08/d[1].ckpt"]
    asked.clear()
    again = plan(found.text, name="again.json")
    assert again == found
    assert asked == ["07/b.ckpt", "07/deep/c.ckpt", "e.pt", "08/d[1].ckpt"]


@pytest.mark.services
def test_what_is_not_in_the_bucket_is_refused(refused, plan, s3, objects, monkeypatch):
    monkeypatch.setattr(
        fleet_files, "list_stored", lambda bucket, prefix: Bucket(s3, bucket).list_keys(prefix)
    )
    bucket = objects("07/a.ckpt", "07/a.ckpt2")
    said = refused(
        f"""\
checkpoints:
  - s3://{bucket}/07/a.ckp
  - s3://{bucket}/07/b*.ckpt
  - s3://{bucket}/07/
  - s3://{bucket}
  - s3://*/07/a.ckpt
  - s3://{bucket}/07/a.ckpt
include:
  - {{checkpoint: s3://{bucket}/07/*.ckpt}}
"""
    ).splitlines()[1:]
    assert [line.partition(": ")[0].split(", ")[1] for line in said] == [
        *(f"checkpoints[{at}]" for at in (1, 2, 3, 4)),
        *("checkpoints[0]", "include[0].checkpoint"),
    ]
    with pytest.raises(StoreError, match="no-such-bucket"):
        plan("checkpoints: [s3://no-such-bucket/a*]")


def test_no_bucket_is_listed_that_no_checkpoint_is_in(plan, monkeypatch):
    monkeypatch.setattr(fleet_files, "list_stored", None)
    text = 'checkpoints: ["models/*"]\nparameters: {eval_data: "s3://data/eval.npz"}'
    assert len(plan(text).items) == 2


# As the command line has it


def test_checkpoints_with_the_options_of_a_release(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = plan_checkpoints(
        ["runs/*/best.ckpt", str(folder / "models/a.ckpt")],
        {"opset": "14", "model_kwargs": '{"a": 1}', "eval_data": "eval.npz", "name": "n-{parent}"},
        name="quick",
        memory="2GiB",
    )
    assert found.name == "quick"
    assert files(found, folder) == ["runs/1/best.ckpt", "runs/2/best.ckpt", "models/a.ckpt"]
    assert [item.parameters.name for item in found.items] == ["n-1", "n-2", "n-models"]
    assert {item.parameters.eval_data for item in found.items} == {str(folder / "eval.npz")}
    assert {item.parameters.opset for item in found.items} == {14}
    assert {item.memory_bytes for item in found.items} == {2 << 30}
    (folder / "again.json").write_text(found.text)
    assert read_plan("again.json") == found


def test_options_that_can_not_be_used_are_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    plan = partial(plan_checkpoints, name="quick")
    with pytest.raises(ParameterError, match="this fleet can't be used") as raised:
        plan(["*.pt"], {"publish": True, "opset": 99}, memory="4")
    said = str(raised.value)
    for words in ("checkpoints[0]: no", "parameters: publish", "parameters: opset", "memory: exp"):
        assert f"\n  - {words}" in said
    with pytest.raises(ParameterError, match="nothing to release"):
        plan([], {})
    with pytest.raises(ParameterError, match="name = 'a b'"):
        plan(["models/*"], {}, name="a b")


# Large ones


@pytest.mark.parametrize("name", ["net", "{parent}-{stem}"])
def test_a_large_fleet_is_small_and_planned_soon(name, tmp_path):
    for region in range(20):
        (tmp_path / f"{region}").mkdir()
        for net in range(50):
            (tmp_path / f"{region}/net-{net}.ckpt").touch()
    path = tmp_path / "large.yml"
    path.write_text(
        f"checkpoints: ['*/*.ckpt']\nmatrix: {{opset: [14, 20]}}\nparameters: {{name: '{name}'}}"
    )
    started = time.process_time()
    plan = read_plan(path)
    seconds = time.process_time() - started
    assert len(plan.items) == 2000
    objects = {id(item.parameters) for item in plan.items}
    assert len(objects) == (2 if name == "net" else 2000)
    path.write_text(plan.text)
    tracemalloc.start()
    again = read_plan(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert again == plan
    # Many times what it takes where nothing else runs; memory does not depend on that.
    assert seconds < 3
    assert kept < 10e6
    assert peak < 20e6
