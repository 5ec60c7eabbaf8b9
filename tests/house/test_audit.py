"""The audit fails for what is known to be vulnerable, and says how much nobody has looked at."""

from __future__ import annotations

import json
from pathlib import Path

import audit
import pytest

PINS = "# pins\nnumpy==1.0\nrequests==2.0\nother==1.0; python_version < '3.12'\n"
CLEAN = {"name": "numpy", "version": "1.0", "vulns": []}
VULNERABLE = {
    "name": "requests",
    "version": "2.0",
    "vulns": [{"id": "PYSEC-2000-1", "fix_versions": ["2.1"]}],
}
UNKNOWN = {"name": "other", "skip_reason": "not found"}


@pytest.fixture
def service(tmp_path, monkeypatch):
    """A program in the place of pip-audit's module that answers as it is told."""

    def answer(known: list[dict], *, error: str = "") -> Path:
        program = tmp_path / "pip_audit.py"
        program.write_text(
            "import json, re, sys\n"
            f"known = json.loads({json.dumps(known)!r})\n"
            "asked = open(sys.argv[2]).read()\n"
            "found = [k for k in known if re.search('^' + k['name'] + '==', asked, re.M)]\n"
            f"sys.exit({error!r}) if {error!r} else print(json.dumps({{'dependencies': found}}))\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        (tmp_path / "pins.txt").write_text(PINS)
        return tmp_path / "pins.txt"

    return answer


def test_known_vulnerability_fails_and_is_named(service, capsys):
    assert audit.main(service([CLEAN, VULNERABLE, UNKNOWN])) == 1
    said = capsys.readouterr().out
    assert "requests 2.0: PYSEC-2000-1, mended in 2.1" in said
    assert "2 of 3 pinned packages audited, 1 vulnerable" in said
    assert "NOT audited: 1;" in said


def test_service_that_answers_nothing_does_not_fail_but_is_named(service, capsys):
    for known, error in (([UNKNOWN], ""), ([], "requests.exceptions.ProxyError: no way there")):
        assert audit.main(service(known, error=error)) == 0
        assert "NOT audited: 3;" in capsys.readouterr().out


def test_audit_that_could_not_read_its_pins_fails(service):
    with pytest.raises(SystemExit, match="pip-audit failed"):
        audit.main(service([], error="invalid specifier"))


def test_pip_audit_takes_the_options(tmp_path, capsys):
    (tmp_path / "pins.txt").write_text("numpy==1==2\n")
    with pytest.raises(SystemExit, match="Invalid requirement"):
        audit.main(tmp_path / "pins.txt")
