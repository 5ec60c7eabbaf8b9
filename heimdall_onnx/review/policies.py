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
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import check_parameters
from heimdall_onnx.services.store import GALLERY, MANIFEST, parse_uri

Role = Literal["releaser", "reviewer", "consumer"]
Statement = dict[str, Any]

ROLES: tuple[Role, ...] = get_args(Role)

# As `store.claim_version` names them; that leaves out `failed/`.
_VERSION = "v????????_??????"
_PRINCIPAL = r"arn:[a-z-]+:(iam|sts)::(\d{12})?:(user|role|assumed-role)/[\w+=,.@/-]+"
_WRITE = ("s3:PutObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts")
_PROTECTION = ("s3:GetBucketVersioning", "s3:GetBucketObjectLockConfiguration")
# What would let a role widen its rights, or make a deletion final.
_NEVER = (
    "s3:DeleteBucket",
    "s3:PutBucketPolicy",
    "s3:DeleteBucketPolicy",
    "s3:PutBucketVersioning",
    "s3:PutLifecycleConfiguration",
    "s3:BypassGovernanceRetention",
    "s3:DeleteObjectVersion",
)


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
    prefix: str = "models/localization"
    artifact_uri: str = "s3://heimdall-mlflow"
    conditional: bool = False

    def __post_init__(self) -> None:
        # A wildcard in a name would give away other buckets.
        check_parameters({"bucket": self.bucket, "prefix": self.prefix})
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
    makers = {"releaser": _releaser, "reviewer": _reviewer, "consumer": _consumer}
    if role not in makers:
        raise ParameterError(f"there is no role {role!r}; expected one of {', '.join(ROLES)}")
    yield from makers[role](place)
    yield (
        place.bucket,
        _deny("Never", _NEVER, [_arn(place.bucket), _arn(place.bucket, "*")]),
    )


def _releaser(place: Place) -> Iterator[tuple[str, Statement]]:
    bucket, release = place.bucket, f"{place.prefix}/{_VERSION}/*"
    own = [release, f"{place.prefix}/failed/*", "objects/*", "aliases/*"]
    # Made from the others, and replaced whenever there is a new one: never retained.
    written = [*own, f"{place.prefix}/{GALLERY}/*"]
    # Some stores take a doubled slash for one.
    reviews = f"{place.prefix}/{_VERSION}/*reviews/*"
    yield bucket, _list(bucket)
    yield bucket, _allow("Protection", _PROTECTION, [_arn(bucket)])
    yield bucket, _allow("Read", ["s3:GetObject"], _arns(bucket, written))
    yield bucket, _allow("Write", _WRITE, _arns(bucket, written))
    yield bucket, _allow("Retain", ["s3:PutObjectRetention"], _arns(bucket, own))
    yield bucket, _allow("TakeBack", ["s3:DeleteObject"], _arns(bucket, [release]))
    # Who releases must not judge the release.
    yield bucket, _deny("NoReviews", ["s3:PutObject", "s3:DeleteObject"], _arns(bucket, [reviews]))
    yield from _append_only(place, [f"{place.prefix}/{_VERSION}/{MANIFEST}", "aliases/*"])
    if place.artifact_uri:
        artifacts, folder = parse_uri(place.artifact_uri)
        below = "/".join(filter(None, (folder.strip("/"), "*")))
        yield artifacts, _list(artifacts, "ListArtifacts")
        yield (
            artifacts,
            _allow("Artifacts", ["s3:GetObject", *_WRITE], _arns(artifacts, [below])),
        )


def _reviewer(place: Place) -> Iterator[tuple[str, Statement]]:
    bucket = place.bucket
    read = [f"{place.prefix}/*", "objects/*", "aliases/*"]
    once = [f"{place.prefix}/{_VERSION}/reviews/*", "aliases/*"]
    write = [*once, f"{place.prefix}/{GALLERY}/*"]
    yield bucket, _list(bucket)
    yield bucket, _allow("Read", ["s3:GetObject"], _arns(bucket, read))
    yield bucket, _allow("Write", ["s3:PutObject"], _arns(bucket, write))
    yield from _append_only(place, once)


def _consumer(place: Place) -> Iterator[tuple[str, Statement]]:
    bucket, release = place.bucket, f"{place.prefix}/{_VERSION}/*"
    yield bucket, _list(bucket) | {"Condition": {"StringLike": {"s3:prefix": [release]}}}
    yield bucket, _allow("Read", ["s3:GetObject"], _arns(bucket, [release]))


def _append_only(place: Place, keys: Sequence[str]) -> Iterator[tuple[str, Statement]]:
    # https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes-enforce.html
    if place.conditional:
        once = _deny("AppendOnly", ["s3:PutObject"], _arns(place.bucket, keys))
        yield place.bucket, {**once, "Condition": {"Null": {"s3:if-none-match": "true"}}}


def _list(bucket: str, sid: str = "List") -> Statement:
    # Without a condition on the prefix, as a look for the bucket itself carries none.
    return _allow(sid, ["s3:ListBucket"], [_arn(bucket)])


def _allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Statement:
    return {"Sid": sid, "Effect": "Allow", "Action": list(actions), "Resource": list(resources)}


def _deny(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Statement:
    return {**_allow(sid, actions, resources), "Effect": "Deny"}


def _arns(bucket: str, keys: Sequence[str]) -> list[str]:
    return [_arn(bucket, key) for key in keys]


def _arn(bucket: str, key: str = "") -> str:
    return f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")


def _document(statements: Sequence[Statement]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": list(statements)}
