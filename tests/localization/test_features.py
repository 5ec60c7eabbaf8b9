"""Features: the file of model inputs that recordings become."""

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.data.evaluation_file import write_feature_file
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.mel import FeatureParameters, signed_mel_filters
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE

RATE = 12_000.0
PARAMETERS = FeatureParameters()
SITES = {"HB9ODP": (46.499351, 8.798828), "JO51xl": (51.466044, 11.977189)}


def tone(hertz, samples=PARAMETERS.window_samples, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((samples, 2)) * noise
    return np.exp(2j * np.pi * hertz * np.arange(samples) / RATE) + parts @ [1, 1j]


def save_iq(path, iq):
    wavfile.write(path, int(RATE), np.stack([iq.real, iq.imag], axis=1).astype(np.float32))
    return path


@pytest.fixture
def event(tmp_path):
    """Three recordings of 5 s, of a tone at another frequency each."""
    return [
        save_iq(tmp_path / f"20200813T065220Z_77500_R{i}_iq.wav", tone(f, 60_000, seed=i))
        for i, f in enumerate((-1000, 300, 1000))
    ]


class TestFile:
    def test_it_holds_features_and_provenance(self, event, tmp_path):
        made = write_features(event, tmp_path / "out" / "features.npz")
        with np.load(made.path, allow_pickle=False) as file:
            assert sorted(file.files) == ["mel_spectrogram", "meta"]
            features, meta = file["mel_spectrogram"], json.loads(str(file["meta"]))
        assert features.shape == (3, 3, 128, 32)
        assert features.dtype == np.float32
        assert made.count == 3
        assert meta == made.meta
        assert meta["schema"] == 1
        assert meta["features"] == asdict(PARAMETERS)
        (found,) = meta["events"]
        assert (found["windows"], found["alignment"]) == (3, "start")
        recording = found["recordings"][1]
        assert recording["file"] == event[1].name
        assert recording["start"] == "2020-08-13T06:52:20+00:00"
        assert recording["receiver"] == "R1"
        assert len(recording["sha256"]) == 64
        assert str(tmp_path) not in json.dumps(meta)

    def test_channels_follow_the_order_given(self, event, tmp_path):
        forward = write_features(event, tmp_path / "a.npz")
        backward = write_features(event[::-1], tmp_path / "b.npz")
        with np.load(forward.path) as a, np.load(backward.path) as b:
            one, other = a["mel_spectrogram"], b["mel_spectrogram"]
        np.testing.assert_array_equal(one, other[:, ::-1])

    def test_each_channel_of_the_file_shows_its_receiver_s_tone_and_its_side(self, event, tmp_path):
        made = write_features(event, tmp_path / "f.npz")
        with np.load(made.path) as file:
            brightest = file["mel_spectrogram"].mean(axis=3).argmax(axis=2)
        bank = signed_mel_filters(RATE, 1024, 128)
        axis = np.fft.fftshift(np.fft.fftfreq(1024, 1 / RATE))
        expected = [bank[:, np.abs(axis - f).argmin()].argmax() for f in (-1000, 300, 1000)]
        assert brightest.tolist() == [expected] * 3

    def test_it_can_be_evaluated_on(self, event, tmp_path):
        made = write_features(
            event, tmp_path / "f.npz", position=(50.0152, 9.0112), receivers={"R0": (46.5, 8.8)}
        )
        data = load_evaluation_data(made.path, LOCALIZATION_SIGNATURE)
        assert data.count == 3
        assert data.sha256 == made.sha256
        assert data.receivers == {"R0": (46.5, 8.8)}
        assert data.positions.tolist() == [[50.0152, 9.0112]] * 3
        positions = [r["position"] for r in made.meta["events"][0]["recordings"]]
        assert positions == [[46.5, 8.8], None, None]

    def test_equal_input_gives_equal_bytes_at_any_time(self, event, tmp_path):
        first = write_features(event, tmp_path / "a.npz")
        second = write_features(event, tmp_path / "b.npz")
        assert first.path.read_bytes() == second.path.read_bytes()
        with zipfile.ZipFile(first.path) as archive:
            assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}

    def test_events_come_one_after_another(self, event, tmp_path):
        later = [
            save_iq(
                tmp_path / f"20200813T075220Z_77500_R{i}_iq.wav", tone(2000, 20_000, seed=9 + i)
            )
            for i in range(3)
        ]
        made = write_features([*later, *event], tmp_path / "f.npz")
        assert [e["windows"] for e in made.meta["events"]] == [3, 1]
        assert made.count == 4

    def test_iqm_shows_the_distance_from_the_carrier_but_not_the_side(self, tmp_path):
        paths = [save_iq(tmp_path / f"{f}.wav", tone(f, 17_000)) for f in (1000, -1000, 2000)]
        parameters = FeatureParameters(channels="iqm")
        made = write_features(paths, tmp_path / "f.npz", parameters=parameters)
        with np.load(made.path) as file:
            up, down, far = file["mel_spectrogram"].mean(axis=3)
        assert made.meta["features"]["channels"] == "iqm"
        np.testing.assert_allclose(up[:2], up[:2, ::-1], atol=1e-4)  # mirrored, as I is real
        assert up[0].argmax() in (down[0].argmax(), 127 - down[0].argmax())
        assert up[0].argmax() not in (far[0].argmax(), 127 - far[0].argmax())
        assert {up[2].argmax(), far[2].argmax()} <= {63, 64}  # the magnitude of a tone is constant


