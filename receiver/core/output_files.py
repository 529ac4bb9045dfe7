"""Lists the files of a generation: all URLs in its output, and which of them are downloaded; pure.

Clipia documents `images`, `video`, `audio` and `audios`. Some models put files elsewhere (`videos`,
`model_3d`, previews of a presentation, a cover inside of `audio`), so the whole output is searched.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Literal, NamedTuple, TypeGuard

Kind = Literal["image", "video", "audio", "file"]
"""The announced kind of a file; `file` is any other."""
Variant = Literal["original", "display"]

MAX_FILES: Final = 512
"""Downloaded files per event, by default."""
MAX_URL_LENGTH: Final = 8192
MAX_SKIPPED: Final = 1536
"""Files per event that are listed but not downloaded. If there are more, they are only counted."""

_DOCUMENTED: Final[dict[str, Kind]] = {
    "images": "image",
    "video": "video",
    "audio": "audio",
    "audios": "audio",
}
_URL_KEYS: Final = ("original_url", "url")
_WEB: Final = re.compile(r"https?://", re.IGNORECASE)
# Stripped from both ends of a URL: white space, a byte order mark, quotes and angle brackets.
_AROUND: Final = " \t\r\n\v\f\u00a0\u200b\ufeff<>\"'`"
# A second URL in the same text. A URL inside a path or a query does not match.
_ANOTHER: Final = re.compile(r"[\s\ufeff<>\"'`(\[,;|]https?://", re.IGNORECASE)
_GAP: Final = re.compile(r"[\s\ufeff<>\"`]")
# A URL with a path inside a text. It ends at white space, quotes, angle brackets, a backslash, an unmatched
# closing bracket, and at a comma if white space or another URL follows.
_EMBEDDED: Final = re.compile(
    r"https?://[^\s\ufeff<>\"'`()\[\]\\,;|/?#]+/"
    r"(?:[^\s\ufeff<>\"'`()\[\]\\,;|]|\([^\s\ufeff<>\"'`()\[\]\\]*\)|[,;|](?!\s|https?://|\Z))+",
    re.IGNORECASE,
)
# Entities that end a URL in escaped HTML.
_ENTITY: Final = re.compile(r"&(?:quot|apos|lt|gt|nbsp|#3[49]);", re.IGNORECASE)
_HOST_ONLY: Final = re.compile(r"https?://[^/]*/?", re.IGNORECASE)
_PUNCTUATION: Final = ".,:;!?*}"
_OTHER_ORIGIN: Final = frozenset({"host", "scheme", "port"})
# Extensions of the kind `file` that are never text.
BINARY: Final = {
    *("avi", "flv", "m2ts", "m4v", "mkv", "mpeg", "mpg", "wmv", "3gp", "3gpp"),
    *("aif", "aiff", "m4b", "mid", "midi", "opus", "wma"),
    *("bmp", "exr", "heic", "heif", "ico", "jp2", "jxl", "ktx2", "psd", "tga", "tif", "tiff"),
    *("blend", "glb", "spz", "usdc", "usdz", "3mf"),
    *("docx", "epub", "odp", "ods", "odt", "pdf", "ppt", "pptx", "xlsx"),
    *("bz2", "gz", "rar", "tar", "tgz", "xz", "zip", "zst", "7z"),
    *("npy", "npz", "onnx", "parquet", "safetensors", "wasm"),
    *("otf", "ttf", "woff", "woff2"),
}
# An undocumented file has the kind of its extension, or else of the key above it.
_EXTENSION: Final = re.compile(r"/[^/?#]*\.([a-z0-9]{2,12})\s*(?:[?#]|\Z)", re.IGNORECASE)
_KIND_OF: Final[dict[str, Kind]] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "gif", "webp", "avif"), "image"),
    **dict.fromkeys(("mp4", "mov", "webm"), "video"),
    **dict.fromkeys(("mp3", "wav", "ogg", "flac", "aac", "m4a"), "audio"),
    **dict.fromkeys(("image", "images", "cover", "thumbnail", "thumbnails", "poster"), "image"),
    **dict.fromkeys(("video", "videos"), "video"),
    **dict.fromkeys(("audio", "audios"), "audio"),
}


class Skip(NamedTuple):
    """The reason why a file is not downloaded."""

    reason: str
    """A short fixed word: the label of a metric."""
    message: str


@dataclass(frozen=True, kw_only=True)
class FileRules:
    """Decides which files of an event are downloaded."""

    skip_reason: Callable[[str], Skip | None] = lambda _url: None
    """Returns the reason if a URL must not be requested, else None."""
    max_files: int = MAX_FILES
    max_url_length: int = MAX_URL_LENGTH


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """One file. Within an event (`position`, `variant`) is unique, and `field` is too."""

    position: int  # counts the listed files from 0; both variants of a file have the same
    kind: Kind
    variant: Variant
    url: str  # cut if it is too long
    # The place of the URL in `output`: "images[0].original_url" or "/model_3d/glb". "/text#1" is the second
    # URL inside a text, "/files/x#key0" the first one inside a key.
    field: str
    skip: Skip | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of an output, each distinct URL once."""

    files: tuple[MediaRef, ...]
    left_out: int
    """Number of URLs beyond `MAX_SKIPPED`."""


