"""Types of files by their first bytes."""

import gzip
import zlib

import pytest
from support.media import NOISE, SAMPLES, box

from receiver.core.output_files import Kind
from receiver.media.file_types import SNIFF_BYTES, is_page, sniff

KINDS: tuple[Kind, ...] = ("image", "video", "audio")


@pytest.mark.parametrize("content_type", SAMPLES)
def test_knows_the_types_that_clipia_makes(content_type: str) -> None:
    """D13: type and extension follow from the bytes and the announced kind."""
    sample = SAMPLES[content_type]
    found = sniff(sample.data[:SNIFF_BYTES], sample.kind)
    assert (found.content_type, found.extension) == (content_type, sample.extension)


@pytest.mark.parametrize("content_type", SAMPLES)
def test_a_type_of_another_kind_is_not_believed(content_type: str) -> None:
    """D13: a video announced as an image is no image; only an MP4 or WebM may be both video and audio."""
    sample = SAMPLES[content_type]
    for kind in KINDS:
        found = sniff(sample.data[:SNIFF_BYTES], kind)
        is_both = kind != "image" and content_type.endswith(("/mp4", "/quicktime", "/webm"))
        assert kind == sample.kind or is_both or not found.is_known


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "data",
    [
        b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        b'<?xml version="1.0"?><svg onload="alert(1)"/>',
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b"%PDF-1.7\n" + NOISE,
        b"GIF89a/*<svg/onload=alert(1)>*/=alert(1)//;",
        b"GIF89a" + bytes(20) + b"<SCRIPT >alert(1)</script>" + b"\x3b",
        SAMPLES["image/png"].data[:60] + b"<html ><body>" + SAMPLES["image/png"].data[60:],
        SAMPLES["image/jpeg"].data[:30] + b"<?php system($_GET[0])" + SAMPLES["image/jpeg"].data[30:],
        b"ID3\x04\x00\x00\x00\x00\x00\x7f<!doctype html>" + NOISE,
        SAMPLES["video/mp4"].data[:24] + b"%PDF-1.4" + NOISE,
        b"PK\x03\x04" + NOISE,
        b"MZ" + NOISE,
        b"\x7fELF" + NOISE,
        b'{"error": "not found"}          ',
        bytes(64),
        b"BM" + NOISE,
        b"RIFF\x40\x00\x00\x00AVI " + NOISE,
        box(b"moov", NOISE),
        b"\x1a\x45\xdf\xa3\x8b\x42\x82\x88matroska" + NOISE,
        b"\xff\xe2\x00\x00" + NOISE,
        b"\xff\xfb\xf0\x00" + NOISE,
        b"\xff\xfb\x9c\x00" + NOISE,
        b"\xff\xeb\x90\x00" + NOISE,
        b"\xff\xfd\x90\x00" + NOISE,
    ],
)
def test_everything_else_is_plain_bytes(data: bytes, kind: Kind) -> None:
    """D13: pages, documents, programs, archives, polyglots and broken signatures have no known type."""
    assert not sniff(data, kind).is_known


@pytest.mark.parametrize(
    "head", [b"\xff\xfb\x90\x00", b"\xff\xf3\x84\xc4", b"\xff\xe3\x18\xc4", b"\xff\xfa\x92\x40"]
)
def test_knows_mp3_frames_of_every_version(head: bytes) -> None:
    """D13: MPEG 1, 2 and 2.5 are recognized, with and without a checksum."""
    assert sniff(head + NOISE, "audio").content_type == "audio/mpeg"


def test_still_image_brands_are_no_video() -> None:
    """D13: an HEIC or AVIF image has the box format of a movie and is not taken for one."""
    heic = box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + box(b"meta", NOISE)
    assert not sniff(heic, "video").is_known
    assert not sniff(heic, "image").is_known
    assert not sniff(SAMPLES["image/avif"].data, "video").is_known


