"""Types of files by their first bytes; neither the name nor a header counts."""

import codecs
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from receiver.core.output_files import Kind, extension_of, is_never_text
from receiver.media import container_formats
from receiver.media.container_formats import Walk

# Enough for every signature below. Browsers, too, read no more when they guess a type.
SNIFF_BYTES = 4096
# No image, video or audio is smaller. Fewer bytes may be the start of any other file.
MIN_BYTES = 16


@dataclass(frozen=True)
class FileType:
    """A content type, the extension of its storage key, and the walk to its end."""

    content_type: str
    extension: str
    walk: Walk = container_formats.unchecked

    @property
    def is_known(self) -> bool:
        """Whether this is an allowed type."""
        return self.content_type != "application/octet-stream"


UNKNOWN = FileType("application/octet-stream", ".bin")
# Images of an unknown type, and files that were cut before their brands: at least their boxes must be whole.
_UNKNOWN_BOXES = replace(UNKNOWN, walk=container_formats.iso())

_Matches: TypeAlias = Callable[[bytes], bool]


def _starts(*signatures: bytes) -> _Matches:
    return lambda head: head.startswith(signatures)


def _riff(form: bytes) -> _Matches:
    return lambda head: head[:4] == b"RIFF" and head[8:12] == form


def _iso(*brands: bytes) -> _Matches:
    """Match a file type box with one of the `brands`; if none is given, one without a still image's brand."""

    def matches(head: bytes) -> bool:
        if head[4:8] != b"ftyp":
            return False
        box = head[8 : int.from_bytes(head[:4], "big")]
        found = {box[at : at + 4] for at in range(0, len(box), 4) if at != _MINOR_VERSION}
        return bool(found.intersection(brands)) if brands else found.isdisjoint(_STILL_BRANDS)

    return matches


def _mpeg_frame(head: bytes) -> bool:
    """Match the header of a layer III frame: sync, version, layer, then a valid bitrate and sampling rate."""
    bits = f"{int.from_bytes(head[:3], 'big'):024b}"
    return bool(_LAYER_3.fullmatch(bits))


def _webm(head: bytes) -> bool:
    return head.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in head[:64]


_LAYER_3 = re.compile(r"1{11}(?!01)..01.(?!0000|1111)....(?!11)....")
_MINOR_VERSION = 4
_STILL_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"crx "})
_MOVIE = container_formats.iso(b"moov", b"mdat")

# UTF-32 first: its mark starts like that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ZEROS = {
    b"\0\1\1\1": "utf-32-le",
    b"\1\1\1\0": "utf-32-be",
    b"\0\1\0\1": "utf-16-le",
    b"\1\0\1\0": "utf-16-be",
}

_TYPES: dict[Kind, list[tuple[_Matches, FileType]]] = {
    "image": [
        (_starts(b"\x89PNG\r\n\x1a\n"), FileType("image/png", ".png", container_formats.png)),
        (_starts(b"\xff\xd8\xff"), FileType("image/jpeg", ".jpg", container_formats.jpeg)),
        (_starts(b"GIF87a", b"GIF89a"), FileType("image/gif", ".gif", container_formats.gif)),
        (_riff(b"WEBP"), FileType("image/webp", ".webp", container_formats.riff)),
        (_iso(b"avif", b"avis"), FileType("image/avif", ".avif", container_formats.iso(b"meta"))),
    ],
    "video": [
        (_iso(b"qt  "), FileType("video/quicktime", ".mov", _MOVIE)),
        (_iso(), FileType("video/mp4", ".mp4", _MOVIE)),
        (_webm, FileType("video/webm", ".webm", container_formats.ebml)),
    ],
    "audio": [
        (_starts(b"ID3"), FileType("audio/mpeg", ".mp3", container_formats.mp3)),
        (_mpeg_frame, FileType("audio/mpeg", ".mp3", container_formats.mp3)),
        (_riff(b"WAVE"), FileType("audio/wav", ".wav", container_formats.riff)),
        (_starts(b"OggS"), FileType("audio/ogg", ".ogg", container_formats.ogg)),
        (_starts(b"fLaC"), FileType("audio/flac", ".flac", container_formats.flac)),
        (_starts(b"\xff\xf1", b"\xff\xf9"), FileType("audio/aac", ".aac")),
        (_iso(), FileType("audio/mp4", ".m4a", _MOVIE)),
        (_webm, FileType("audio/webm", ".weba", container_formats.ebml)),
    ],
}

