"""The files of a generation: every URL in its output, which of them are fetched, and why the others are not.

Pure. Clipia documents `images`, `video`, `audio` and `audios`; other models put files elsewhere (`videos`,
`model_3d`, previews of a presentation, a cover inside of `audio`), so the whole output is searched.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
_NAMES: Final = ("original_url", "url")
_WEB: Final = re.compile(r"\s*https?://", re.IGNORECASE)
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
    field: str  # where in `output` the URL stands, such as "images[0].original_url" or "/model_3d/glb"
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
    https URL as a whole is a file.
    """
    collector = _Collector(rules)
    for kind, urls in _documented(output):
        collector.add(kind, urls)
    for kind, urls in _others(output):
        collector.add(kind, urls)
    return collector.listing()


def extension_of(url: str) -> str:
    """Return the extension of a URL's path, without the dot and in small letters; empty if it has none."""
    extension = _EXTENSION.search(url)
    return extension[1].lower() if extension else ""


class _Collector:
    def __init__(self, rules: FileRules) -> None:
        self._rules = rules
        self._files: list[MediaRef] = []
        self._seen: set[str] = set()
        self._fetched = self._skipped = self._left_out = 0

    def add(self, kind: Kind, urls: Sequence[tuple[str, str]]) -> None:
        """Add the variants of one file, the best one first: the field and URL of each."""
        position = self._files[-1].position + 1 if self._files else 0
        variants: tuple[Variant, ...] = ("original", "display")
        for variant, (field, url) in zip(variants, urls, strict=False):
            if url in self._seen:
                continue
            self._seen.add(url)
            skip = self._skip(url)
            if skip is None:
                self._fetched += 1
            elif self._skipped < MAX_SKIPPED:
                self._skipped += 1
            else:
                self._left_out += 1
                continue
            shown = url[: self._rules.max_url_length]
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


_File = tuple[Kind, list[tuple[str, str]]]


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
                yield kind, [(f"{path}.{key}", url) for key in _NAMES if _is_text(url := entry.get(key))]
            elif _is_text(entry):
                yield kind, [(path, entry)]


def _others(output: Any) -> Iterator[_File]:
    """Yield every URL with its JSON pointer; one object's `original_url` and `url` are one file."""
    waiting: list[tuple[str, str, Any]] = [("", "", output)]
    while waiting:
        pointer, name, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{pointer}/{index}", name, each) for index, each in enumerate(value)][::-1]
        elif isinstance(value, dict):
            pair = [(f"{pointer}/{key}", url) for key in _NAMES if _is_url(url := value.get(key))]
            if pair:
                yield _kind(pair[0][1], name), pair
            members = [
                (f"{pointer}/{_escape(key)}", name if key in _NAMES else key, each)
                for key, each in sorted(value.items())
                if key not in _NAMES or not _is_text(each)
            ]
            waiting += members[::-1]
        elif _is_url(value):
            yield _kind(value, name), [(pointer, value)]


def _kind(url: str, name: str) -> Kind:
    return _KIND_OF.get(extension_of(url)) or _KIND_OF.get(name.lower(), "file")


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)


def _is_url(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and _WEB.match(value) is not None