def test_the_minor_version_is_no_brand() -> None:
    """D13: the four bytes after the main brand are a number, even if they spell a brand."""
    data = box(b"ftyp", b"isom" + b"avif" + b"iso2") + box(b"moov", NOISE)
    assert sniff(data, "video").content_type == "video/mp4"
    assert not sniff(data, "image").is_known


def test_words_in_metadata_do_no_harm() -> None:
    """D13: a prompt or a rating in an image's metadata is not taken for a page."""
    words = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF>a < b, styled as <htmlike> body</rdf:RDF></x:xmpmeta>'
    )
    data = SAMPLES["image/png"].data
    assert sniff(data[:60] + words + data[60:], "image").content_type == "image/png"


PAGES = {
    "HTML": b"<!DOCTYPE html><html><body>Not found</body></html>",
    "HTML behind blanks": b"\r\n \t<html lang='en'><svg></svg></html>",
    "HTML in Latin-1": "<html><body>p\u00e9rim\u00e9</body></html>".encode("latin-1"),
    "text in Latin-1": "Fehler: nicht verf\u00fcgbar".encode("latin-1"),
    "text in Shift-JIS": "\u30a8\u30e9\u30fc".encode("shift-jis"),
    "text that ends with a zero": b"Internal Server Error\0",
    "text in UTF-16 without a mark": "Error".encode("utf-16-le"),
    "HTML in UTF-16 without a mark": "<html><body>expired</body></html>".encode("utf-16-be"),
    "HTML in UTF-32": "<html><body>expired</body></html>".encode("utf-32"),
    "HTML in UTF-32 without a mark": "<html><body>expired</body></html>".encode("utf-32-le"),
    "HTML with a zero": b"<html><body>err\0or</body></html>",
    "JSON with a zero": b'{"error": "\0"}',
    "HTML in gzip": gzip.compress(b"<html></html>"),
    "HTML in zlib": zlib.compress(b"<html></html>"),
    "HTML behind a comment": b"<!-- <svg> --><html><body>Error 500</body></html>",
    "HTML behind an instruction": b"<?x <svg> ?><!-- --><html><body>Error 500</body></html>",
    "HTML behind a long comment": b"<!-- <svg> " + b"x" * 5000 + b" --><html></html>",
    "HTML behind entities": b"<!DOCTYPE html [<!ENTITY a '<svg>'>]><html></html>",
    "HTML in UTF-16": "<html><body>expired</body></html>".encode("utf-16"),
    "JSON": b'{"error": {"code": "not_found"}}',
    "JSON with a mark": b"\xef\xbb\xbf[]",
    "XML": b"<?xml version='1.0'?><!-- S3 --><Error><Code>AccessDenied</Code></Error>",
    "text": b"upstream timed out\n",
    "text in Chinese": "\u6587\u4ef6\u4e0d\u5b58\u5728".encode() * 400,
    "a polyglot": b"GIF89a/*<svg/onload=alert(1)>*/=alert(1)//;",
    "nothing": b"",
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_told_from_a_file(page: str) -> None:
    """D15: HTML, XML, JSON, text in any encoding and an empty body are pages, and not files."""
    head = PAGES[page][:SNIFF_BYTES]
    for kind in KINDS:
        assert is_page(head, kind, "https://media.clipia.ai/a")
        assert not sniff(head, kind).is_known
    assert is_page(head, "file", "https://media.clipia.ai/a.GLB?sig=1.txt")


@pytest.mark.parametrize("start", [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh9", b"\xfd7zXZ\0"])
def test_a_compressed_body_is_no_media(start: bytes) -> None:
    """D15: compressed bytes without Content-Encoding are no image, but an archive may start like that."""
    assert all(is_page(start + NOISE, kind, "") for kind in KINDS)
    assert not is_page(start + NOISE, "file", "https://media.clipia.ai/a.glb")


@pytest.mark.parametrize(
    "name",
    ["a.pptx", "a.pdf", "a.heic", "a.zip", "a.usdz", "a.safetensors", "a.mkv#t=1", "b/a.tiff?sig=/a.txt"],
)
def test_an_extension_may_rule_text_out(name: str) -> None:
    """D15: a text is never a document, archive, 3D model or video, even if it was announced as one."""
    for page in PAGES.values():
        assert is_page(page[:SNIFF_BYTES], "file", f"https://media.clipia.ai/{name}")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("a", "/presentation/pptx_url"),
        ("a", "/model_3d/GLB"),
        ("a", "/pdf/0/url"),
        ("a", "/files/zip#0"),
    ],
)
def test_a_name_may_rule_text_out(name: str, field: str) -> None:
    """D15: if the URL has no extension, the name of the field can announce a binary file."""
    assert is_page(PAGES["HTML"], "file", f"https://media.clipia.ai/{name}", field)


@pytest.mark.parametrize(
    ("name", "field"), [("a.json", "/model_3d/glb"), ("a", "/pdf/title"), ("a", "/model_3d")]
)
def test_an_extension_counts_before_a_name(name: str, field: str) -> None:
    """D15: an extension counts before a name, and of several names the last one counts."""
    assert not is_page(PAGES["HTML"], "file", f"https://media.clipia.ai/{name}", field)


@pytest.mark.parametrize(
    "name", ["a", "a.json", "a.svg", "a.srt", "a.obj", "a.m3u8", "glb", "a.zip/b", "?a.zip"]
)
def test_other_files_may_be_texts(name: str) -> None:
    """D15: if a file was announced as `file` only, it may be a page or a text."""
    for page in PAGES.values():
        assert not is_page(page[:SNIFF_BYTES], "file", f"https://media.clipia.ai/{name}")


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (
            b"<?xml version='1.0'?>\n<!-- drawn -->\n<!DOCTYPE svg><svg xmlns='http://www.w3.org/2000/svg'/>",
            "image",
        ),
        (b"<!DOCTYPE svg PUBLIC 'x' [ <!ENTITY a 'b'> ]>\n<svg:svg/>", "image"),
        (b"#EXTM3U\n#EXT-X-VERSION:3\nhttps://media.clipia.ai/1.ts\n", "video audio"),
        (b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'/>", "video audio"),
    ],
)
def test_a_text_may_be_a_file_of_its_kind(data: bytes, kinds: str) -> None:
    """D15: SVG is an image, and a playlist is a video or audio; in place of other kinds they are texts."""
    assert [kind for kind in KINDS if not is_page(data, kind, "")] == kinds.split()
    assert is_page(data, "file", "https://media.clipia.ai/a.glb")


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x00\x00\x0cJXL \r\n\x87\n" + bytes(40),
        b"\xff\x0a" + bytes(range(40)),
        b"\x1a\x45\xdf\xa3\x8b\x42\x82\x88matroska" + bytes(40),
        b"II*\x00" + bytes(40),
        b"MM\x00*" + bytes(40),
        box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + box(b"meta", bytes(40)),
        b"glTF\x02\x00\x00\x00" + bytes(40),
        b"PK\x03\x04\x14\x00ppt/slides/slide1.xml" + bytes(40),
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + b"1 0 obj\n" * 10,
        b"%PDF-1.4\n" + b"1 0 obj\n" * 10,
        bytes(64),
    ],
)
def test_unknown_formats_are_files(data: bytes) -> None:
    """D13: JXL, Matroska, TIFF, HEIC, GLB, PPTX and PDF are files, for any announced kind."""
    assert not any(is_page(data, kind, "https://media.clipia.ai/a.glb") for kind in (*KINDS, "file"))
    assert not any(sniff(data, kind).is_known for kind in KINDS)


@pytest.mark.parametrize("content_type", SAMPLES)
def test_known_files_are_no_pages(content_type: str) -> None:
    """D13: no file of a known type is taken for a page, and `file` takes all of these types."""
    sample = SAMPLES[content_type]
    assert not is_page(sample.data[:SNIFF_BYTES], sample.kind, "https://media.clipia.ai/a.glb")
    assert sniff(sample.data[:SNIFF_BYTES], "file").is_known
