"""Containers: complete files are complete, cut ones are not."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.media import NOISE, SAMPLES, box

from receiver import sandbox
from receiver.core.output_files import Kind
from receiver.media import container_formats
from receiver.media.container_formats import DamagedFile, Follower, Walk
from receiver.media.file_types import SNIFF_BYTES, sniff

MOVIE = container_formats.iso(b"moov", b"mdat")


def is_complete(walk: Walk, data: bytes, *, step: int = 1000) -> bool:
    """Follow `data` in parts."""
    follower = Follower(walk)
    for at in range(0, len(data), step):
        follower.feed(data[at : at + step])
    return follower.is_complete


def walk_of(content_type: str) -> Walk:
    """Return the walk that a sample's first bytes select."""
    sample = SAMPLES[content_type]
    return sniff(sample.data[:SNIFF_BYTES], sample.kind).walk


@pytest.mark.parametrize("content_type", SAMPLES)
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_a_complete_file_is_complete(content_type: str, step: int) -> None:
    """D9: a whole file passes, in parts of any size."""
    assert is_complete(walk_of(content_type), SAMPLES[content_type].data, step=step)


@pytest.mark.parametrize("content_type", SAMPLES)
def test_every_cut_is_noticed(content_type: str) -> None:
    """D9: a file is incomplete if it is cut anywhere, as far as its format contains its end."""
    sample = SAMPLES[content_type]
    walk = walk_of(content_type)
    accepted = [cut for cut in range(16, len(sample.data)) if is_complete(walk, sample.data[:cut])]
    assert accepted == list(sample.unseen)


@given(st.sampled_from(sorted(SAMPLES)), st.lists(st.integers(0, 2000)), st.integers(16, 2200))
def test_the_parts_make_no_difference(content_type: str, splits: list[int], cut: int) -> None:
    """D9: the verdict depends on the bytes, and not on the sizes of the parts."""
    data, walk = SAMPLES[content_type].data[:cut], walk_of(content_type)
    follower = Follower(walk)
    for start, end in zip([0, *sorted(splits)], [*sorted(splits), len(data)], strict=True):
        follower.feed(data[start:end])
    assert follower.is_complete == is_complete(walk, data, step=len(data))


@given(st.sampled_from(sorted(SAMPLES)), st.binary(max_size=300), st.integers(1, 64))
def test_no_bytes_upset_a_walk(content_type: str, noise: bytes, step: int) -> None:
    """D9: after any valid start, arbitrary bytes give a verdict or DamagedFile, and no other error."""
    data = SAMPLES[content_type].data
    for start in (16, 40, len(data)):
        try:
            is_complete(walk_of(content_type), data[:start] + noise, step=step)
        except DamagedFile:
            continue


@pytest.mark.parametrize("content_type", ["image/png", "image/jpeg", "image/gif", "image/webp", "audio/wav"])
def test_bytes_behind_the_end_do_not_matter(content_type: str) -> None:
    """D9: if bytes follow the end (a depth map, a tag, a padding byte), the file is still complete."""
    assert is_complete(walk_of(content_type), SAMPLES[content_type].data + NOISE)


@pytest.mark.parametrize("tail", [bytes(64), b"\0\0\0\0free" + NOISE, b"\0\0\0\x05pad."])
def test_a_movie_may_have_padding(tail: bytes) -> None:
    """D9: after a whole movie, a box that extends to the end or a few odd bytes end the walk."""
    assert is_complete(MOVIE, SAMPLES["video/mp4"].data + tail)


@pytest.mark.parametrize("tail", [bytes(1), b"\x01" * 3, b"moo" + bytes(4), b"TAG" + b"name" * 31 + b"\x0c"])
@pytest.mark.parametrize("content_type", ["video/mp4", "audio/mp4", "audio/ogg", "audio/mpeg", "image/png"])
def test_a_tag_or_padding_behind_a_file_is_no_blemish(content_type: str, tail: bytes) -> None:
    """D9: a file stays complete if an ID3v1 tag or a few bytes follow its end."""
    follower = Follower(walk_of(content_type))
    follower.feed(SAMPLES[content_type].data)
    assert follower.ends_here
    follower.feed(tail)
    assert follower.is_complete


def test_a_movie_without_its_index_is_damaged() -> None:
    """D9: if the data box extends to the end, no index can follow, so a missing one means damage."""
    with pytest.raises(DamagedFile):
        is_complete(MOVIE, box(b"ftyp", b"isom" + bytes(4)) + b"\0\0\0\0mdat" + NOISE)


def test_a_movie_cut_between_boxes_is_incomplete() -> None:
    """D9: an index without the data that it points to is no movie, although every box is whole."""
    assert not is_complete(MOVIE, box(b"ftyp", b"isom" + bytes(4)) + box(b"moov", NOISE))