def list_files(output: Any, rules: FileRules) -> Listing:
    """Return all files of an output. The order does not depend on the order of keys.

    Documented files come first, and are listed even if their text is not a URL. Elsewhere a text is a file if
    the whole of it is an http or https URL. Inside other texts and keys, URLs of allowed origins are files.
    """
    collector = _Collector(rules)
    for file in chain(_documented(output), _others(output)):
        collector.add(file)
    return collector.listing()


def extension_of(url: str) -> str:
    """Return the extension of a URL's path in lower case and without the dot; empty if it has none."""
    extension = _EXTENSION.search(url)
    return extension[1].lower() if extension else ""


def is_never_text(url: str, field: str | None) -> bool:
    """Tell whether a file of the kind `file` cannot be text.

    The extension of its URL decides. If there is none, the key above it does, such as `pptx_url`.
    """
    extension = extension_of(url)
    names = [name for name in re.split(r"[/.\[\]#]+", field or "") if name and not name.isdigit()]
    name = next((name for name in reversed(names) if name not in _URL_KEYS), "")
    return extension in BINARY or (not extension and not BINARY.isdisjoint(name.lower().split("_")))


class _Collector:
    def __init__(self, rules: FileRules) -> None:
        self._rules = rules
        self._files: list[MediaRef] = []
        self._seen: set[str] = set()
        self._fetched = self._skipped = self._left_out = 0

    def add(self, file: "_File") -> None:
        """Add the variants of one file, the best one first."""
        position = self._files[-1].position + 1 if self._files else 0
        variants: tuple[Variant, ...] = ("original", "display")
        for variant, (field, url) in zip(variants, file.urls, strict=False):
            if url in self._seen:
                continue
            skip = self._skip(url)
            if file.is_link and skip is not None and skip.reason in _OTHER_ORIGIN:
                continue
            self._seen.add(url)
            if skip is None:
                self._fetched += 1
            elif self._skipped < MAX_SKIPPED:
                self._skipped += 1
            else:
                self._left_out += 1
                continue
            shown = url[: self._rules.max_url_length]
            kind = file.kind
            ref = MediaRef(position=position, kind=kind, variant=variant, url=shown, field=field, skip=skip)
            self._files.append(ref)

    def _skip(self, url: str) -> Skip | None:
        most = self._rules.max_url_length
        if not _WEB.match(url):
            return Skip("scheme", "it is not an http or https URL")
        if len(url) > most:
            return Skip("length", f"the URL has {len(url)} characters, more than {most}")
        if skip := self._rules.skip_reason(url):
            return skip
        if self._fetched >= self._rules.max_files:
            return Skip("count", f"the event has more than {self._rules.max_files} files")
        return None

    def listing(self) -> Listing:
        """Return the files that were added. The last skipped one also reports how many are not listed."""
        if self._left_out:
            at = max(number for number, ref in enumerate(self._files) if ref.skip)
            skip = self._files[at].skip or Skip("count", "")
            message = f"{skip.message}; {self._left_out} further URLs are not listed"
            self._files[at] = replace(self._files[at], skip=skip._replace(message=message))
        return Listing(files=tuple(self._files), left_out=self._left_out)


class _File(NamedTuple):
    kind: Kind
    urls: list[tuple[str, str]]
    """The field and the URL of each variant."""
    is_link: bool = False
    """Whether it was found inside a text. A text may link to any page, so foreign origins are ignored."""