KNOWN_TYPES: Final = frozenset(each.content_type for known in _TYPES.values() for _, each in known)
"""The content types of all allowed types; browsers run none of them."""

# Text that is no error page: an SVG image, a playlist, a document.
_DOCUMENTS = ("%pdf-", "%!ps")
_PLAYLIST = ((*_DOCUMENTS, "#extm3u"), {"mpd"})
_REAL_TEXTS: dict[Kind, tuple[tuple[str, ...], set[str]]] = {
    "image": (_DOCUMENTS, {"svg", "svg:svg"}),
    "video": _PLAYLIST,
    "audio": _PLAYLIST,
    "file": (_DOCUMENTS, set()),
}
"""The starts and the root elements of such texts."""
_ROOT = re.compile(r"\s*<([a-z][a-z0-9:_-]*)")
# Before the root: comments, processing instructions and the document type.
_NO_TAGS = re.compile(
    r"<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)|<!doctype[^\[>]*(?:\[.*?\])?[^>]*(?:>|\Z)", re.DOTALL
)
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f]")
_MARKUP = re.compile(r"\s*(?:<[a-z!?]|[{\[]\s*[\"{\[])", re.IGNORECASE)
# Gzip, Zstandard, zlib, bzip2 and xz: content codings of HTTP, and not media.
_ZLIB = (b"x\x01", b"x\x5e", b"x\x9c", b"x\xda")
_PACKED = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", *_ZLIB, b"BZh", b"\xfd7zXZ\0")
# A file that starts like an image and continues like a page or a document: some viewers guess the latter, and
# run its scripts.
_ACTIVE = re.compile(
    rb"<(!doctype|html|head|body|script|svg|iframe|img|object|embed|style|meta|\?php)[\s/>]|%PDF-",
    re.IGNORECASE,
)


def sniff(head: bytes, kind: Kind) -> FileType:
    """Return the type of a file announced as `kind` that starts with `head` (SNIFF_BYTES, or all of it).

    A type that this kind does not allow is not `is_known`: SVG, HTML, PDF, a video announced as an image, a
    file that can be read as two types.
    """
    if _ACTIVE.search(head):
        return UNKNOWN
    unknown = _UNKNOWN_BOXES if head[4:8] == b"ftyp" else UNKNOWN
    types = _TYPES[kind] if kind in _TYPES else [each for known in _TYPES.values() for each in known]
    return next((file_type for matches, file_type in types if matches(head)), unknown)


def is_page(head: bytes, kind: Kind, url: str, field: str | None = None) -> bool:
    """Return whether a body that starts with `head` is a page that a server sent in place of the file.

    A page is HTML, XML, JSON, plain text or an empty body. A `file` may be text, too, unless its URL or its
    `field` announces a binary format. SVG counts as an image, a playlist as video or audio, and PDF and
    PostScript as files.
    """
    if kind == "file" and not is_never_text(url, field):
        return False
    if head.startswith(_PACKED) and extension_of(url) not in {"gz", "tgz"}:
        if kind != "file":
            # The server compresses without a Content-Encoding, so these bytes are not the announced file.
            return True
        head = _unpack(head)
    text = _read_text(head)
    if text is None:
        return False
    text = text.lstrip().lower()
    root = _ROOT.match(_NO_TAGS.sub("", text))
    starts, roots = _REAL_TEXTS[kind]
    return not text.startswith(starts) and (root is None or root[1] not in roots)


def _read_text(head: bytes) -> str | None:
    """Return the start of a body as text; None if it is binary."""
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    # The start of a page is ASCII, so if there is no mark, the zeros in its first letters tell the encoding.
    zeros = bytes(byte == 0 for byte in head[:4])
    # Other encodings need no distinction: only ASCII matters below. The end may cut a letter in two.
    decoder = codecs.getincrementaldecoder(encoding or _ZEROS.get(zeros, "utf-8"))("replace")
    text = decoder.decode(head)
    # A page may have a stray control character; no image, video or audio starts with a tag.
    if _MARKUP.match(text):
        return text
    return None if _CONTROLS.search(text.removesuffix("\0")) else text


def _unpack(head: bytes) -> bytes:
    try:
        # Gzip or zlib.
        return zlib.decompressobj(wbits=47).decompress(head, SNIFF_BYTES)
    except zlib.error:
        return head
