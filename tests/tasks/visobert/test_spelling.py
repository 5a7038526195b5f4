"""One spelling of Vietnamese: by hand, and for any text."""

import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks.visobert.reviews.reviews import folded
from pipeline.tasks.visobert.reviews.splits import _hash_fractions
from pipeline.tasks.visobert.spelling import one_spelling


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("hoà hoá hoả hoã hoạ", "hòa hóa hỏa hõa họa"),
        ("loè loé khoẻ choẽ choẹ", "lòe lóe khỏe chõe chọe"),
        ("thuỳ thuý thuỷ luỹ luỵ", "thùy thúy thủy lũy lụy"),
        ("HOÀ Khoẻ, Thuỷ!", "HÒA Khỏe, Thủy!"),
        ("hòa khỏe thủy", "hòa khỏe thủy"),
        (
            "hoàn toàn khoét huých ngoài xoáy",
            "hoàn toàn khoét huých ngoài xoáy",
        ),  # a letter follows: one spelling alone
        ("quý quỳ quà quả QUÝ", "quý quỳ quà quả QUÝ"),  # qu is a consonant
        ("hoa khoe tuy hoặc thoạt", "hoa khoe tuy hoặc thoạt"),
        ("hoá1 hoá_", "hóa1 hóa_"),
        ("&lt;3 R&amp;D &#272;&#x1EB9;p &hellip; kho&#7867;", "<3 R&D Đẹp … khỏe"),
        ("AT&T & R&D; a&b &; &#; &notanentity;", "AT&T & R&D; a&b &; &#; &notanentity;"),
        (unicodedata.normalize("NFD", "Ngoài quý hoạ sĩ, ủy mị"), "Ngoài quý họa sĩ, ủy mị"),
    ],
)
def test_by_hand(written: str, expected: str) -> None:
    assert one_spelling(written) == expected
    assert one_spelling(unicodedata.normalize("NFD", written)) == expected


@given(st.text(st.sampled_from(unicodedata.normalize("NFD", "oaeuyhqnOAEUYQ àáảãạăắâậ .1")), max_size=12))
def test_it_is_one(text: str) -> None:
    once = one_spelling(text)
    assert once == unicodedata.normalize("NFC", once) == one_spelling(once)
    assert one_spelling(unicodedata.normalize("NFC", text)) == one_spelling(unicodedata.normalize("NFD", text)) == once
    letters = sorted(unicodedata.normalize("NFD", text))
    assert sorted(unicodedata.normalize("NFD", once)) == letters  # tones move; nothing is lost


def test_copies_are_in_the_same_split() -> None:
    """The hash of the first of them, by the formula: those without other spellings stay where they were."""
    texts = (
        "Hoà  thì\nthích",
        "pin trâu",
        "hòa thì thích",
        "Hòa thì thích &#33;",
        unicodedata.normalize("NFD", "PIN TRÂU"),
    )
    plain = [hashlib.sha256(text.encode()).digest() for text in ("hoà thì thích", "pin trâu", "hòa thì thích &#33;")]
    first, second, third = (int.from_bytes(digest[:8]) / 2**64 for digest in plain)
    assert _hash_fractions(texts).tolist() == [first, second, first, third, second]
    assert folded(texts[3]) == "hòa thì thích !"