class TestBadInput:
    def test_all_unreadable_recordings_are_named(self, event, tmp_path):
        bad = [tmp_path / "missing.wav", tmp_path / "text.wav"]
        bad[1].write_text("not a recording")
        with pytest.raises(DataError, match=r"(?s)missing\.wav.*text\.wav"):
            write_features([*event, *bad], tmp_path / "f.npz")
        assert not (tmp_path / "f.npz").exists()

    def test_recordings_that_make_no_event_are_refused(self, event, tmp_path):
        with pytest.raises(DataError, match="group 1: 2 recordings"):
            write_features(event[:2], tmp_path / "f.npz")

    @pytest.mark.parametrize("channels", ["iqm", "receivers"])
    def test_recordings_too_short_for_a_window_are_refused(self, tmp_path, channels):
        paths = [save_iq(tmp_path / f"{i}.wav", tone(i, 16_895)) for i in range(3)]
        parameters = FeatureParameters(channels=channels)
        with pytest.raises(DataError, match=r"window of 16896 .*0\.wav: 16895 samples"):
            write_features(paths, tmp_path / "f.npz", parameters=parameters)

    def test_no_recordings_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="no recordings"):
            write_features([], tmp_path / "f.npz", parameters=FeatureParameters(channels="iqm"))

    @pytest.mark.parametrize(
        "given",
        [
            {"position": (91.0, 0.0)},
            {"position": (0.0, float("nan"))},
            {"receivers": {"R0": (0.0, 181.0)}},
            {"position": (1.0, 2.0, 3.0)},
        ],
    )
    def test_positions_off_the_globe_are_refused(self, event, tmp_path, given):
        with pytest.raises(ParameterError, match="degrees latitude"):
            write_features(event, tmp_path / "f.npz", **given)

    def test_positions_of_unknown_receivers_are_refused(self, event, tmp_path):
        with pytest.raises(ParameterError, match=r"\['HB9ODP', 'JO51xl'\].*\['R0', 'R1', 'R2'\]"):
            write_features(event, tmp_path / "f.npz", receivers=SITES)


def test_a_file_may_hold_the_inputs_of_any_model(tmp_path):
    arrays = {"mask": np.ones((5, 2), bool), "ids": np.arange(10).reshape(5, 2)}
    made = write_feature_file(tmp_path / "f.npz", arrays, {"provenance": "drawn"})
    assert made.count == 5
    with np.load(made.path) as file:
        assert sorted(file.files) == ["ids", "mask", "meta"]
        np.testing.assert_array_equal(file["ids"], arrays["ids"])


def test_real_recordings_become_windows_that_show_the_carrier(tmp_path):
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    paths = sorted(Path(folder).rglob("*_77500_*_iq.wav")) if folder else []
    if not paths:
        pytest.skip("HEIMDALL_RECORDINGS is not set or holds no *_77500_*_iq.wav")
    made = write_features(paths, tmp_path / "f.npz", position=(50.0152, 9.0112))
    assert [e["alignment"] for e in made.meta["events"]] == ["gnss"] * (len(paths) // 3)
    data = load_evaluation_data(made.path, LOCALIZATION_SIGNATURE)
    assert data.count == sum(e["windows"] for e in made.meta["events"]) > 20
    brightest = data.inputs["mel_spectrogram"].mean(axis=3).argmax(axis=2)
    assert np.isin(brightest, (63, 64)).all()  # the receivers are tuned to DCF77
