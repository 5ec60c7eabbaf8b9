"""Recordings as a dataset: events, their names, their positions."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from captures import simulate_events, write_recording, write_recordings

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.localization.dataset import ingest_recordings, read_positions
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.simulate import RECEIVERS


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Three events of one window: the files of each."""
    folder = tmp_path_factory.mktemp("recordings")
    return write_recordings(simulate_events(3, windows=1, seed=0), folder)


@pytest.fixture
def files(recorded):
    return [path for event in recorded for path in event]


def unnamed(paths, folder):
    """Copies whose names tell nothing, so that the order given makes the events."""
    folder.mkdir(exist_ok=True)
    copies = [folder / f"{number}.wav" for number in range(len(paths))]
    for path, copy in zip(paths, copies, strict=True):
        shutil.copyfile(path, copy)
    return copies


class TestEvents:
    def test_windows_and_provenance_are_those_of_a_feature_file(self, files, tmp_path):
        made = ingest_recordings(files, tmp_path / "d", position=(50.0, 9.0), receivers=RECEIVERS)
        flat = write_features(files, tmp_path / "f.npz", position=(50.0, 9.0), receivers=RECEIVERS)
        with np.load(flat.path) as file:
            np.testing.assert_array_equal(
                made.rows(range(3))["mel_spectrogram"], file["mel_spectrogram"]
            )
        assert made.positions.tolist() == [[50.0, 9.0]] * 3
        assert made.receivers == RECEIVERS
        events = [{k: v for k, v in e.items() if k != "event"} for e in made.meta["events"]]
        assert events == flat.meta["events"]
        named = [made.event_names[number] for number in made.event]
        assert [e["event"] for e in made.meta["events"]] == named
        assert str(tmp_path) not in str(made.meta)

    def test_each_receiver_feeds_the_same_channel_in_every_event(self, recorded, tmp_path):
        # As where another receiver's name comes first, since it began a second earlier.
        swapped = [*recorded[0], *recorded[1][::-1]]
        made = ingest_recordings(swapped, tmp_path / "a")
        plain = ingest_recordings([*recorded[0], *recorded[1]], tmp_path / "b")
        assert made.digest == plain.digest
        assert [[r["receiver"] for r in e["recordings"]] for e in made.meta["events"]] == [
            list(RECEIVERS)
        ] * 2

    def test_events_of_other_receivers_are_taken_on_request_only(self, recorded, tmp_path):
        other = [tmp_path / path.name.replace("HB9ODP", "elsewhere") for path in recorded[1]]
        for path, copy in zip(recorded[1], other, strict=True):
            shutil.copyfile(path, copy)
        with pytest.raises(DataError, match=r"found 2 sets of them:[\s\S]*JO51xl, elsewhere"):
            ingest_recordings([*recorded[0], *other], tmp_path / "a")
        assert not (tmp_path / "a").exists()
        made = ingest_recordings([*recorded[0], *other], tmp_path / "b", mixed_receivers=True)
        assert made.count == 2

    def test_names_come_from_the_files_content_alone(self, recorded, tmp_path):
        one = ingest_recordings(recorded[0], tmp_path / "a")
        other = ingest_recordings(
            unnamed([*recorded[1], *recorded[0][::-1]], tmp_path / "copies"), tmp_path / "b"
        )
        assert other.event_names[1] == one.event_names[0]
        assert other.event_names[0] != one.event_names[0]

    def test_events_that_share_a_recording_are_one(self, recorded, tmp_path):
        first, other, _ = recorded
        same_time = simulate_events(1, windows=1, seed=1)
        (second,) = write_recordings(same_time, tmp_path / "second")
        shared = [*first, *other, first[0], *second[1:], *second]
        made = ingest_recordings(unnamed(shared, tmp_path / "copies"), tmp_path / "d")
        assert made.event.tolist() == [0, 1, 0, 0]  # first and second by way of the mixed one
        again = made.write_evaluation_data(tmp_path / "e.npz", [1])
        assert len(again.meta["events"]) == 1

    def test_the_same_recordings_twice_are_refused(self, recorded, tmp_path):
        twice = unnamed([*recorded[0], *recorded[1], *recorded[0]], tmp_path / "copies")
        with pytest.raises(DataError, match=r"(?s)more than once:.*0\.wav.*6\.wav"):
            ingest_recordings(twice, tmp_path / "d")
        with pytest.raises(DataError, match="the same recording twice"):
            ingest_recordings([*recorded[0], *recorded[0]], tmp_path / "d")
        assert not (tmp_path / "d").exists()

    def test_an_event_too_short_for_a_window_is_left_out(self, recorded, tmp_path):
        short = []
        for name in RECEIVERS:
            short.append(tmp_path / f"20250101T000000Z_1850000_{name}_iq.wav")
            noise = np.random.default_rng(len(short)).standard_normal((1024, 2)) * 0.1
            iq = (noise @ [1, 1j]).astype(np.complex64)
            write_recording(short[-1], iq, rate=12_000, gnss_start_s=1.0)
        made = ingest_recordings([*short, *recorded[0]], tmp_path / "d")
        assert [e["windows"] for e in made.meta["events"]] == [0, 1]
        assert made.count == 1
        with pytest.raises(DataError, match="no event is long enough"):
            ingest_recordings(short, tmp_path / "e")

    def test_all_unreadable_recordings_are_named(self, files, tmp_path):
        (tmp_path / "text.wav").write_text("no recording")
        with pytest.raises(DataError, match=r"(?s)missing\.wav.*text\.wav"):
            ingest_recordings(
                [*files, tmp_path / "missing.wav", tmp_path / "text.wav"], tmp_path / "d"
            )

    def test_a_receiver_that_recorded_nothing_is_refused(self, files, tmp_path):
        with pytest.raises(ParameterError, match="DF0KL"):
            ingest_recordings(files, tmp_path / "d", receivers={"DF0KL": (53.0, 9.0)})


