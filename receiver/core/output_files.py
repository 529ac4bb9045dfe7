"""The files of a generation: every URL in its output, which of them are fetched, and why the others are not.

Pure. Clipia documents `images`, `video`, `audio` and `audios`; other models put files elsewhere (`videos`,
`model_3d`, previews of a presentation, a cover inside of `audio`), so the whole output is searched.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Literal, NamedTuple, TypeGuard

Kind = Literal["image", "video", "audio", "file"]
"""What a file was announced as; `file` is anything."""
Variant = Literal["original", "display"]

MAX_FILES: Final = 512
"""Files of one event that are fetched, unless a setting says otherwise."""
MAX_URL_LENGTH: Final = 8192
MAX_SKIPPED: Final = 1536
"""Files of one event that are listed without being fetched. The others are counted."""

_KNOWN: Final[tuple[tuple[str, Kind], ...]] = (
    ("images", "image"),
    ("video", "video"),
    ("audio", "audio"),
    ("audios", "audio"),
)
_PLACES: Final = frozenset(name for name, _ in _KNOWN)
_NAMES: Final = ("original_url", "url")
_WEB: Final = re.compile(r"https?://", re.IGNORECASE)
# What text has around a URL: blanks of all kinds, a byte order mark, quotes and angle brackets.
_AROUND: Final = " \t\r\n\v\f\u00a0\u200b\ufeff<>\"'`"
# One more URL in the same text, as against one within a path or a query.
_ANOTHER: Final = re.compile(r"[\s\ufeff<>\"'`(\[,;|]https?://", re.IGNORECASE)
_GAP: Final = re.compile(r"[\s\ufeff<>\"`]")
# A URL with a path within a text. It ends at blanks, quotes, angle brackets, a backslash, a bracket that it
# did not open, and a comma that a blank or another URL follows.
_EMBEDDED: Final = re.compile(
    r"https?://[^\s\ufeff<>\"'`()\[\]\\,;|/?#]+/"
    r"(?:[^\s\ufeff<>\"'`()\[\]\\,;|]|\([^\s\ufeff<>\"'`()\[\]\\]*\)|[,;|](?!\s|https?://|\Z))+",
    re.IGNORECASE,
)
# What may end a URL in the text of HTML that is escaped.
_ENTITY: Final = re.compile(r"&(?:quot|apos|lt|gt|nbsp|#3[49]);", re.IGNORECASE)
_HOST_ONLY: Final = re.compile(r"https?://[^/]*/?", re.IGNORECASE)
_PUNCTUATION: Final = ".,:;!?*}"
_OTHER_ORIGIN: Final = frozenset({"host", "scheme", "port"})
# Extensions of files that are never text, of the kind `file`.
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
# An undocumented file is announced by the extension in its URL, or by the name that it stands under.
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
    """Why a file is not fetched."""

    reason: str
    """A short fixed word, fit for a metric's label."""
    words: str


@dataclass(frozen=True, kw_only=True)
class FileRules:
    """Which files of an event are fetched."""

    refuse: Callable[[str], Skip | None] = lambda _url: None
    """Says why a URL must not be requested; None if it may be."""
    max_files: int = MAX_FILES
    max_url_length: int = MAX_URL_LENGTH


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """One file; (`position`, `variant`) is unique within its event, and so is `field`."""

    position: int  # counts the listed files from 0; the two variants of one share it
    kind: Kind
    variant: Variant
    url: str  # of one that is too long, the beginning
    # Where in `output` the URL stands: "images[0].original_url", "/model_3d/glb"; "/text#1" is the second URL
    # within a text, and "/files/x#key0" the first one within a key.
    field: str
    skip: Skip | None = None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of an output, each distinct URL once."""

    files: tuple[MediaRef, ...]
    left_out: int
    """URLs beyond `MAX_SKIPPED`, which are not listed."""


def list_files(output: Any, rules: FileRules) -> Listing:
    """Return every file of an output, in an order that no order of keys changes.

    What is documented comes first, and is listed even if it is no URL; elsewhere each text that is an http or
    https URL as a whole is a file. In other texts and in keys of objects the URLs with an allowed origin are.
    """
    collector = _Collector(rules)
    for file in chain(_documented(output), _others(output)):
        collector.add(file)
    return collector.listing()


def extension_of(url: str) -> str:
    """Return the extension of a URL's path, without the dot and in small letters; empty if it has none."""
    extension = _EXTENSION.search(url)
    return extension[1].lower() if extension else ""


