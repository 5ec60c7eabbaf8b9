"""Links that let somebody without credentials read a release's report, for a while.

Whoever has such a link can read that object until it expires; it can't be taken back but by
deleting the object or the key that signed it. A link signed with temporary credentials ends with
them.

The store serves the report as a page of its own, so a script in it would run under the store's
address. S3 can't be told to send a Content-Security-Policy. What stands against it: everything a
run brings in is put into the report as inert text, only the report itself is served as HTML, and
there is nothing to win, since S3 knows no cookies and a page can't list or sign anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from heimdall_onnx.archive.manifest import BOM, REPORT, REPORT_HTML
from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.services.store import MANIFEST, media_type

# The longest that a signature of version 4 can hold.
LONGEST_S = 7 * 24 * 3600
_SHARED = (REPORT_HTML, REPORT, MANIFEST, BOM)


@dataclass(frozen=True)
class Link:
    """An address that opens one object without credentials.

    Attributes:
        name: The object's name within its release.
        url: The address; a secret, since it is all that is needed.
        expires_s: Seconds for which it works.
    """

    name: str
    url: SecretStr = field(repr=False)
    expires_s: int


def share_release(release: Release, *, expires_s: int) -> tuple[Link, ...]:
    """Links to what a reviewer reads of a release: report, notebook, manifest, bill of materials.

    Nothing else of the release can be read with them, and nothing can be written.

    Args:
        release: The release; its connection's credentials sign the links and must allow reading.
        expires_s: Seconds for which the links work, 1 to 604,800 (7 days).

    Raises:
        ParameterError: If the time is out of range.
        VerificationError: If there is no release, or one of its objects was changed.
        StoreError: If the store can't be reached or refuses.
    """
    if isinstance(expires_s, bool) or not 1 <= expires_s <= LONGEST_S:
        raise ParameterError(
            f"links can work for 1 to {LONGEST_S} seconds (7 days), found {expires_s!r}"
        )
    objects = release.manifest.objects
    names = [name for name in _SHARED if name == MANIFEST or name in objects]
    # What is handed on under our name is what was released.
    for name in names:
        entry = objects.get(name)
        if entry and release.bucket.hash_object(entry.key)[0] != entry.sha256:
            raise VerificationError(
                f"{release.uri}/{name} is not what was released, so no link is made; see "
                "`heimdall-onnx verify`"
            )
    with release.bucket.errors(f"sign links to {release.uri}"):
        return tuple(Link(name, _sign(release, name, expires_s), expires_s) for name in names)


def _sign(release: Release, name: str, expires_s: int) -> SecretStr:
    # Only the report is for the browser. What it is shown as must not depend on how it was stored.
    shown = "inline" if name == REPORT_HTML else "attachment"
    parameters: dict[str, Any] = {
        "Bucket": release.bucket.name,
        "Key": f"{release.folder}/{name}",
        "ResponseContentType": media_type(name),
        "ResponseContentDisposition": f'{shown}; filename="{name}"',
        "ResponseCacheControl": "private, no-store",
    }
    client = release.bucket.client
    return SecretStr(
        client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=expires_s)
    )
