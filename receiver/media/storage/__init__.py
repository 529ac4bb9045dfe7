"""Storage for files: a local folder, or a bucket of S3, Google Cloud Storage or Azure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from receiver.errors import SettingsError
from receiver.media.storage.base import Storage
from receiver.media.storage.local import LocalStorage

__all__ = ["LocalStorage", "Storage", "local_folder", "open_storage"]


@dataclass(frozen=True, kw_only=True)
class _Cloud:
    """A scheme: the options of its URL, the extra to install, and the variables for credentials."""

    options: frozenset[str]
    extra: str
    form: str
    credentials: str


_CLOUDS: Final[Mapping[str, _Cloud]] = {
    "s3": _Cloud(
        options=frozenset({"endpoint", "region", "checksum"}),
        extra="s3",
        form="s3://bucket/prefix?endpoint=https://host/path&region=name&checksum=none",
        credentials="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    ),
    "gs": _Cloud(
        options=frozenset({"endpoint"}),
        extra="gcs",
        form="gs://bucket/prefix?endpoint=https://host",
        credentials="GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    ),
    "az": _Cloud(
        options=frozenset({"endpoint", "account"}),
        extra="azure",
        form="az://container/prefix?account=name&endpoint=https://host",
        credentials="AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    ),
}
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/-]*")
_CHECKSUMS: Final = frozenset({None, "sha256", "none"})


def open_storage(url: str) -> Storage:
    """Return the storage that `RECEIVER_STORAGE_URL` names, without connecting or making a folder.

    `file:data/media` is relative to the working directory, `file:///srv/media` is not; `s3://bucket/prefix`,
    `gs://bucket/prefix` and `az://container/prefix` take options as a query. Raises SettingsError.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _invalid("it is not a URL") from error
    if parts.scheme == "file":
        return LocalStorage(_folder(parts))
    if cloud := _CLOUDS.get(parts.scheme):
        return _open_bucket(parts, cloud)
    raise _invalid("it must start with file:, s3://, gs:// or az://")


def local_folder(url: str) -> Path | None:
    """Return the folder that a URL names, without a look at it; None if it names a bucket."""
    return _folder(urlsplit(url)) if url.startswith("file:") else None


def _folder(parts: SplitResult) -> Path:
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path or "\0" in path:
        raise _invalid("a folder is written file:data/media or file:///srv/media")
    return Path(path)


def _open_bucket(parts: SplitResult, cloud: _Cloud) -> Storage:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if "@" in bucket:
        raise _invalid(f"credentials belong in {cloud.credentials}")
    # Azure signs links for the percent-encoded name. If a name needs encoding, its link opens no object.
    if parts.scheme == "az" and not _PLAIN.fullmatch(prefix):
        raise _invalid(
            "a prefix for Azure has ASCII letters, digits, dots, dashes, underscores and slashes only"
        )
    if not bucket or parts.fragment or not _are_valid(options, cloud):
        raise _invalid(f"a bucket is written {cloud.form}, options as needed")
    try:
        from receiver.media.storage.objects import ObjectStorage, open_store  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise SettingsError(
            f"RECEIVER_STORAGE_URL: {parts.scheme}:// needs pip install 'clipia-receiver[{cloud.extra}]'"
        ) from error
    store = open_store(parts.scheme, bucket, prefix, options, credentials=cloud.credentials)
    base = f"{parts.scheme}://{bucket}/{prefix}/" if prefix else f"{parts.scheme}://{bucket}/"
    return ObjectStorage(store, base=base, credentials=cloud.credentials)


def _are_valid(options: Mapping[str, str], cloud: _Cloud) -> bool:
    is_known = options.keys() <= cloud.options and all(options.values())
    return is_known and _is_endpoint(options.get("endpoint")) and options.get("checksum") in _CHECKSUMS


def _is_endpoint(text: str | None) -> bool:
    if text is None:
        return True
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    has_more = parts.query or parts.fragment or parts.username is not None
    return parts.scheme in {"https", "http"} and bool(parts.hostname) and not has_more


def _invalid(reason: str) -> SettingsError:
    return SettingsError(f"RECEIVER_STORAGE_URL is invalid: {reason}")