class TestPositions:
    def write(self, path, recorded, positions):
        lines = ["recording,latitude,longitude"]
        for event, (lat, lon) in zip(recorded, positions, strict=True):
            lines += [f"{file.name},{lat},{lon}" for file in event]
        path.write_text("\n".join(lines))
        return path

    def test_a_table_gives_each_event_its_own(self, recorded, files, tmp_path):
        positions = [(50.0, 9.0), (51.0, 8.0), (49.0, 7.5)]
        table = self.write(tmp_path / "p.csv", recorded, positions)
        made = ingest_recordings(files, tmp_path / "d", positions=table)
        assert made.positions.tolist() == [list(pair) for pair in positions]

    def test_recordings_without_one_are_named(self, recorded, files, tmp_path):
        table = self.write(tmp_path / "p.csv", recorded[:2], [(50.0, 9.0)] * 2)
        with pytest.raises(DataError, match=f"{recorded[2][0].name} at None"):
            ingest_recordings(files, tmp_path / "d", positions=table)

    def test_recordings_of_an_event_at_different_places_are_refused(self, recorded, tmp_path):
        table = self.write(tmp_path / "p.csv", [recorded[0]], [(50.0, 9.0)])
        table.write_text(table.read_text().replace("HB9ODP_iq.wav,50.0", "HB9ODP_iq.wav,51.0"))
        with pytest.raises(DataError, match=r"(?s)one position each.*\(51.0, 9.0\)"):
            ingest_recordings(recorded[0], tmp_path / "d", positions=table)

    def test_one_for_all_beside_a_table_is_refused(self, recorded, files, tmp_path):
        table = self.write(tmp_path / "p.csv", recorded, [(50.0, 9.0)] * 3)
        with pytest.raises(DataError, match="given twice"):
            ingest_recordings(files, tmp_path / "d", positions=table, position=(1.0, 2.0))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "no line below the header"),
            ("file,lat,lon\na,1,2\n", "line 2"),
            ("recording,latitude,longitude\na,1\nb,x,2\nc,91,0\n", r"(?s)line 2.*line 3.*globe"),
            ("recording,latitude,longitude\na,1,2\na,1,3\n", "line 3: a has another position"),
            ("recording,latitude,longitude\na,nan,2\n", "not on the globe"),
        ],
    )
    def test_a_table_that_is_none_is_refused_line_by_line(self, tmp_path, text, says):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            read_positions(tmp_path / "p.csv")

    def test_a_table_that_can_t_be_read_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="can't be read"):
            read_positions(tmp_path / "missing.csv")
        (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match="can't be read"):
            read_positions(tmp_path / "p.csv")


def test_real_recordings_become_a_dataset(tmp_path):
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    paths = sorted(Path(folder).rglob("*_77500_*_iq.wav")) if folder else []
    if not paths:
        pytest.skip("HEIMDALL_RECORDINGS is not set or holds no *_77500_*_iq.wav")
    made = ingest_recordings(
        paths, tmp_path / "d", position=(50.0152, 9.0112), mixed_receivers=True
    )
    assert len(made.event_names) == len(paths) // 3
    assert made.count == sum(e["windows"] for e in made.meta["events"]) > 20
    brightest = made.rows(range(made.count))["mel_spectrogram"].mean(axis=3).argmax(axis=2)
    assert np.isin(brightest, (63, 64)).all()  # the receivers are tuned to DCF77
    made.verify()