def rules_text_out(url: str, field: str | None) -> bool:
    """Whether a file of the kind `file` is announced as one that is never text.

    That does the extension in its URL; without one, the name that it stands under, such as `pptx_url`.
    """
    extension = extension_of(url)
    names = [name for name in re.split(r"[/.\[\]#]+", field or "") if name and not name.isdigit()]
    name = next((name for name in reversed(names) if name not in _NAMES), "")
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
            return Skip("scheme", "it is no http or https URL")
        if len(url) > most:
            return Skip("length", f"the URL has {len(url)} characters, more than {most}")
        if skip := self._rules.refuse(url):
            return skip
        if self._fetched >= self._rules.max_files:
            return Skip("count", f"the event has more than {self._rules.max_files} files")
        return None

    def listing(self) -> Listing:
        """Return what was added; the last file that is skipped tells of those that are not listed."""
        if self._left_out:
            at = max(number for number, ref in enumerate(self._files) if ref.skip)
            skip = self._files[at].skip or Skip("count", "")
            words = f"{skip.words}; {self._left_out} further URLs are not listed"
            self._files[at] = replace(self._files[at], skip=skip._replace(words=words))
        return Listing(files=tuple(self._files), left_out=self._left_out)


class _File(NamedTuple):
    kind: Kind
    urls: list[tuple[str, str]]
    """The field and the URL of each variant."""
    is_link: bool = False
    """Whether it is from a text, which may link to anything: of foreign origins nothing is a file."""


def _documented(output: Any) -> Iterator[_File]:
    """Yield what stands where files are documented, with the fields' usual names.

    A list where one object is documented, or the reverse, is read as what it is, and a text as the URL.
    """
    for name, kind in _KNOWN:
        value = output.get(name) if isinstance(output, dict) else None
        entries = (
            [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]
            if isinstance(value, list)
            else [(name, value)]
        )
        for path, entry in entries:
            if isinstance(entry, dict):
                places = [(f"{path}.{key}", text) for key in _NAMES if _is_text(text := entry.get(key))]
            else:
                places = [(path, entry)] if _is_text(entry) else []
            several = {place: found for place, text in places if (found := _several(place, text))}
            yield _File(kind, [(place, _one(text) or text) for place, text in places if place not in several])
            for each in chain.from_iterable(several.values()):
                yield _File(kind, [each])


def _others(output: Any) -> Iterator[_File]:
    """Yield every URL with its JSON pointer; one object's `original_url` and `url` are one file."""
    waiting: list[tuple[str, str, Any]] = [("", "", output)]
    while waiting:
        pointer, name, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{pointer}/{index}", name, each) for index, each in enumerate(value)][::-1]
        elif isinstance(value, dict):
            texts = [(f"{pointer}/{key}", text) for key in _NAMES if _is_text(text := value.get(key))]
            pair = [(place, url) for place, text in texts if (url := _one(text))]
            if pair:
                yield _File(_kind(pair[0][1], name), pair)
            for each in chain.from_iterable(_several(place, text) for place, text in texts):
                yield _File(_kind(each[1], name), [each])
            members = [
                (f"{pointer}/{_escape(key)}", name if key in _NAMES else key, each)
                for key, each in sorted(value.items())
                if key not in _NAMES or not _is_text(each)
            ]
            for key in sorted(value):
                yield from _links(f"{pointer}/{_escape(key)}#key", name, key)
            waiting += members[::-1]
        elif _is_text(value):
            url = _one(value, is_place=name in _PLACES)
            yield from (
                [_File(_kind(url, name), [(pointer, url)])] if url else _links(f"{pointer}#", name, value)
            )


def _links(field: str, name: str, text: str) -> Iterator[_File]:
    for each in _within(field, text):
        yield _File(_kind(each[1], name), [each], is_link=True)


def _one(text: str, *, is_place: bool = True) -> str | None:
    """Return the URL that a text is as a whole, without what is around it; None if it is none, or several.

    Blanks belong to a URL in a place for one, and elsewhere if only its end has an extension. They never do
    behind the extension of a file: that is a caption.
    """
    url = text.strip(_AROUND)
    if not _WEB.match(url) or _ANOTHER.search(url):
        return None
    gap = _GAP.search(url)
    if gap is None:
        return url
    start = extension_of(url[: gap.start()])
    is_caption = start in BINARY or start in _KIND_OF
    return url if not is_caption and (is_place or extension_of(url)) else None


def _several(place: str, text: str) -> list[tuple[str, str]]:
    """Return the URLs of a text that should be one, and is not."""
    return [] if _one(text) else _within(f"{place}#", text)


def _within(field: str, text: str) -> list[tuple[str, str]]:
    """Return the URLs within a text, each with a field that starts with `field`."""
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
