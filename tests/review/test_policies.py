"""What each role may do, and what a real store refuses it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import boto3
import mlflow
import numpy as np
import pytest
from botocore.exceptions import ClientError
from hostile import EVERYTHING
from pydantic import SecretStr
from releases import PREFIX, changed_notebook, keys, smoke

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.metadata import METADATA
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import ParameterError, StoreError
from heimdall_onnx.release.publish import Journal, withdraw
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.gallery.page import make_gallery, store_gallery
from heimdall_onnx.review.policies import ROLES, Place, bucket_policies, identity_policy
from heimdall_onnx.review.promotion import promote_release
from heimdall_onnx.services import embedded as services
from heimdall_onnx.services import store
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import connect, open_for_reading
from heimdall_onnx.services.daemon import write_private
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket, to_json

V = f"{PREFIX}/v20261120_143000"
BY_IDENTITY = Place("roles-by-identity", PREFIX, "s3://artifacts-by-identity")
BY_BUCKET = Place("roles-by-bucket", PREFIX, "s3://artifacts-by-bucket/deep")
CONDITIONAL = Place("roles-conditional", PREFIX, "", conditional=True)


@dataclass(frozen=True)
class Roles:
    """A store with an identity for each role and form of policy."""

    settings: Settings
    secret: dict[str, str]

    def settings_of(self, identity: str) -> Settings:
        return self.settings.model_copy(
            update={
                "s3_access_key_id": SecretStr(identity),
                "s3_secret_access_key": SecretStr(self.secret[identity]),
            }
        )

    def client_of(self, identity: str):
        return make_client(self.settings_of(identity))


@pytest.fixture(scope="module")
def roles(tmp_path_factory, empty_database):
    home = tmp_path_factory.mktemp("roles")
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    bare = Settings(_env_file=None, HEIMDALL_HOME=home)
    secret: dict[str, str] = {}

    def with_roles(path, text):
        config = _with_roles(json.loads(text), secret) if path.name == "s3.json" else None
        write_private(path, json.dumps(config) if config else text)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(services, "write_private", with_roles)
            settings = services.ensure_store(bare)
        client = make_client(settings)
        for place in (BY_IDENTITY, BY_BUCKET, CONDITIONAL):
            Bucket(client, place.bucket).ensure()
            if place.artifact_uri:
                Bucket(client, store.parse_uri(place.artifact_uri)[0]).ensure()
        arns = {role: [f"arn:aws:iam::000000000000:user/{role}-bucket"] for role in ROLES}
        for bucket, policy in bucket_policies(BY_BUCKET, arns).items():
            client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        yield Roles(settings, secret)
    finally:
        services.services_down(bare)


def _with_roles(config: dict, secret: dict[str, str]) -> dict:
    """The store's configuration with identities, those of two forms with policies of their own."""
    config["policies"] = []
    for form, place in (("identity", BY_IDENTITY), ("conditional", CONDITIONAL), ("bucket", None)):
        for role in ROLES:
            name = f"{role}-{form}"
            secret[name] = secrets.token_urlsafe(24)
            keys = {"accessKey": name, "secretKey": secret[name]}
            identity = {"name": name, "credentials": [keys]}
            if place is not None:
                content = json.dumps(identity_policy(role, place))
                config["policies"].append({"name": name, "content": content})
                identity["policyNames"] = [name]
            config["identities"].append(identity)
    return config


# What can be tried: a call, and who may do it

CORS = {"CORSRules": [{"AllowedMethods": ["GET"], "AllowedOrigins": ["*"]}]}
EVERYONE = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "s3:*", "Resource": "*"}],
}


def _get(key: str) -> Callable:
    return lambda client, bucket: client.get_object(Bucket=bucket, Key=key)


def _put(key: str, **options: str) -> Callable:
    return lambda client, bucket: client.put_object(Bucket=bucket, Key=key, Body=b"y", **options)


def _delete(key: str) -> Callable:
    return lambda client, bucket: client.delete_object(Bucket=bucket, Key=key)


def _list(prefix: str) -> Callable:
    return lambda client, bucket: client.list_objects_v2(Bucket=bucket, Prefix=prefix)


def _bucket(call: str, **arguments: object) -> Callable:
    return lambda client, bucket: getattr(client, call)(Bucket=bucket, **arguments)


def _copy_model_over_review(client, bucket: str) -> None:
    source = {"Bucket": bucket, "Key": f"{V}/model.onnx"}
    client.copy_object(Bucket=bucket, Key=f"{V}/reviews/1.json", CopySource=source)


def _begin_parts(client, bucket: str) -> None:
    begun = client.create_multipart_upload(Bucket=bucket, Key=f"{V}/large")
    where = {"Bucket": bucket, "Key": f"{V}/large", "UploadId": begun["UploadId"]}
    part = client.upload_part(**where, PartNumber=1, Body=b"y" * (5 << 20))
    client.list_parts(**where)
    done = {"Parts": [{"ETag": part["ETag"], "PartNumber": 1}]}
    client.complete_multipart_upload(**where, MultipartUpload=done)


