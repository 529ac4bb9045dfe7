"""Where files are kept: a local folder, or an S3-compatible bucket."""

from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from receiver.errors import SettingsError
from receiver.media.storage.base import Storage
from receiver.media.storage.local import LocalStorage

__all__ = ["Storage", "open_storage"]


def open_storage(url: str) -> Storage:
    """Return the storage that `RECEIVER_STORAGE_URL` names; nothing is touched before its first use.

    `file:data/media` is relative to the working directory, `file:///srv/media` is not;
    `s3://bucket/prefix?endpoint=https://…&region=…`. Raises SettingsError.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _wrong("it is no URL") from error
    if parts.scheme == "file":
        return _open_local(parts)
    if parts.scheme == "s3":
        return _open_s3(parts)
    raise _wrong("it starts with neither file: nor s3://")


def _open_local(parts: SplitResult) -> Storage:
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path or "\0" in path:
        raise _wrong("a folder is written file:data/media or file:///srv/media")
    return LocalStorage(Path(path))


def _open_s3(parts: SplitResult) -> Storage:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    endpoint, region = options.pop("endpoint", None), options.pop("region", None)
    bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
    if "@" in bucket:
        raise _wrong("credentials belong in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    has_bad_endpoint = endpoint is not None and not endpoint.startswith(("https://", "http://"))
    if not bucket or parts.fragment or options or region == "" or has_bad_endpoint:
        raise _wrong(
            "a bucket is written s3://bucket/prefix?endpoint=https://host&region=name, options as needed"
        )
    try:
        from receiver.media.storage.s3 import S3Storage  # noqa: PLC0415 - needs an extra
    except ImportError as error:
        raise SettingsError("RECEIVER_STORAGE_URL: s3:// needs pip install 'clipia-receiver[s3]'") from error
    return S3Storage(bucket=bucket, prefix=prefix, endpoint=endpoint, region=region)


def _wrong(reason: str) -> SettingsError:
    return SettingsError(f"RECEIVER_STORAGE_URL cannot be used: {reason}")
