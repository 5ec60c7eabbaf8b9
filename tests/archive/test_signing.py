"""A signature holds for exactly the files and the key it was made for."""

import json
import subprocess
import sys

import pytest
from keys import make_certificate, make_key
from pydantic import SecretStr

from heimdall_onnx.archive.signing import Trust, check_signature, open_signer
from heimdall_onnx.common.errors import SettingsError, VerificationError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.services.settings import Settings

DIGESTS = {"model.onnx": "1" * 64, "manifest.json": "2" * 64}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificates"))


def settings(**changes) -> Settings:
    return Settings(_env_file=None).model_copy(update=changes)


def signed(digests=DIGESTS, **changes) -> bytes:
    signer = open_signer(settings(**changes))
    assert signer is not None
    return signer.sign("v1", digests)


def test_no_key_means_no_signature():
    assert open_signer(settings()) is None
    assert not Trust()


def test_signature_holds_for_what_was_signed(pair):
    check_signature(Trust(pair.public), "v1", DIGESTS, signed(signing_key=pair.private))


@pytest.mark.parametrize(
    "found",
    [
        DIGESTS | {"model.onnx": "3" * 64},
        DIGESTS | {"more": "3" * 64},
        {"model.onnx": "1" * 64},
    ],
    ids=["changed", "added", "missing"],
)
def test_signature_of_other_files_does_not_hold(pair, found):
    signature = signed(signing_key=pair.private)
    with pytest.raises(VerificationError, match="Signature mismatch"):
        check_signature(Trust(pair.public), "v1", found, signature)


def test_signature_of_another_key_does_not_hold(pair, tmp_path):
    other = make_key(tmp_path)
    with pytest.raises(VerificationError, match="Key mismatch"):
        check_signature(Trust(pair.public), "v1", DIGESTS, signed(signing_key=other.private))


def test_signature_that_claims_to_be_of_our_key_does_not_hold(pair, tmp_path):
    ours = json.loads(signed(signing_key=pair.private))
    theirs = json.loads(signed(signing_key=make_key(tmp_path).private))
    theirs["verificationMaterial"] = ours["verificationMaterial"]
    with pytest.raises(VerificationError, match="not made with this key"):
        check_signature(Trust(pair.public), "v1", DIGESTS, json.dumps(theirs).encode())


@pytest.mark.parametrize(
    "broken", [b"", b"\xff", b"[]", b"{}", b'{"verificationMaterial": {}}', b"[" * 100_000]
)
def test_broken_signature_does_not_hold(pair, broken):
    with pytest.raises(VerificationError):
        check_signature(Trust(pair.public), "v1", DIGESTS, broken)


def test_key_with_password(tmp_path):
    pair = make_key(tmp_path, password="a secret")
    signature = signed(signing_key=pair.private, signing_key_password=SecretStr("a secret"))
    check_signature(Trust(pair.public), "v1", DIGESTS, signature)
    for wrong in (None, SecretStr("another")):
        with pytest.raises(SettingsError, match=r"HEIMDALL_SIGNING_KEY.*password") as raised:
            open_signer(settings(signing_key=pair.private, signing_key_password=wrong))
        assert "another" not in str(raised.value)


def test_certificate_holds_for_its_root_alone(certificate, tmp_path):
    key, own, root = certificate
    signature = signed(signing_key=key, signing_certificate=own)
    check_signature(Trust(certificates=root), "v1", DIGESTS, signature)
    other_root = make_certificate(tmp_path)[2]
    with pytest.raises(VerificationError, match="certificate"):
        check_signature(Trust(certificates=other_root), "v1", DIGESTS, signature)


def test_certificate_of_another_key_is_refused_before_anything_is_signed(certificate, pair):
    with pytest.raises(SettingsError, match="HEIMDALL_SIGNING_CERTIFICATE"):
        open_signer(settings(signing_key=pair.private, signing_certificate=certificate[1]))


def test_certificate_without_key_is_refused(certificate):
    with pytest.raises(SettingsError, match="needs HEIMDALL_SIGNING_KEY"):
        open_signer(settings(signing_certificate=certificate[1]))


def test_unreadable_keys_are_named(tmp_path):
    (tmp_path / "text").write_text("no key")
    for path, problem in ((tmp_path / "missing", "can't be read"), (tmp_path / "text", "expected")):
        with pytest.raises(SettingsError, match=problem):
            open_signer(settings(signing_key=path))
        with pytest.raises(SettingsError, match=problem):
            check_signature(Trust(path), "v1", DIGESTS, b"{}")


def test_the_standard_tool_verifies_a_downloaded_folder(pair, tmp_path):
    folder = tmp_path / "v1"
    (folder / "reviews" / "comparisons" / "other").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"model")
    (folder / "manifest.json").write_bytes(b"{}")
    # Written after the signature, as a review or a comparison is.
    (folder / "reviews" / "one.json").write_bytes(b"{}")
    (folder / "reviews" / "comparisons" / "other" / "report.html").write_bytes(b"")
    digests = {name: hash_file(folder / name) for name in ("model.onnx", "manifest.json")}
    (folder / "model.sig").write_bytes(signed(digests, signing_key=pair.private))
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(pair.public)]
    assert subprocess.run(command, check=False).returncode == 0
    (folder / "model.onnx").write_bytes(b"Model")
    assert subprocess.run(command, check=False).returncode != 0