STORED = (
    *(f"{V}/{name}" for name in ("model.onnx", "manifest.json", "reviews/1.json")),
    f"{PREFIX}/failed/v20261120_143001/report.html",
    *("objects/sha256/ab", "aliases/model/staging/00000001.json", "elsewhere"),
    f"{PREFIX}/gallery/index.html",
)
ALIAS = "aliases/model/staging/00000002.json"
EVERY_ROLE, NO_ROLE = set(ROLES), set[str]()
TRIED: dict[str, tuple[Callable, set[str]]] = {
    "read a model": (_get(f"{V}/model.onnx"), EVERY_ROLE),
    "read a manifest": (_get(f"{V}/manifest.json"), EVERY_ROLE),
    "list a release": (_list(f"{V}/"), EVERY_ROLE),
    "list the bucket": (_list(""), {"releaser", "reviewer"}),
    "list failed runs": (_list(f"{PREFIX}/failed/"), {"releaser", "reviewer"}),
    "look for the bucket": (_bucket("head_bucket"), {"releaser", "reviewer"}),
    "read a failed run": (_get(STORED[3]), {"releaser", "reviewer"}),
    "read a checkpoint": (_get("objects/sha256/ab"), {"releaser", "reviewer"}),
    "read the alias log": (_get(STORED[5]), {"releaser", "reviewer"}),
    "read elsewhere": (_get("elsewhere"), NO_ROLE),
    "write a model": (_put(f"{V}/model.onnx"), {"releaser"}),
    "write a model in parts": (_begin_parts, {"releaser"}),
    "write a manifest once": (_put(f"{V}x/manifest.json", IfNoneMatch="*"), NO_ROLE),
    "claim a version": (_put(f"{PREFIX}/v20261120_143002/m", IfNoneMatch="*"), {"releaser"}),
    "write a failed run": (_put(f"{PREFIX}/failed/v20261120_143002/r"), {"releaser"}),
    "write a checkpoint": (_put("objects/sha256/cd"), {"releaser"}),
    "write the alias log": (_put(ALIAS, IfNoneMatch="*"), {"releaser", "reviewer"}),
    "write a review": (_put(f"{V}/reviews/2.json", IfNoneMatch="*"), {"reviewer"}),
    "write a comparison": (_put(f"{V}/reviews/comparisons/1/report.html"), {"reviewer"}),
    "write a review, spelt otherwise": (_put(f"{V}//reviews/3.json"), {"reviewer"}),
    "leave a release upwards": (_put(f"{V}/reviews/../model.onnx"), NO_ROLE),
    "leave a release upwards, reading": (_get(f"{V}/../../../objects/sha256/ab"), NO_ROLE),
    "copy a model over a review": (_copy_model_over_review, {"reviewer"}),
    "read the gallery": (_get(STORED[7]), {"releaser", "reviewer"}),
    "write the gallery anew": (_put(STORED[7]), {"releaser", "reviewer"}),
    "delete the gallery": (_delete(STORED[7]), NO_ROLE),
    "write beside the releases": (_put(f"{PREFIX}/notes"), NO_ROLE),
    "write elsewhere": (_put("elsewhere"), NO_ROLE),
    "delete of a release": (_delete(f"{V}/metadata.json"), {"releaser"}),
    "delete a review": (_delete(f"{V}/reviews/1.json"), NO_ROLE),
    "delete from the alias log": (_delete(STORED[5]), NO_ROLE),
    "delete a checkpoint": (_delete("objects/sha256/ab"), NO_ROLE),
    "delete a failed run": (_delete(STORED[3]), NO_ROLE),
    "delete the bucket": (_bucket("delete_bucket"), NO_ROLE),
    "read the policy": (_bucket("get_bucket_policy"), NO_ROLE),
    "change the policy": (_bucket("put_bucket_policy", Policy=json.dumps(EVERYONE)), NO_ROLE),
    "delete the policy": (_bucket("delete_bucket_policy"), NO_ROLE),
    "look at the versioning": (_bucket("get_bucket_versioning"), {"releaser"}),
    "turn versioning off": (
        _bucket("put_bucket_versioning", VersioningConfiguration={"Status": "Suspended"}),
        NO_ROLE,
    ),
    "open the bucket to pages": (_bucket("put_bucket_cors", CORSConfiguration=CORS), NO_ROLE),
    "make a model public": (
        lambda client, bucket: client.put_object_acl(
            Bucket=bucket, Key=f"{V}/model.onnx", ACL="public-read"
        ),
        NO_ROLE,
    ),
    "make a bucket": (
        lambda client, bucket: client.create_bucket(Bucket=f"{bucket}-new"),
        NO_ROLE,
    ),
}


