"""Who may do what in the bucket: S3 policies of least privilege for three roles.

| role | writes | reads |
|---|---|---|
| releaser | releases, ``objects/``, ``aliases/``, ``failed/``, ``gallery/``, artifacts | the same |
| reviewer | ``reviews/`` below a release, ``aliases/``, ``gallery/`` | all but MLflow's artifacts |
| consumer | nothing | releases |

Evaluation data that are a dataset elsewhere than in ``objects/`` are a place of their own: whoever
releases on them, verifies such a release fully or promotes it needs to read and list that, too.

The documents are in AWS's policy language, which other stores speak too. Attached to an identity
one names no principal; as the policy of a bucket it does (`bucket_policies`).

What a policy can't say is whether a release is finished. So the releaser, who must be able to take
back an unfinished one, could delete a finished one. Where that must not be, turn on the bucket's
versioning: no role may delete a version for good, and `heimdall-onnx verify` names what is missing.

The statements are in ``policies.json``, where a name with a dollar stands for what `Place` gives.
The releaser may not write reviews, since who releases must not judge the release; the pattern takes
a doubled slash too, which some stores take for one. The galleries are made from the other objects
and replaced whenever there is a new one, so they are never retained. What is forbidden to every
role would let it widen its rights, or make a deletion final.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import REFERENCE_FOLDER, check_parameters
from heimdall_onnx.services.store import parse_uri

Role = Literal["releaser", "reviewer", "consumer"]
Statement = dict[str, Any]

ROLES: tuple[Role, ...] = get_args(Role)

# As `Bucket.claim_version` names them; that leaves out `failed/`.
_VERSION = "v????????_??????"
_PRINCIPAL = r"arn:[a-z-]+:(iam|sts)::(\d{12})?:(user|role|assumed-role)/[\w+=,.@/-]+"
_ARN = "arn:aws:s3:::"
_TEMPLATES = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Place:
    """What the roles are about.

    Attributes:
        bucket: Bucket of the releases; it must exist, since no role may make it.
        prefix: Folder of the releases in it.
        artifact_uri: Where MLflow keeps its artifacts, ``s3://bucket[/folder]``; empty if an MLflow
            server keeps them for its clients.
        conditional: Refuse every write of a manifest or an entry of the alias log that could
            replace one, by the condition key ``s3:if-none-match``. Amazon S3 knows it; a store that
            does not would refuse the releaser's own conditional writes too, as SeaweedFS 4.48 does.

    Raises:
        ParameterError: If the bucket, the folder or the address can't be one.
    """

    bucket: str = "heimdall-models"
    prefix: str = REFERENCE_FOLDER
    artifact_uri: str = "s3://heimdall-mlflow"
    conditional: bool = False

    def __post_init__(self) -> None:
        # A wildcard in a name would give away other buckets.
        # No folder would be all of them.
        check_parameters({"bucket": self.bucket, "prefix": self.prefix or "/"})
        if self.artifact_uri:
            bucket, folder = parse_uri(self.artifact_uri)
            check_parameters({"bucket": bucket} | ({"prefix": folder.strip("/")} if folder else {}))


def identity_policy(role: str, place: Place) -> dict[str, Any]:
    """The policy document of a role, to be attached to an identity.

    Args:
        role: ``"releaser"``, ``"reviewer"`` or ``"consumer"``.
        place: What it is about.

    Raises:
        ParameterError: If there is no such role.
    """
    return _document([statement for _, statement in _statements(role, place)])


def bucket_policies(
    place: Place, principals: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The policies of the buckets, where identities have none of their own.

    A bucket has one policy, so all roles are in it, and it speaks of that bucket alone.

    Args:
        place: What it is about.
        principals: Role to the ARNs of the users and roles that have it.

    Returns:
        Bucket to policy document.

    Raises:
        ParameterError: If there is no such role, or an ARN names no user or role; ``*`` would give
            the role to everyone.
    """
    found: dict[str, list[Statement]] = {}
    for role, arns in principals.items():
        wrong = [arn for arn in arns if not re.fullmatch(_PRINCIPAL, arn)]
        if wrong or not arns:
            raise ParameterError(
                f"a {role} must be the ARN of a user or role, e.g. "
                f"arn:aws:iam::123456789012:role/{role}; found {', '.join(wrong) or 'none'}"
            )
        for bucket, statement in _statements(role, place):
            named = {**statement, "Sid": f"{role.capitalize()}{statement['Sid']}"}
            found.setdefault(bucket, []).append({**named, "Principal": {"AWS": list(arns)}})
    return {bucket: _document(statements) for bucket, statements in found.items()}


def _statements(role: str, place: Place) -> Iterator[tuple[str, Statement]]:
    """Bucket and statement, one after the other."""
    if role not in ROLES:
        raise ParameterError(f"there is no role {role!r}; expected one of {', '.join(ROLES)}")
    artifacts, folder = parse_uri(place.artifact_uri) if place.artifact_uri else ("", "")
    text = Template(_TEMPLATES.read_text(encoding="utf-8")).substitute(
        bucket=f"{_ARN}{place.bucket}",
        prefix=place.prefix,
        version=_VERSION,
        release=f"{_ARN}{place.bucket}/{place.prefix}/{_VERSION}",
        artifacts=f"{_ARN}{artifacts}",
        below="/".join(filter(None, (folder.strip("/"), "*"))),
    )
    templates = json.loads(text)
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes-enforce.html
    left_out = () if place.conditional else ("AppendOnly",)
    for statement in (*templates[role], *templates["every role"]):
        bucket = statement["Resource"][0].removeprefix(_ARN).partition("/")[0]
        if bucket and statement["Sid"] not in left_out:
            yield bucket, statement


def _document(statements: Sequence[Statement]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}