def _documented(output: Any) -> Iterator[_File]:
    """Yield the files in the documented fields.

    If a field holds a list instead of one object, or the reverse, or just the URL, it is read anyway.
    """
    for name, kind in _DOCUMENTED.items() if isinstance(output, dict) else ():
        if name not in output:
            continue
        for field, entry in _entries(name, output.get(name)):
            texts = _url_texts(f"{field}.", entry) if isinstance(entry, dict) else [(field, entry)]
            yield from _documented_files(kind, [(place, text) for place, text in texts if _is_text(text)])


def _entries(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
    return [(name, value)]


def _documented_files(kind: Kind, texts: list[tuple[str, str]]) -> Iterator[_File]:
    several = {place: found for place, text in texts if (found := _several(place, text))}
    yield _File(kind, [(place, _one(text) or text) for place, text in texts if place not in several])
    for url in chain.from_iterable(several.values()):
        yield _File(kind, [url])


def _others(output: Any) -> Iterator[_File]:
    """Yield all URLs, each with its JSON pointer."""
    # Not recursive: output may be nested more deeply than Python can recurse.
    waiting: list[tuple[str, str, Any]] = [("", "", output)]
    while waiting:
        pointer, name, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{pointer}/{index}", name, each) for index, each in enumerate(value)][::-1]
        elif isinstance(value, dict):
            yield from _files_of_object(pointer, name, value)
            waiting += _members(pointer, name, value)[::-1]
        elif _is_text(value):
            yield from _files_of_text(pointer, name, value)


def _files_of_object(pointer: str, name: str, value: dict[str, Any]) -> Iterator[_File]:
    """Yield the object's own URLs and those inside its keys; `original_url` and `url` are one file."""
    texts = _url_texts(f"{pointer}/", value)
    variants = [(place, url) for place, text in texts if (url := _one(text))]
    if variants:
        yield _File(_kind(variants[0][1], name), variants)
    for each in chain.from_iterable(_several(place, text) for place, text in texts):
        yield _File(_kind(each[1], name), [each])
    for key in sorted(value):
        yield from _links(f"{pointer}/{_escape(key)}#key", name, key)


def _members(pointer: str, name: str, value: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """Return the other members of an object, by key."""
    return [
        (f"{pointer}/{_escape(key)}", name if key in _URL_KEYS else key, each)
        for key, each in sorted(value.items())
        if key not in _URL_KEYS or not _is_text(each)
    ]


def _files_of_text(pointer: str, name: str, text: str) -> Iterator[_File]:
    url = _one(text, is_file_field=name in _DOCUMENTED)
    if url:
        yield _File(_kind(url, name), [(pointer, url)])
    else:
        yield from _links(f"{pointer}#", name, text)


def _url_texts(prefix: str, value: dict[str, Any]) -> list[tuple[str, str]]:
    return [(f"{prefix}{key}", text) for key in _URL_KEYS if _is_text(text := value.get(key))]


def _links(field: str, name: str, text: str) -> Iterator[_File]:
    for each in _within(field, text):
        yield _File(_kind(each[1], name), [each], is_link=True)


def _one(text: str, *, is_file_field: bool = True) -> str | None:
    """Return the URL if a text is exactly one, stripped; else None.

    A URL may contain white space if it is in a field for files, or if its end has an extension. If white
    space follows the extension of a file, the rest is a caption, and the text is not a URL.
    """
    url = text.strip(_AROUND)
    if not _WEB.match(url) or _ANOTHER.search(url):
        return None
    gap = _GAP.search(url)
    if gap is None:
        return url
    start = extension_of(url[: gap.start()])
    is_caption = start in BINARY or start in _KIND_OF
    return url if not is_caption and (is_file_field or extension_of(url)) else None


def _several(place: str, text: str) -> list[tuple[str, str]]:
    """Return the URLs inside a text, unless the text is itself one."""
    return [] if _one(text) else _within(f"{place}#", text)


def _within(field: str, text: str) -> list[tuple[str, str]]:
    """Return the URLs inside a text. Their fields are `field` and a number."""
    if "://" not in text:
        return []
    found = (_ENTITY.split(each[0], 1)[0].replace("&amp;", "&") for each in _EMBEDDED.finditer(text))
    urls = (each.rstrip(_PUNCTUATION) for each in found)
    return [(f"{field}{number}", url) for number, url in enumerate(urls) if not _HOST_ONLY.fullmatch(url)]


def _kind(url: str, name: str) -> Kind:
    return _KIND_OF.get(extension_of(url)) or _KIND_OF.get(name.lower(), "file")


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)
