"""A release as continuous integration shows it: JUnit XML of its gates, and a summary in Markdown.

JUnit XML as the Jenkins plug-in reads it, which GitLab CI, GitHub Actions' reporters and Azure
Pipelines follow: https://github.com/jenkinsci/xunit-plugin (``junit-10.xsd``). Every gate is a test
case with its limit and its measured value; what kept the gates from being evaluated is one more.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.text import escape_markdown, markdown_table
from heimdall_onnx.common.verdict import Gate, Verdict

if TYPE_CHECKING:
    from heimdall_onnx.release.result import ReleaseResult

# What XML 1.0 has no form for, not even escaped.
_NO_XML = re.compile(r"[^\t\n\r -\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")


def junit(result: ReleaseResult) -> bytes:
    """The gates as JUnit XML in UTF-8.

    A gate that does not hold is a failure, of the type ``fail``, or ``not shown`` where there were
    too few samples to tell. A run that ended for another reason has an error, in a
    test case called ``release``, so that no run without gates counts as one in which all hold.
    """
    gates = [Gate(**gate) for gate in result.gates]
    broken = not result.success and all(gate.passed for gate in gates)
    suite = ElementTree.Element(
        "testsuite",
        name=_xml(result.model_name or "release"),
        tests=str(len(gates) + 1),
        failures=str(sum(not gate.passed for gate in gates)),
        errors=str(int(broken)),
        time=f"{sum(cost['seconds'] for cost in result.costs):.3f}",
    )
    for gate in gates:
        case = _case(suite, gate.name)
        if not gate.passed:
            kind = gate.result.lower()
            failure = ElementTree.SubElement(
                case, "failure", message=_xml(gate.summary()), type=kind
            )
            failure.text = _xml(gate.detail)
        ElementTree.SubElement(case, "system-out").text = _xml(gate.summary())
    case = _case(suite, "release")
    if broken:
        said = result.error or "the release did not come to its end"
        error = ElementTree.SubElement(case, "error", message=_xml(said.splitlines()[0]))
        error.text = _xml(said)
    ElementTree.SubElement(case, "system-out").text = _xml(
        "\n".join(f"{label}: {value}" for label, value in _addresses(result))
    )
    ElementTree.indent(suite)
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def markdown(result: ReleaseResult) -> str:
    """What somebody must know who decides on a merge request: verdict, reasons, gates, addresses.

    Names and messages that come from outside stand in it as inert text.
    """
    judged = result.exit_code in (0, EvidenceError.exit_code)
    mark = "✔" if result.success else "✘"
    verdict = result.verdict.upper() if judged else f"NOT JUDGED, exit code {result.exit_code}"
    title = f"{escape_markdown(result.model_name or 'release')}: {escape_markdown(verdict)}"
    parts = [f"## {mark} {title}"]
    if result.error:
        parts.append("\n".join(f"> {escape_markdown(line)}" for line in result.error.splitlines()))
    facts = [*_addresses(result)]
    if result.speedup is not None:
        facts.insert(0, ("speedup", f"{result.speedup:.2f}× (PyTorch over ONNX Runtime)"))
    if facts:
        rows = (tuple(map(escape_markdown, fact)) for fact in facts)
        parts.append(markdown_table(("", ""), rows))
    if result.gates:
        parts.append(Verdict(tuple(Gate(**gate) for gate in result.gates), "").to_markdown())
    return "\n\n".join(parts) + "\n"


def _addresses(result: ReleaseResult) -> list[tuple[str, str]]:
    registered = (
        f"{result.model_name} version {result.model_version}, alias {result.alias}"
        if result.model_version
        else None
    )
    found = (
        ("release", result.version),
        ("model", result.s3_uri),
        ("report", result.report_html_uri),
        ("registered", registered),
        ("MLflow run", result.run_id),
    )
    return [(label, value) for label, value in found if value]


def _case(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname="heimdall_onnx.release.runner", name=_xml(name)
    )


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)
