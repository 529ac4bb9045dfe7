"""The files of an output: their order, their fields, and the reason if they are not downloaded."""

from typing import Any

import pytest

from receiver.core.output_files import MAX_SKIPPED, FileRules, Listing, list_files
from receiver.media import MediaHosts

CDN = "https://media.clipia.ai"
RULES = FileRules(skip_reason=MediaHosts.parse(["media.clipia.ai"]).skip_reason)


def at(*names: str) -> list[str]:
    """Return URLs of the CDN."""
    return [f"{CDN}/{name}" for name in names]


def with_urls(value: Any) -> Any:
    """Replace each text of one letter by a URL of the CDN."""
    if isinstance(value, dict):
        return {key: with_urls(each) for key, each in value.items()}
    if isinstance(value, list):
        return [with_urls(each) for each in value]
    return f"{CDN}/{value}" if isinstance(value, str) and len(value) == 1 else value


def rows(output: Any) -> list[tuple[int, str, str, str, str]]:
    """List the files of an output, one row each; URLs without their origin."""
    listing = list_files(output, RULES)
    assert listing.left_out == 0
    return [
        (ref.position, ref.kind, ref.variant, ref.url.removeprefix(f"{CDN}/"), ref.field)
        for ref in listing.files
    ]


DOCUMENTED: list[tuple[Any, list[tuple[int, str, str, str, str]]]] = [
    ({"images": [{"url": "a"}]}, [(0, "image", "original", "a", "images[0].url")]),
    ({"images": [{"original_url": "a"}]}, [(0, "image", "original", "a", "images[0].original_url")]),
    (
        {"images": [{"url": "a"}, {"url": "b", "original_url": "B"}]},
        [
            (0, "image", "original", "a", "images[0].url"),
            (1, "image", "original", "B", "images[1].original_url"),
            (1, "image", "display", "b", "images[1].url"),
        ],
    ),
    (
        {"video": {"url": "v", "original_url": "V", "duration": 8}},
        [(0, "video", "original", "V", "video.original_url"), (0, "video", "display", "v", "video.url")],
    ),
    ({"audio": {"url": "s", "format": "mp3"}}, [(0, "audio", "original", "s", "audio.url")]),
    (
        {"audio": {"url": "s"}, "audios": [{"url": "s"}, {"url": "t"}]},
        [(0, "audio", "original", "s", "audio.url"), (1, "audio", "original", "t", "audios[1].url")],
    ),
    (
        {"audios": [{"url": "s"}], "audio": {"url": "a"}, "video": {"url": "v"}, "images": [{"url": "i"}]},
        [
            (0, "image", "original", "i", "images[0].url"),
            (1, "video", "original", "v", "video.url"),
            (2, "audio", "original", "a", "audio.url"),
            (3, "audio", "original", "s", "audios[0].url"),
        ],
    ),
    # If one URL has both names, or two files share it, it is downloaded once.
    ({"video": {"url": "v", "original_url": "v"}}, [(0, "video", "original", "v", "video.original_url")]),
    (
        {"images": [{"url": "a", "original_url": "A"}, {"url": "b", "original_url": "A"}]},
        [
            (0, "image", "original", "A", "images[0].original_url"),
            (0, "image", "display", "a", "images[0].url"),
            (1, "image", "display", "b", "images[1].url"),
        ],
    ),
    # Null and values that are not text count as absent; if `url` is alone, it is the best variant.
    ({"video": {"url": "v", "original_url": None}}, [(0, "video", "original", "v", "video.url")]),
    ({"video": {"url": "v", "original_url": 7}}, [(0, "video", "original", "v", "video.url")]),
    ({"video": {"url": "v", "original_url": ""}}, [(0, "video", "original", "v", "video.url")]),
    ({"images": None, "video": None, "audio": None, "audios": [None]}, []),
    ({"images": {"url": "u"}}, [(0, "image", "original", "u", "images.url")]),
    (
        {"video": [{"url": "u"}, {"url": "w"}]},
        [(0, "video", "original", "u", "video[0].url"), (1, "video", "original", "w", "video[1].url")],
    ),
    ({"images": ["a", {"url": "b"}]}, [
        (0, "image", "original", "a", "images[0]"), (1, "image", "original", "b", "images[1].url")
    ]),
    ({"audio": "s"}, [(0, "audio", "original", "s", "audio")]),
]  # fmt: skip

