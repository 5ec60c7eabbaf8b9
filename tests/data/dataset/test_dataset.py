"""Datasets: what is written is read, in any order, by any process; what is damaged is refused."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from datasets import COUNT, META, RECEIVERS, samples, write, write_in_small_shards

from heimdall_onnx.common.errors import DataError, ParameterError, UnavailableError
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.model.signature import Signature, TensorSpec


@pytest.fixture(scope="module")
def data():
    return samples()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, data):
    return write_in_small_shards(tmp_path_factory.mktemp("dataset") / "data", data)


@pytest.fixture
def own(dataset, tmp_path):
    """A copy to damage."""
    shutil.copytree(dataset.path, tmp_path / "own")
    return open_dataset(tmp_path / "own")


def append_all(path, parts):
    with create_dataset(path, meta={}) as writer:
        for part in parts:
            writer.append(*part)


def same(found, inputs, rows):
    assert found.keys() == inputs.keys()
    for name, array in inputs.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array[rows], err_msg=name)


def events_of(dataset):
    return np.array(dataset.event_names)[dataset.event]


class TestRows:
    @pytest.mark.parametrize(
        "rows", [[5], [89, 0, 44, 45], [3, 3, 2, 3], range(COUNT), [], [0, 1, 2, 30, 31, 89]]
    )
    def test_they_come_as_written_in_the_order_asked_for(self, dataset, data, rows):
        same(dataset.rows(rows), data[0], np.array(rows, int))

    def test_a_batch_of_random_ones(self, dataset, data):
        rng = np.random.default_rng(1)
        for _ in range(20):
            rows = rng.integers(0, COUNT, 32)
            same(dataset.rows(rows), data[0], rows)

    def test_zarr_reads_the_same_values(self, dataset, data):
        for name, expected in data[0].items():
            array = zarr.open_array(dataset.path / "inputs" / name, mode="r")
            assert array.shards is not None
            np.testing.assert_array_equal(array[:], expected)

    def test_a_mask_that_hides_nothing_is_no_loss(self, tmp_path):
        inputs = {"mask": np.zeros((COUNT, 3), bool)}
        found = write(tmp_path / "d", (inputs, None, ["e"] * COUNT))
        same(found.rows([0, 80]), inputs, [0, 80])
        assert found.positions is None
        found.verify()

    def test_parts_of_it_are_all_rows_in_order(self, dataset, data):
        for start, stop in ((0, 40), (40, 80), (80, 90)):
            same(dataset.rows(range(start, stop)), data[0], slice(start, stop))

    @pytest.mark.parametrize("rows", [[-1], [COUNT], [0, 10**9]])
    def test_those_that_are_not_there_are_refused(self, dataset, rows):
        with pytest.raises(DataError, match="has the samples 0 to 89, asked for"):
            dataset.rows(rows)

    def test_labels_and_events_come_too(self, dataset, data):
        np.testing.assert_array_equal(dataset.positions, data[1])
        assert events_of(dataset).tolist() == data[2]
        assert dataset.count == COUNT
        assert (dataset.meta, dataset.receivers) == (META, RECEIVERS)


def read_in_another_process(dataset, rows):
    return dataset.rows(rows)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_another_process_reads_it_from_its_path(dataset, data, method):
    assert len(pickle.dumps(dataset)) < 2000  # no inputs
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        same(pool.submit(read_in_another_process, dataset, [7, 3]).result(), data[0], [7, 3])


def test_a_process_that_would_read_other_data_is_stopped(own):
    pickled = pickle.dumps(own)
    shutil.rmtree(own.path)
    write(own.path, samples(seed=1))
    with pytest.raises(DataError, match="was replaced while it was in use"):
        pickle.loads(pickled)


class TestDigest:
    def test_it_does_not_depend_on_portions_and_chunks(self, tmp_path, data, dataset):
        other = write(tmp_path / "other", data, step=50)
        assert other.shards < dataset.shards
        assert other.digest == dataset.digest

    @pytest.mark.parametrize("change", ["value", "position", "event", "order", "meta", "receiver"])
    def test_it_depends_on_everything_else(self, tmp_path, data, dataset, change):
        inputs, positions, events = data
        arguments = {}
        if change == "value":
            inputs = {**inputs, "mask": inputs["mask"] ^ (np.arange(COUNT) == 50)[:, None]}
        elif change == "position":
            positions = np.add(positions, [0, 1e-12])
        elif change == "event":
            events = ["other", *events[1:]]
        elif change == "order":
            inputs = {name: array[::-1] for name, array in inputs.items()}
        elif change == "meta":
            arguments["meta"] = {**META, "features": {"n_fft": 512}}
        else:
            arguments["receivers"] = {**RECEIVERS, "pa0rdt": (51.5, 3.6)}
        found = write(tmp_path / "other", (inputs, positions, events), **arguments)
        assert found.digest != dataset.digest

    def test_the_hash_of_an_array_is_that_of_its_values(self, dataset, data):
        features = data[0]["features"]
        expected = hashlib.sha256(features.tobytes()).hexdigest()
        assert dataset.arrays["inputs/features"].sha256 == expected
        dataset.verify()


class TestSplit:
    def test_it_divides_by_event(self, dataset):
        split = dataset.split(validation=0.3, test=0.2, seed=3)
        parts = (split.train, split.validation, split.test)
        assert sorted(np.concatenate(parts)) == list(range(COUNT))
        names = [set(events_of(dataset)[rows]) for rows in parts]
        assert all(names)
        assert not (names[0] & names[1] | names[0] & names[2] | names[1] & names[2])
        assert all((np.diff(rows) > 0).all() and rows.dtype == np.int64 for rows in parts)

    def test_later_data_move_no_event(self, tmp_path, dataset):
        inputs, positions, _ = samples(600, seed=5)
        events = [f"event {i}" for i in range(600)]
        longer = write(tmp_path / "longer", (inputs, positions, events))
        before, after = (d.split(validation=0.3, test=0.2, seed=3) for d in (dataset, longer))
        for name in ("train", "validation", "test"):
            had = set(events_of(dataset)[getattr(before, name)])
            assert had <= set(events_of(longer)[getattr(after, name)])
        assert len(after.validation) == pytest.approx(180, abs=35)
        assert len(after.test) == pytest.approx(120, abs=30)

    def test_seeds_differ(self, dataset):
        one, other, again = (dataset.split(validation=0.3, seed=s) for s in (3, 4, 3))
        assert one.validation.tolist() != other.validation.tolist()
        assert one.validation.tolist() == again.validation.tolist()

    def test_a_part_that_is_not_asked_for_is_empty(self, dataset):
        split = dataset.split(validation=0, test=0)
        assert (len(split.train), len(split.validation), len(split.test)) == (COUNT, 0, 0)

    def test_a_part_without_events_is_refused(self, tmp_path):
        inputs, positions, _ = samples(6)
        found = write(tmp_path / "d", (inputs, positions, list("aabbcc")))
        with pytest.raises(DataError, match=r"with seed 3 no event.*\(3 events.* another seed"):
            found.split(validation=0.2, test=0.1, seed=3)

    @pytest.mark.parametrize("shares", [(-0.1, 0.1), (0.5, 0.5), (1.0, 0.0), (float("nan"), 0)])
    def test_shares_out_of_range_are_refused(self, dataset, shares):
        with pytest.raises(ParameterError, match="shares of validation and test"):
            dataset.split(validation=shares[0], test=shares[1])


class TestWriting:
    def test_a_failure_leaves_nothing(self, tmp_path, data):
        def fail():
            with create_dataset(tmp_path / "d", meta={}) as writer:
                writer.append(*data)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert list(tmp_path.iterdir()) == []

    def test_what_exists_is_left_alone(self, own, data):
        with pytest.raises(DataError, match="exists already"):
            write(own.path, data)
        own.verify()

    def test_nothing_makes_no_dataset(self, tmp_path):
        with pytest.raises(DataError, match="at least one sample"):
            write(tmp_path / "d", ({}, None, []))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"a": float("nan")}])
    def test_meta_that_is_no_json_is_refused(self, tmp_path, data, meta):
        with pytest.raises(DataError, match="can't be written as JSON"):
            write(tmp_path / "d", data, meta=meta)

    def test_a_folder_that_can_t_be_made_is_an_input_error(self, tmp_path, data):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(DataError, match="can't be written"):
            write(tmp_path / "file" / "d", data)

    def test_meta_may_be_completed_at_the_end(self, tmp_path, data):
        with create_dataset(tmp_path / "d", meta={"a": 1}) as writer:
            writer.append(*data)
            writer.meta["windows"] = writer.count
        assert open_dataset(tmp_path / "d").meta == {"a": 1, "windows": COUNT}

    def test_other_users_may_read_it(self, dataset):
        assert dataset.path.stat().st_mode & 0o777 == 0o755

    def test_every_problem_of_the_samples_is_named_at_once(self, tmp_path):
        inputs = {
            "short": np.zeros((2, 3)),
            "text": np.array(["a", "b", "c"]),
            "bad": np.array([0, np.nan, 0]),
            "../up": np.zeros(3),
        }
        positions = np.array([[0, 0], [91, 0], [0, 0]])
        with pytest.raises(DataError) as error:
            write(tmp_path / "d", (inputs, positions, ["a", "b\n", "c"]))
        for said in (
            "short has shape (2, 3) beside 3 events",
            "text has dtype <U1",
            "bad has NaN or Inf",
            "can't be called '../up'",
            "not in 1 samples, first in sample 1",
            r"'b\n' can't name an event",
        ):
            assert said in str(error.value)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"features": np.zeros((3, 2, 4), np.float32)}, r"features was float32 \(2, 3\)"),
            ({"mask": np.zeros((3, 4))}, "mask was bool .*now it is float64"),
            ({"more": np.zeros(3)}, "more was absent"),
        ],
    )
    def test_samples_must_stay_alike(self, tmp_path, data, changes, says):
        inputs, positions, events = data
        later = {name: array[:3] for name, array in inputs.items()} | changes
        parts = [data, (later, positions[:3], events[:3])]
        with pytest.raises(DataError, match=f"(?s)number 90 on.*{says}"):
            append_all(tmp_path / "d", parts)

    def test_labels_are_for_all_or_for_none(self, tmp_path, data):
        with pytest.raises(DataError, match=r"positions was .* now it is absent"):
            append_all(tmp_path / "d", [data, (data[0], None, data[2])])


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def set_at(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


INNER = ("codecs", 0, "configuration")


class TestUntrusted:
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (set_at("attributes", "schema_version", value=2), "schema_version.*should be 1"),
            (set_at("attributes", "digest", value="0" * 64), "the header was changed"),
            (set_at("attributes", "meta", "provenance", value="x"), "the header was changed"),
            (set_at("attributes", "receivers", "pa0rdt", value=[91.0, 0.0]), "not on the globe"),
            (
                set_at("attributes", "arrays", "event", "dtype", value="object"),
                "arrays.event.dtype",
            ),
            (set_at("attributes", "arrays", "event", "shape", value=[91]), "equally many samples"),
            (
                set_at("attributes", "arrays", "event", "shape", value=[90, 2]),
                "event must be int64",
            ),
            (set_at("attributes", "arrays", "event", "shape", value=[-1]), "arrays.event.shape"),
            (set_at("attributes", "arrays", "inputs/scalar", "shape", value=[]), "no samples"),
            (lambda c: c["attributes"]["arrays"].pop("event"), "no array event"),
            (
                lambda c: c["attributes"]["arrays"].update(
                    {"../up": c["attributes"]["arrays"]["event"]}
                ),
                "'../up' is no name of an array",
            ),
            (set_at("zarr_format", value=2), "zarr_format"),
            (set_at("attributes", value={}), "(?s)attributes.schema_version.*attributes.arrays"),
        ],
    )
    def test_a_header_that_does_not_hold_together_is_refused(self, own, change, says):
        change_json(own.path / "zarr.json", change)
        with pytest.raises(DataError, match=says):
            open_dataset(own.path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (set_at("data_type", value="float64"), "its zarr.json says float64"),
            (set_at("shape", value=[90, 2, 4]), r"says float32 \[90, 2, 4\]"),
            (
                set_at(*INNER, "codecs", 1, "name", value="numcodecs.pickle"),
                "codecs.1.name should be 'zstd'",
            ),
            (set_at(*INNER, "codecs", 0, "name", value="vlen-bytes"), "should be 'bytes'"),
            (set_at(*INNER, "chunk_shape", value=[1, 1, 1]), "chunk_shape.1 should be 2"),
            (set_at(*INNER, "chunk_shape", value=[0, 2, 3]), "no layout of a dataset"),
            (set_at(*INNER, "chunk_shape", value=[1.5, 2, 3]), "no layout of a dataset"),
            (set_at("codecs", value=7), "no layout of a dataset"),
            (set_at("chunk_grid", "configuration", "chunk_shape", value=[5, 2, 3]), "no layout of"),
            (set_at("storage_transformers", value=[{"name": "x"}]), "storage_transformers"),
        ],
    )
    def test_an_array_of_another_layout_is_refused(self, own, change, says):
        change_json(own.path / "inputs" / "features" / "zarr.json", change)
        with pytest.raises(DataError, match=says):
            open_dataset(own.path)

    def test_what_zarr_need_not_say_may_be_left_out(self, own, data):
        def leave_out(content):
            del content["storage_transformers"]
            sharding = content["codecs"][0]["configuration"]
            del sharding["codecs"][0]["configuration"]
            sharding["index_codecs"][0]["configuration"] = {}

        change_json(own.path / "inputs" / "features" / "zarr.json", leave_out)
        same(open_dataset(own.path).rows([3, 80]), data[0], np.array([3, 80]))

    def test_a_folder_without_one_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="expected a folder that `heimdall-onnx data`"):
            open_dataset(tmp_path / "missing")
        (tmp_path / "zarr.json").write_bytes(b"{" * 5000)
        with pytest.raises(DataError, match="is not what is written for a dataset"):
            open_dataset(tmp_path)

    def test_a_missing_shard_is_named(self, own):
        shard = own.path / "inputs" / "iq" / "c" / "1" / "0"
        shard.unlink()
        with pytest.raises(DataError, match="inputs/iq/c/1/0 is missing"):
            open_dataset(own.path)

    def test_what_is_linked_there_is_read(self, own, data, tmp_path):
        # As onto another disk.
        shutil.move(own.path / "inputs" / "iq", tmp_path / "elsewhere")
        (own.path / "inputs" / "iq").symlink_to(tmp_path / "elsewhere")
        (own.path / "circle").symlink_to(own.path)
        found = open_dataset(own.path)
        same(found.rows(range(COUNT)), data[0], np.arange(COUNT))
        assert found.stored_bytes == own.stored_bytes

    def test_a_shard_that_is_out_of_reach_is_missing(self, own, monkeypatch):
        stat = Path.stat

        def refused(path, **options):
            if "c" in path.parts:
                raise PermissionError(13, "Permission denied", str(path))
            return stat(path, **options)

        monkeypatch.setattr(Path, "stat", refused)
        with pytest.raises(DataError, match="features/c/0/0/0 is missing"):
            open_dataset(own.path)

    def test_a_reader_goes_with_the_indices_that_it_keeps(self, own):
        reader = own.readers["inputs/iq"]
        reader[:1]
        gone, own.readers = weakref.ref(reader), {}
        del reader
        assert gone() is None

    @pytest.mark.parametrize("offset", [3, 200, -3, -30])
    def test_a_changed_byte_is_found(self, own, offset):
        shard = own.path / "inputs" / "features" / "c" / "1" / "0" / "0"
        content = bytearray(shard.read_bytes())
        content[offset] ^= 0x10
        shard.write_bytes(content)
        opened = open_dataset(own.path)
        with pytest.raises(DataError, match="inputs/features"):
            opened.verify()

    @pytest.mark.parametrize("keep", [0, 10, -1])
    def test_a_shard_cut_off_is_found(self, own, keep):
        shard = own.path / "inputs" / "features" / "c" / "0" / "0" / "0"
        shard.write_bytes(shard.read_bytes()[:keep])
        with pytest.raises(DataError, match=r"is damaged.*inputs/features/c/0/0/0"):
            open_dataset(own.path).rows([0])

    def test_a_shard_in_another_s_place_is_found(self, own):
        folder = own.path / "inputs" / "iq" / "c"
        (folder / "0" / "0").write_bytes((folder / "1" / "0").read_bytes())
        opened = open_dataset(own.path)
        with pytest.raises(DataError, match="inputs/iq: expected SHA-256"):
            opened.verify()

    def test_a_chunk_that_unpacks_to_more_than_it_may_is_refused(self, own):
        """Even with a right index: the decoder gets no more room than the chunk's size."""
        from numcodecs import zstd
        from numcodecs.checksum32 import CRC32C

        shard = own.path / "event" / "c" / "0"
        bomb = zstd.compress(bytes(1 << 24), 1)
        header = json.loads((own.path / "event" / "zarr.json").read_bytes())
        (shard_rows,) = header["chunk_grid"]["configuration"]["chunk_shape"]
        (chunk_rows,) = header["codecs"][0]["configuration"]["chunk_shape"]
        index = np.tile(np.array([[0, len(bomb)]], "<u8"), (shard_rows // chunk_rows, 1))
        shard.write_bytes(bomb + CRC32C(location="end").encode(index.tobytes()).tobytes())
        with pytest.raises(DataError, match="destination buffer too small"):
            open_dataset(own.path)


def test_reading_needs_no_zarr_and_writing_says_what_brings_it(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert open_dataset(dataset.path).rows([0])["mask"].shape == (1, 4)
    with pytest.raises(UnavailableError, match=r"heimdall-onnx\[train\]"):
        write(tmp_path / "d", samples(3))


class TestEvaluationData:
    def test_a_release_reads_it(self, dataset, data, tmp_path):
        rows = [4, 80, 7]
        made = dataset.write_evaluation_data(tmp_path / "e.npz", rows, centre=[1.0, 2.0])
        signature = Signature(
            tuple(
                TensorSpec(name, array.dtype.name, ("batch", *array.shape[1:]))
                for name, array in data[0].items()
            ),
            (),
        )
        found = load_evaluation_data(made.path, signature)
        same(dict(found.inputs), data[0], rows)
        np.testing.assert_array_equal(found.positions, data[1][rows])
        assert found.receivers == RECEIVERS
        assert found.meta["centre"] == [1.0, 2.0]
        assert found.meta["provenance"] == "drawn"
        assert found.meta["dataset"] == {"digest": dataset.digest, "samples": COUNT}

    def test_it_names_the_events_it_has_and_no_others(self, tmp_path, data):
        events = [{"event": f"event {i}", "windows": 3} for i in range(30)]
        found = write(tmp_path / "d", data, meta={**META, "events": events})
        made = found.write_evaluation_data(tmp_path / "e.npz", [0, 1, 88])
        assert [event["event"] for event in made.meta["events"]] == ["event 0", "event 29"]

    def test_no_rows_are_refused(self, dataset, tmp_path):
        with pytest.raises(DataError, match="no samples to write"):
            dataset.write_evaluation_data(tmp_path / "e.npz", [])
