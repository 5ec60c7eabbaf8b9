"""The commands about datasets pass values through and turn results into output and exit codes."""

import json
import os
from pathlib import Path

import pytest
from captures import simulate_events, write_recordings
from click.testing import CliRunner

from heimdall_onnx.cli.main import main
from heimdall_onnx.data.dataset.dataset import open_dataset


def call(*arguments):
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-data")
    done = call(
        *("simulate", "-o", folder / "data", "--events", 4, "--windows", 2, "--seed", 5),
    )
    assert done.exit_code == 0, done.output
    write_recordings(simulate_events(4, windows=2, seed=5), folder / "wav")
    return folder, done


def test_simulate_says_what_it_has_written(simulated):
    folder, done = simulated
    dataset = open_dataset(folder / "data")
    assert (dataset.count, dataset.meta["seed"]) == (8, 5)
    assert done.stdout.strip() == (
        f"{folder / 'data'}: 8 samples of 4 events, digest {dataset.digest}"
    )


def test_features_takes_recordings_with_their_positions(simulated, tmp_path):
    folder, _ = simulated
    files, table = sorted((folder / "wav").glob("*.wav")), tmp_path / "positions.csv"
    places = "".join(f"{path.name},50,9\n" for path in files)
    table.write_text("recording,latitude,longitude\n" + places)
    done = call(
        *("features", *files, "-o", tmp_path / "d", "--positions", table),
        *("--receiver", "HB9ODP", 46.499351, 8.798828, "--json"),
    )
    assert done.exit_code == 0, done.output
    described = json.loads(done.stdout.splitlines()[-1])
    made, direct = open_dataset(tmp_path / "d"), open_dataset(folder / "data")
    assert made.positions.tolist() == [[50.0, 9.0]] * 8
    assert described["digest"] == made.digest
    assert described["receivers"] == {"HB9ODP": [46.499351, 8.798828]}
    inputs = "inputs/mel_spectrogram"
    assert made.arrays[inputs] == direct.arrays[inputs]


def test_features_takes_one_position_for_all(simulated, tmp_path):
    files = sorted((simulated[0] / "wav").glob("*.wav"))[:3]
    done = call(
        "features", *files, "-o", tmp_path / "d", "--position", 50.0152, 9.0112, "--mixed-receivers"
    )
    assert done.exit_code == 0, done.output
    assert open_dataset(tmp_path / "d").positions.tolist() == [[50.0152, 9.0112]] * 2


def test_features_takes_real_recordings(tmp_path):
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    paths = sorted(Path(folder).rglob("*_77500_*_iq.wav")) if folder else []
    if not paths:
        pytest.skip("HEIMDALL_RECORDINGS is not set or holds no *_77500_*_iq.wav")
    done = call(
        "features", *paths, "-o", tmp_path / "d", "--position", 50.0152, 9.0112, "--mixed-receivers"
    )
    assert done.exit_code == 0, done.output
    assert f"samples of {len(paths) // 3} events" in done.stdout


def test_info_says_what_is_in_it(simulated):
    done = call("info", simulated[0] / "data", "--verify")
    assert done.exit_code == 0, done.output
    for said in (
        "samples: 8\nevents: 4\n",
        "inputs/mel_spectrogram:",
        "shape: [8, 3, 128, 32]",
        "shards: 4",
        "provenance: simulated",
        "JO51xl: [51.466044, 11.977189]",
        "verified: true",
    ):
        assert said in done.stdout


def test_info_as_json(simulated):
    found = json.loads(call("info", simulated[0] / "data", "--json").stdout)
    assert found["samples"] == 8
    assert found["arrays"]["event"] == {"dtype": "int64", "shape": [8]}


def test_info_leaves_a_damaged_dataset_with_an_exit_code(simulated, tmp_path):
    import shutil

    shutil.copytree(simulated[0] / "data", tmp_path / "d")
    shard = next((tmp_path / "d" / "inputs" / "mel_spectrogram" / "c").rglob("0"))
    shard = next(path for path in shard.rglob("*") if path.is_file())
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert call("info", tmp_path / "d").exit_code == 0
    done = call("info", tmp_path / "d", "--verify")
    assert done.exit_code == 2
    assert "error: dataset" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("simulate", "-o", "x", "--events", "0"), "--events"),
        (("simulate",), "--output"),
        (("features", "missing.wav", "-o", "x"), "missing.wav"),
        (("info", "missing"), "missing"),
    ],
)
def test_bad_usage_exits_with_2(tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr


def test_positions_given_twice_are_bad_usage(tmp_path):
    done = call(
        *("features", "a.wav", "-o", tmp_path / "d", "--position", 1, 2),
        *("--positions", tmp_path / "p.csv"),
    )
    assert done.exit_code == 2
    assert "not both" in done.stderr