def test_damaged_structures_are_told_apart_from_short_ones() -> None:
    """D9: a PNG chunk without a name and an unknown GIF block mean damage, not a short file."""
    for content_type, at in (("image/png", 37), ("image/gif", 19)):
        data = bytearray(SAMPLES[content_type].data)
        data[at : at + 1] = b"\x07"
        with pytest.raises(DamagedFile):
            is_complete(walk_of(content_type), bytes(data))


def test_a_wav_of_unknown_length_is_accepted() -> None:
    """D9: an encoder that streams cannot know the length; then only the framing of HTTP shows a cut."""
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFF):
        data = b"RIFF" + struct.pack("<I", size) + b"WAVE" + NOISE
        assert is_complete(container_formats.riff, data)


def test_a_webm_of_unknown_length_is_accepted() -> None:
    """D9: a live WebM has no size; then only the framing of HTTP shows a cut."""
    assert is_complete(container_formats.ebml, b"\x1a\x45\xdf\xa3\x84webm\x18\x53\x80\x67\xff" + NOISE)


def test_an_mp3_without_a_size_ends_anywhere() -> None:
    """D9: a bare MPEG stream has no length; then only the framing of HTTP shows a cut."""
    assert is_complete(container_formats.mp3, b"\xff\xfb\x90\x00" + NOISE)
    assert is_complete(container_formats.mp3, b"ID3\x04\x00\x10\x00\x00\x00\x10" + bytes(16 + 10) + NOISE)


@pytest.mark.parametrize(("flags", "offset"), [(2, 36), (3, 21), (2, 13)])
def test_the_size_in_an_mp3_is_found(flags: int, offset: int) -> None:
    """D9: the header of LAME and ffmpeg is found for mono and stereo, with and without a frame count."""
    frames = struct.pack(">I", 9) if flags & 1 else b""
    head = b"\xff\xfb\x90\x00".ljust(offset, b"\0") + b"Xing" + struct.pack(">I", flags)
    data = (head + frames + struct.pack(">I", 500)).ljust(500, b"\x55")
    assert is_complete(container_formats.mp3, data)
    assert not is_complete(container_formats.mp3, data[:-1])


@pytest.mark.parametrize("step", [7, 100_000])
def test_the_size_in_an_mp3_counts_from_its_first_frame(step: int) -> None:
    """D9: an MP3 with a cover of 50 KB is incomplete if its last byte or most of its audio is missing."""
    cover = b"ID3\x04\x00\x00" + bytes([0, 3, 0x0D, 0x50]) + b"\x55" * 50_896
    frames = b"\xff\xfb\x90\x00".ljust(36, b"\0") + b"Info" + struct.pack(">III", 3, 9, 40_000)
    data = cover + frames.ljust(40_000, b"\x55")
    whole = {
        size
        for size in (*range(len(cover) + 100, len(data), 997), 40_000, len(data) - 1, len(data))
        if is_complete(container_formats.mp3, data[:size], step=step)
    }
    assert whole == {len(data)}
    assert is_complete(container_formats.mp3, data + b"TAG" + bytes(125), step=step)


def test_an_mp3_of_exactly_its_size_is_complete() -> None:
    """D9: if the encoder counted the tag, too, the file ends at exactly that many bytes."""
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x20" + bytes(32)
    frames = b"\xff\xfb\x90\x00".ljust(36, b"\0") + b"Xing" + struct.pack(">II", 2, 1000)
    data = tag + frames.ljust(1000 - len(tag), b"\x55")
    assert [size for size in range(990, 1001) if is_complete(container_formats.mp3, data[:size])] == [1000]


def test_a_flac_with_more_metadata_is_followed() -> None:
    """D9: every metadata block has to be whole, and a frame has to follow."""
    data = b"fLaC" + b"\x00\x00\x00\x22" + bytes(34) + b"\x84\x00\x00\x08" + bytes(8)
    assert not is_complete(container_formats.flac, data)
    assert is_complete(container_formats.flac, data + b"\xff\xf8" + NOISE)


def test_too_many_tiny_pieces_are_damage() -> None:
    """D7: a structure of too many empty pieces is not followed to its end."""
    follower = Follower(MOVIE, max_pieces=1000)
    follower.feed(SAMPLES["video/mp4"].data + box(b"free", b"") * 900)
    assert follower.is_complete
    with pytest.raises(DamagedFile, match="too many"):
        follower.feed(box(b"free", b"") * 101)


def test_foreign_bytes_end_an_ogg_file() -> None:
    """D9: bytes behind the last page end the walk."""
    assert is_complete(container_formats.ogg, SAMPLES["audio/ogg"].data + NOISE)


def test_real_files_are_complete_and_cut_ones_are_not() -> None:
    """D9: files from real encoders pass, and fail without their last bytes."""
    folder = Path(sandbox.__file__).parent / "samples"
    samples: dict[str, Kind] = {"image.png": "image", "image.webp": "image", "video.mp4": "video"}
    for name, kind in samples.items():
        data = (folder / name).read_bytes()
        walk = sniff(data[:SNIFF_BYTES], kind).walk
        assert is_complete(walk, data)
        assert not is_complete(walk, data[:-1])
