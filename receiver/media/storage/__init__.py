"""Where files are kept: a local folder, or a bucket of S3, Google Cloud Storage or Azure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from receiver.errors import SettingsError
from receiver.media.storage.base import Storage
from receiver.media.storage.local import LocalStorage

__all__ = ["Storage", "open_storage"]


@dataclass(frozen=True, kw_only=True)
class _Cloud:
    """A scheme: the options that its URL may have, the extra that it needs, and where credentials belong."""

    options: frozenset[str]
    extra: str
    form: str
    credentials: str


_CLOUDS: Final[Mapping[str, _Cloud]] = MappingProxyType(
    {
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
)
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/-]*")
_CHECKSUMS: Final = frozenset({None, "sha256", "none"})


def open_storage(url: str) -> Storage:
    """Return the storage that `RECEIVER_STORAGE_URL` names; nothing is touched before its first use.

    `file:data/media` is relative to the working directory, `file:///srv/media` is not; `s3://bucket/prefix`,
    `gs://bucket/prefix` and `az://container/prefix` take options as a query. Raises SettingsError.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _wrong("it is no URL") from error
    if parts.scheme == "file":
        return _open_local(parts)
    if cloud := _CLOUDS.get(parts.scheme):
        return _open_bucket(parts, cloud)
    raise _wrong("it starts with none of file:, s3://, gs:// and az://")


def _open_local(parts: SplitResult) -> Storage:
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path or "\0" in path:
        raise _wrong("a folder is written file:data/media or file:///srv/media")
    return LocalStorage(Path(path))


def _open_bucket(parts: SplitResult, cloud: _Cloud) -> Storage:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if "@" in bucket:
        raise _wrong(f"credentials belong in {cloud.credentials}")
    is_right = bucket and not parts.fragment and options.keys() <= cloud.options and all(options.values())
    # Azure's links are signed for the name with its escapes, and fit no object whose name needs some.
    if parts.scheme == "az" and not _PLAIN.fullmatch(prefix):
        raise _wrong(
            "a prefix for Azure has ASCII letters, digits, dots, dashes, underscores and slashes only"
        )
    if not is_right or not _is_endpoint(options.get("endpoint")) or options.get("checksum") not in _CHECKSUMS:
        raise _wrong(f"a bucket is written {cloud.form}, options as needed")
    try:
        from receiver.media.storage.objects import ObjectStorage, open_store  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise SettingsError(
            f"RECEIVER_STORAGE_URL: {parts.scheme}:// needs pip install 'clipia-receiver[{cloud.extra}]'"
        ) from error
    store = open_store(parts.scheme, bucket, prefix, options, credentials=cloud.credentials)
    base = f"{parts.scheme}://{bucket}/{prefix}/" if prefix else f"{parts.scheme}://{bucket}/"
    return ObjectStorage(store, base=base, credentials=cloud.credentials)


def _is_endpoint(text: str | None) -> bool:
    if text is None:
        return True
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    has_more = parts.query or parts.fragment or parts.username is not None
    return parts.scheme in {"https", "http"} and bool(parts.hostname) and not has_more


def _wrong(reason: str) -> SettingsError:
    return SettingsError(f"RECEIVER_STORAGE_URL cannot be used: {reason}")