ELSEWHERE: list[tuple[Any, list[tuple[int, str, str, str, str]]]] = [
    ({"image": {"url": "a"}}, [(0, "image", "original", "a", "/image/url")]),
    (
        {"videos": [{"url": "v", "original_url": "V"}, "w"]},
        [
            (0, "video", "original", "V", "/videos/0/original_url"),
            (0, "video", "display", "v", "/videos/0/url"),
            (1, "video", "original", "w", "/videos/1"),
        ],
    ),
    (
        {"model_3d": {"glb": "g", "textures": ["t", ["u"]]}},
        [
            (0, "file", "original", "g", "/model_3d/glb"),
            (1, "file", "original", "t", "/model_3d/textures/0"),
            (2, "file", "original", "u", "/model_3d/textures/1/0"),
        ],
    ),
    (
        {"file": "f", "files": ["e"]},
        [(0, "file", "original", "f", "/file"), (1, "file", "original", "e", "/files/0")],
    ),
    (
        {"presentation": {"pptx_url": "p", "pdf": "d", "previews": [{"url": "a"}]}},
        [
            (0, "file", "original", "d", "/presentation/pdf"),
            (1, "file", "original", "p", "/presentation/pptx_url"),
            (2, "file", "original", "a", "/presentation/previews/0/url"),
        ],
    ),
    (
        {"audio": {"url": "s", "cover": "c"}, "video": {"url": "v", "thumbnail": {"url": "t"}}},
        [
            (0, "video", "original", "v", "video.url"),
            (1, "audio", "original", "s", "audio.url"),
            (2, "image", "original", "c", "/audio/cover"),
            (3, "image", "original", "t", "/video/thumbnail/url"),
        ],
    ),
    ({"images": [[{"url": "a"}], [["b"]]]}, [
        (0, "image", "original", "a", "/images/0/0/url"), (1, "image", "original", "b", "/images/1/0/0")
    ]),
    ({"a/b~c": {"": "x"}}, [(0, "file", "original", "x", "/a~1b~0c/")]),
    ("x", [(0, "file", "original", "x", "")]),
    (
        [{"url": "x"}, 7, None, "y"],
        [(0, "file", "original", "x", "/0/url"), (1, "file", "original", "y", "/3")],
    ),
    ({"url": ["x"], "n": 1.5, "b": True}, [(0, "file", "original", "x", "/url/0")]),
]  # fmt: skip


@pytest.mark.parametrize(("output", "expected"), [*DOCUMENTED, *ELSEWHERE])
def test_every_url_is_a_file(output: Any, expected: list[tuple[int, str, str, str, str]]) -> None:
    """B10: each URL is listed once, the documented ones first, in an order that is independent of keys."""
    given = with_urls(output)
    assert rows(given) == expected
    if isinstance(given, dict):
        assert rows(dict(reversed(given.items()))) == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.PNG", "image"),
        ("a.jpeg?sig=x.mp4", "image"),
        ("a.webm#t=1", "video"),
        ("a.m4a", "audio"),
        ("a.glb", "file"),
        ("a.b/c", "file"),
        ("", "file"),
    ],
)
def test_an_extension_announces_a_kind(name: str, kind: str) -> None:
    """B10: an undocumented file has the kind of its URL's extension."""
    assert [row[1] for row in rows({"result": f"{CDN}/{name}"})] == [kind]


def skips(output: Any, rules: FileRules = RULES) -> list[tuple[str, str | None]]:
    """List the fields of an output, each with the reason if it is not downloaded."""
    return [(ref.field, ref.skip and ref.skip.reason) for ref in list_files(output, rules).files]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://cdn.example.com/a.png", "host"),
        ("http://media.clipia.ai/a.png", "scheme"),
        ("https://media.clipia.ai:8443/a.png", "port"),
        ("https://user:secret@media.clipia.ai/a.png", "userinfo"),
        ("https://evil.example\\@media.clipia.ai/a.png", "url"),
        (f"{CDN}/" + "x" * 8192, "length"),
        (f"{CDN}/" + "x" * 8168, None),
        (f" {CDN}/a b#c ", None),
        ("HTTPS://MEDIA.CLIPIA.AI/A.png", None),
    ],
)
@pytest.mark.parametrize("place", ["images", "elsewhere"])
def test_skipped_files_have_a_reason(url: str, reason: str | None, place: str) -> None:
    """B10: if a URL must not be requested, it is listed all the same, without its secrets."""
    (ref,) = list_files({place: [{"url": url}]}, RULES).files
    assert (ref.skip and ref.skip.reason) == reason
    assert ref.url == url.strip()[:8192]
    assert ref.skip is None or "secret" not in ref.skip.message