def _is_allowed(call: Callable, client, bucket: str) -> bool:
    try:
        call(client, bucket)
    except ClientError as error:
        # A key with `..` is no key for this store.
        if error.response["Error"]["Code"] not in {"AccessDenied", "403", "InvalidRequest"}:
            raise
        return False
    return True


@pytest.mark.services
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("place", [BY_IDENTITY, BY_BUCKET], ids=["identity", "bucket"])
def test_each_role_may_do_its_work_and_nothing_else(roles, role, place):
    admin = make_client(roles.settings)
    for key in STORED:
        admin.put_object(Bucket=place.bucket, Key=key, Body=b"x")
    admin.delete_object(Bucket=place.bucket, Key=f"{PREFIX}/v20261120_143002/m")
    admin.delete_object(Bucket=place.bucket, Key=f"{V}/reviews/2.json")
    admin.delete_object(Bucket=place.bucket, Key=ALIAS)
    client = roles.client_of(f"{role}-{'identity' if place is BY_IDENTITY else 'bucket'}")
    did = {what for what, (call, _) in TRIED.items() if _is_allowed(call, client, place.bucket)}
    assert did == {what for what, (_, may) in TRIED.items() if role in may}
    artifacts, folder = store.parse_uri(place.artifact_uri)
    artifact = "/".join(filter(None, (folder, "1/report.html")))
    did = {
        what
        for what, call in (
            ("write", _put(artifact)),
            ("read", _get(artifact)),
            ("delete", _delete(artifact)),
        )
        if _is_allowed(call, client, artifacts)
    }
    assert did == ({"write", "read"} if role == "releaser" else set())
    if folder:
        assert not _is_allowed(_put("outside"), client, artifacts)


@pytest.mark.services
def test_store_that_does_not_know_the_condition_refuses_rather_than_allows(roles):
    client = roles.client_of("releaser-conditional")
    assert not _is_allowed(_put(ALIAS), client, CONDITIONAL.bucket)
    assert not _is_allowed(_put(ALIAS, IfNoneMatch="*"), client, CONDITIONAL.bucket)
    assert _is_allowed(_put(f"{V}/model.onnx"), client, CONDITIONAL.bucket)


@pytest.fixture(scope="module")
def folder(roles, small, tmp_path_factory) -> str:
    """The folder of a release that a releaser made."""
    settings = roles.settings_of("releaser-identity").model_copy(
        update={"artifact_uri": BY_IDENTITY.artifact_uri}
    )
    notebook = changed_notebook(tmp_path_factory.mktemp("notebook"))
    result = release_checkpoint(smoke(small, BY_IDENTITY.bucket), settings, notebook=notebook)
    assert result.success, result.error
    return result.s3_uri.removesuffix("/model.onnx")


@pytest.mark.services
def test_a_reviewer_verifies_what_a_releaser_released(roles, folder):
    findings = verify_release(
        Release.at(open_for_reading(roles.settings_of("reviewer-identity")), folder)
    )
    assert len(findings) > 8
    assert [finding for finding in findings if not finding.holds] == []


@pytest.mark.services
def test_a_reviewer_promotes_it(roles, folder, reset_mlflow):
    connection = open_for_reading(roles.settings_of("reviewer-identity"))
    review = promote_release(
        Release.at(connection, folder),
        alias="production",
        reviewer="reviewer",
        note=EVERYTHING.replace("\x1b", "").replace("\0", "").encode("ascii", "ignore").decode(),
        limits=Limits(allow_smoke=True),
        compare=False,
    )
    assert connection.tracker.alias_target("test-model", "production") == review.version
    assert review.record_uri.startswith(f"{folder}/reviews/")
    written = keys(make_client(roles.settings), BY_IDENTITY.bucket)
    assert "aliases/test-model/production/00000001.json" in written
    assert [f for f in verify_release(Release.at(connection, folder)) if not f.holds] == []


@pytest.mark.services
@pytest.mark.parametrize("role", ["releaser", "reviewer"])
def test_who_releases_and_who_reviews_write_the_gallery(roles, folder, role):
    client = roles.client_of(f"{role}-identity")
    gallery = make_gallery(Bucket(client, BY_IDENTITY.bucket), PREFIX)
    store_gallery(Bucket(client, BY_IDENTITY.bucket), gallery)
    assert folder.rpartition("/")[2] in [row.facts.version for row in gallery.rows]
    assert Bucket(client, BY_IDENTITY.bucket).read_bytes(gallery.key) == gallery.page


@pytest.fixture
def consumer(roles, folder, tmp_path, reset_mlflow) -> Settings:
    database = roles.settings.tracking_uri
    return roles.settings_of("consumer-identity").model_copy(
        update={"home": tmp_path, "mlflow_tracking_uri": database}
    )


