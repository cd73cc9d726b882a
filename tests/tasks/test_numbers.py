from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roro_fast.tasks.numbers import NUMBER, comparable, parse_quantity, plain, same_text, same_value


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1,200", 1200, ""),
        ("-1,234,567.50", Fraction("-1234567.5"), ""),
        ("$1,200.00", 1200, ""),
        ("-$5", -5, ""),
        ("$-5", -5, ""),
        (".5", Fraction(1, 2), ""),
        ("18.", 18, ""),
        ("3/4", Fraction(3, 4), ""),
        (r"\dfrac{-3}{4}", Fraction(-3, 4), ""),
        (r"-\frac{3}{4}", Fraction(-3, 4), ""),
        (r"$10{,}000$", 10000, ""),
        (r"10,\!236", 10236, ""),
        ("\u22127", -7, ""),
        ("50%", 50, "%"),
        (r"50\%", 50, "%"),
        ("18 dollars", 18, "dollars"),
        (r"90^\circ", 90, "circ"),
        (r"12\text{ cm}", 12, "cm"),
    ],
)
def test_parses_what_people_write(text, value, unit):
    assert parse_quantity(plain(text)) == (value, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1,2",
        "1234,567",
        "5 million",
        "2 dozen",
        "18x",
        "1e9",
        "3/0",
        "1 2",
        "--5",
        "2^3",
        "5 or 6",
        "3 pi",
        "9" * 401,
    ],
)
def test_refuses_what_is_not_one_plain_number(text):
    assert parse_quantity(plain(text)) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10-5 = 5", ["10", "5", "5"]),
        ("x = -5.", ["-5"]),
        ("(-3)", ["-3"]),
        ("- 5 apples", ["5"]),
        ("$1,200 and $-3.50", ["$1,200", "$-3.50"]),
        ("1/2 of 50%", ["1/2", "50%"]),
        ("12,3456", ["12", "3456"]),
        ("no number", []),
    ],
)
def test_finds_numbers_with_their_own_sign_only(text, found):
    assert NUMBER.findall(text) == found


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_thousands_separators_change_nothing(d):
    assert parse_quantity(plain(f"{d:,}")) == parse_quantity(plain(str(d))) == (Fraction(d), "")


@given(st.fractions(max_denominator=999))
def test_fractions_read_back(f):
    assert parse_quantity(plain(rf"$\frac{{{f.numerator}}}{{{f.denominator}}}$")) == (f, "")
    assert parse_quantity(f"{f.numerator}/{f.denominator}") == (f, "")


@given(st.text(max_size=60))
def test_any_text_is_read_without_an_error(text):
    quantity = parse_quantity(plain(text))
    assert quantity is None or isinstance(quantity.value, Fraction)


def test_values_agree_to_six_decimals_unless_both_are_integers():
    assert same_value(Fraction(1, 3), Fraction("0.333333"))
    assert not same_value(Fraction(1, 3), Fraction("0.3333"))
    assert not same_value(Fraction(70), Fraction(71))
    assert not same_value(Fraction(70), Fraction(-70))


def test_percent_and_unequal_units_do_not_settle_a_comparison():
    five, percent = parse_quantity("5"), parse_quantity("5%")
    feet, inches = parse_quantity("5 feet"), parse_quantity("5 inches")
    assert comparable(five, feet) and comparable(feet, feet)
    assert not comparable(five, percent) and not comparable(feet, inches)


def test_texts_agree_up_to_space_and_word_case():
    assert same_text(plain(r"\text{Evelyn}"), "evelyn")
    assert same_text("p - q", "p-q")
    assert not same_text("AB", "ab")