TEXTS: list[tuple[Any, list[tuple[str, str]]]] = [
    ("{0}/a.png {0}/b.png", [("#0", "a.png"), ("#1", "b.png")]),
    ("{0}/a.webp,{0}/b.webp", [("#0", "a.webp"), ("#1", "b.webp")]),
    ("{0}/a.webp|{0}/b.webp;{0}/c.webp", [("#0", "a.webp"), ("#1", "b.webp"), ("#2", "c.webp")]),
    ("{0}/a.webp 1x, {0}/b.webp 2x", [("#0", "a.webp"), ("#1", "b.webp")]),
    ("{0}/a.png shows a cat. It is nice.", [("#0", "a.png")]),
    ("{0}/a shows a cat", [("#0", "a")]),
    ("See {0}/a.png, {0}/b.png.", [("#0", "a.png"), ("#1", "b.png")]),
    ("![a]({0}/a.png) and [b]({0}/b(1).png).", [("#0", "a.png"), ("#1", "b(1).png")]),
    ("<img src='{0}/a.png'><img src=\"{0}/b.png?w=1,2\">", [("#0", "a.png"), ("#1", "b.png?w=1,2")]),
    ("<img src='{0}/a.png?w=1&amp;sig=2'>", [("#0", "a.png?w=1&sig=2")]),
    ("&lt;img src=&quot;{0}/a.png&quot;&gt;", [("#0", "a.png")]),
    ('{{"video": {{"url": "{0}/a.mp4"}}}}', [("#0", "a.mp4")]),
    ("https://example.com/a.png {0}/b.png", [("#1", "b.png")]),
    ("https://example.com/a.png and http://media.clipia.ai/b.png", []),
    ("{0} and {0}/. are no files", []),
    # Texts that are one URL, with or without characters around it.
    ("\ufeff{0}/a.png", [("", "a.png")]),
    ("\u00a0{0}/a.png\n", [("", "a.png")]),
    ("<{0}/a.png>", [("", "a.png")]),
    ("\"{0}/a.png'", [("", "a.png")]),
    ("{0}/my cat.png", [("", "my cat.png")]),
    ("{0}/a,b.png?u=https://example.com/c,d", [("", "a,b.png?u=https://example.com/c,d")]),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_urls_within_a_text_are_files(text: str, expected: list[tuple[str, str]]) -> None:
    """B10: each URL of an allowed origin inside a text is a file, and no text is one bogus URL."""
    found = [(row[4], row[3]) for row in rows({"x": text.format(CDN)})]
    assert found == [(f"/x{field}", url) for field, url in expected]


@pytest.mark.parametrize(("text", "expected"), TEXTS[:5])
@pytest.mark.parametrize("place", ["images[0]", "images[0].url", "/more/0/url"])
def test_a_place_for_one_url_may_have_several(place: str, text: str, expected: list[tuple[str, str]]) -> None:
    """B10: if a field for a URL has a text with several, each is a file, and foreign ones are listed."""
    text = text.format(CDN) + " https://example.com/x"
    entry: Any = {"url": text} if "url" in place else text
    listing = list_files({"more" if place.startswith("/") else "images": [entry]}, RULES)
    assert [(ref.field, ref.url.removeprefix(f"{CDN}/")) for ref in listing.files] == [
        *[(f"{place}{field}", url) for field, url in expected],
        (f"{place}#{len(expected)}", "https://example.com/x"),
    ]
    assert [ref.skip is None for ref in listing.files] == [True] * len(expected) + [False]


def test_keys_are_searched() -> None:
    """B10: if a key of an object is a URL, it is a file, and its value is searched as usual."""
    output = {"files": {f"{CDN}/a.pptx": {"preview": f"{CDN}/b.png"}}, "https://example.com/": 1}
    assert rows(output) == [
        (0, "file", "original", "a.pptx", "/files/https:~1~1media.clipia.ai~1a.pptx#key0"),
        (1, "image", "original", "b.png", "/files/https:~1~1media.clipia.ai~1a.pptx/preview"),
    ]


def test_blanks_belong_to_a_url_in_a_place_for_one() -> None:
    """B10: in a field for a URL, a URL with spaces is one URL, with or without an extension."""
    assert rows({"images": [f"{CDN}/a b", {"url": f"{CDN}/c d"}], "video": f"{CDN}/e f"}) == [
        (0, "image", "original", "a b", "images[0]"),
        (1, "image", "original", "c d", "images[1].url"),
        (2, "video", "original", "e f", "video"),
    ]


def test_a_documented_place_without_a_url_is_listed() -> None:
    """B10: a text that is not a URL is reported if the field is documented, and ignored elsewhere."""
    output = {
        "images": ["/works/a.png", {"url": "data:image/png;base64,AAAA"}],
        "style": "oil",
        "cover": "no",
    }
    assert skips(output) == [("images[0]", "scheme"), ("images[1].url", "scheme")]


def test_a_skipped_original_is_not_replaced() -> None:
    """B10: if an original is not downloaded, it is listed as skipped, and `url` does not replace it."""
    output = {"video": {"original_url": f"{CDN}/" + "x" * 9000, "url": f"{CDN}/v.mp4"}}
    original, display = list_files(output, RULES).files
    assert (original.variant, original.skip and original.skip.message) == (
        "original",
        "the URL has 9024 characters, more than 8192",
    )
    assert (display.position, display.variant, display.skip) == (0, "display", None)


@pytest.mark.parametrize(
    ("count", "skipped", "left_out"),
    [(511, 0, 0), (512, 0, 0), (513, 1, 0), (2048, MAX_SKIPPED, 0), (2064, MAX_SKIPPED, 16)],
)
def test_at_most_512_files(count: int, skipped: int, left_out: int) -> None:
    """B10: the first 512 files are downloaded; the others are listed up to a limit."""
    listing = list_files({"images": [{"url": f"{CDN}/{n}"} for n in range(count)]}, RULES)
    assert [ref.url for ref in listing.files] == at(*map(str, range(count - left_out)))
    assert [ref.position for ref in listing.files] == list(range(count - left_out))
    assert [ref.skip is not None for ref in listing.files] == [n >= 512 for n in range(count - left_out)]
    assert listing.left_out == left_out
    words = [ref.skip.message for ref in listing.files if ref.skip]
    assert words[:-1] == ["the event has more than 512 files"] * max(0, skipped - 1)
    last = "; 16 further URLs are not listed" if left_out else ""
    assert words[-1:] == [f"the event has more than 512 files{last}"] * bool(words)


def test_foreign_urls_take_no_files_place() -> None:
    """B10: thousands of foreign URLs, or texts that are not URLs, do not prevent a download."""
    links = [f"https://example.com/{n}" for n in range(3000)]
    listing = list_files({"a": links, "z": [f"{CDN}/{n}" for n in range(513)]}, RULES)
    assert sum(ref.skip is None for ref in listing.files) == 512
    assert listing.left_out == 3000 - MAX_SKIPPED + 1


def test_repeated_urls_are_listed_once() -> None:
    """B10: if a URL was seen before, it counts neither as listed nor as left out, even beyond the limit."""
    images = [{"url": f"{CDN}/{n}"} for n in range(2100)]
    listing = list_files({"images": images + images, "audios": images, "more": images}, RULES)
    assert (len(listing.files), listing.left_out) == (2048, 52)


def test_originals_count_against_the_limit() -> None:
    """B10: if a file has two variants, both count as downloads."""
    images = [{"url": f"{CDN}/{n}", "original_url": f"{CDN}/o{n}"} for n in range(300)]
    listing = list_files({"images": images}, RULES)
    assert (sum(ref.skip is None for ref in listing.files), len(listing.files)) == (512, 600)


def test_the_limits_are_settable() -> None:
    """B10: the rules limit the number of downloads and the length of a URL."""
    rules = FileRules(max_files=1, max_url_length=30)
    output = {"a": at("1", "2"), "b": f"{CDN}/" + "x" * 30}
    assert skips(output, rules) == [("/a/0", None), ("/a/1", "count"), ("/b", "length")]


@pytest.mark.parametrize("output", [None, {}, [], 0, True, "", "text", {"a": {"b": [1, None, "http:"]}}])
def test_an_output_without_urls_has_no_files(output: Any) -> None:
    """B10: if a value is not a URL, it is not a file."""
    assert list_files(output, RULES) == Listing(files=(), left_out=0)


def test_deep_nesting_is_followed() -> None:
    """B10: an output is read even if it is nested more deeply than Python can recurse."""
    output: Any = f"{CDN}/a"
    for _ in range(5000):
        output = [output]
    (ref,) = list_files(output, RULES).files
    assert ref.field == "/0" * 5000
