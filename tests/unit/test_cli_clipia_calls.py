"""The options of the commands that speak to Clipia."""

from pathlib import Path

import pytest

from receiver.cli.clipia_calls import read_input
from receiver.errors import ReceiverError


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt": "café 😀", "seed": 15860307465884635512, "n": [1.5, null, true]}',
        '\ufeff{"prompt": "caf\\u00e9"}',
    ],
)
def test_an_input_is_read_exactly(text: str, tmp_path: Path) -> None:
    """B9: an input from the command line or a file is exact, with integers of 64 bits."""
    file = tmp_path / "input.json"
    file.write_text(text, encoding="utf-8")
    assert read_input(text) == read_input(f"@{file}")
    assert read_input('{"seed": 18446744073709551615}') == {"seed": 2**64 - 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 36893488147419103232}', "/seed"),
        ('{"seed": 1, "seed": 2}', "/seed"),
        ('{"a": [NaN]}', "/a/0"),
        ('{"a": "\\ud83d"}', "/a"),
        ('{"a": "\udcff"}', "/a"),
        ("{", "is not JSON"),
        ("[1]", "write a JSON object"),
    ],
    ids=ascii,
)
def test_an_input_is_never_changed(text: str, said: str) -> None:
    """B9: if Clipia could get a value only in another form, it is rejected, and the message has its place."""
    with pytest.raises(ReceiverError, match=said):
        read_input(text)