@pytest.mark.services
def test_a_consumer_opens_it_with_mlflow(consumer, small):
    consumer.apply()
    boto3.setup_default_session()
    mlflow.set_tracking_uri(consumer.tracking_uri.get_secret_value())
    x = {"signal": np.load(small.eval_data)["signal"][:2]}
    predicted = mlflow.pyfunc.load_model("models:/test-model@staging").predict(x)
    assert predicted["positions"].shape == (2, 2)


@pytest.mark.services
def test_a_consumer_opens_it(consumer):
    assert load_model("models:/test-model@staging", settings=consumer).get_inputs()


@pytest.mark.services
def test_a_consumer_is_told_what_it_may_not(consumer):
    with pytest.raises(StoreError, match="access is forbidden"):
        Bucket(make_client(consumer), BY_IDENTITY.bucket).list_versions(PREFIX)


@pytest.mark.services
def test_a_releaser_takes_back_what_it_began(roles, tmp_path, reset_mlflow):
    bucket = BY_IDENTITY.bucket
    settings = roles.settings_of("releaser-identity").model_copy(
        update={"artifact_uri": BY_IDENTITY.artifact_uri}
    )
    connection = connect(settings)
    admin = make_client(roles.settings)
    before = keys(admin, bucket)
    claim = to_json({"claim": "ours"})
    version = connection.bucket(bucket).claim_version(
        PREFIX, name=METADATA, content=lambda _: claim
    )
    for name in ("model.onnx", "report.html", store.MANIFEST):
        connection.bucket(bucket).upload_bytes(b"x", f"{PREFIX}/{version}/{name}")
    assert len(keys(admin, bucket) - before) == 4
    entries = {"bucket": bucket, "prefix": PREFIX, "version": version}
    Journal(tmp_path).write(**entries, run_id="run", model_name="none", claim="ours")
    assert withdraw(connection, tmp_path) == ()
    assert keys(admin, bucket) == before


# The documents


def test_an_identity_policy_names_no_principal_and_a_bucket_policy_one_bucket():
    place = Place("models", "releases", "s3://artifacts/mlflow")
    for role in ROLES:
        assert "Principal" not in json.dumps(identity_policy(role, place))
    arn = "arn:aws:iam::123456789012:role/team/releaser"
    found = bucket_policies(place, {"releaser": [arn], "consumer": [arn]})
    assert found.keys() == {"models", "artifacts"}
    for bucket, policy in found.items():
        sids = [statement["Sid"] for statement in policy["Statement"]]
        assert len(sids) == len(set(sids))
        for statement in policy["Statement"]:
            assert statement["Principal"] == {"AWS": [arn]}
            for resource in statement["Resource"]:
                assert resource.split(":::")[1].split("/")[0] == bucket


def test_no_role_can_widen_its_rights_or_delete_for_good():
    for role in ROLES:
        for statement in identity_policy(role, Place())["Statement"]:
            if statement["Effect"] == "Allow":
                assert not {a for a in statement["Action"] if "*" in a or "Policy" in a}
                assert not {"s3:DeleteBucket", "s3:DeleteObjectVersion"} & {*statement["Action"]}


def test_conditional_writes_are_asked_for_only_where_they_are_known():
    def conditions(place: Place, role: str) -> list:
        statements = identity_policy(role, place)["Statement"]
        return [s["Resource"] for s in statements if "Null" in s.get("Condition", {})]

    for role in ROLES:
        assert conditions(Place(), role) == []
    conditional = Place(conditional=True)
    (resources,) = conditions(conditional, "releaser")
    assert any(resource.endswith("/manifest.json") for resource in resources)
    (resources,) = conditions(conditional, "reviewer")
    assert any(resource.endswith("/reviews/*") for resource in resources)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: identity_policy("admin", Place()), "no role 'admin'; expected one of releaser"),
        (lambda: bucket_policies(Place(), {"consumer": ["*"]}), r"found \*"),
        (lambda: bucket_policies(Place(), {"consumer": []}), "found none"),
        (lambda: bucket_policies(Place(), {"consumer": ["arn:aws:iam::1:root"]}), "found arn"),
        (lambda: Place(bucket="*"), "bucket"),
        (lambda: Place(prefix="models/*"), "prefix"),
        (lambda: Place(prefix="../models"), "prefix"),
        (lambda: Place(prefix=""), "prefix"),
        (lambda: Place(artifact_uri="s3://heim*"), "bucket"),
        (lambda: Place(artifact_uri="s3://mlflow/?"), "prefix"),
        (lambda: Place(artifact_uri="file:///mlflow"), "expected s3://bucket/key"),
    ],
)
def test_what_would_give_away_more_is_refused(make, problem):
    with pytest.raises(ParameterError, match=problem):
        make()
