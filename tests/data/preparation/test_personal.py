"""Personal data by kind: what is found, and what only looks like it. All of it is made up or from documentation ranges."""

import pytest

from megatron_rlhf.data.preparation.personal import find_personal, form_of, masked


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann.smith+x@mail.example.co.uk, please", "write to <email>, please"),
        ("call (650) 253-0000 or +44 20 7946 0958.", "call <phone> or <phone>."),
        ("card 4111 1111 1111 1111, or 5500-0055-5555-5559", "card <card>, or <card>"),
        ("IBAN DE89 3704 0044 0532 0130 00 AND MORE", "IBAN <iban> AND MORE"),
        ("GB82WEST12345698765432.", "<iban>."),
        ("from 8.8.8.8 and 2001:4860:4860::8888", "from <ip> and <ip>"),
        ("sk-abcdefghijklmnopqrstuvwx1234", "<key>"),
        ('api_key = "q8Zt1LmPx0Rv7YwK"', 'api_key = "<key>"'),
        ("AKIAIOSFODNN7EXAMPLE", "<key>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY----- x", "<key> x"),
    ],
)
def test_found(text, expected):
    assert masked(text, find_personal(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a @ b, user@localhost, @handle",
        "card 4111 1111 1111 1112",  # its checksum is wrong
        "DE88 3704 0044 0532 0130 00",
        "version 1.2.3.4.5, 127.0.0.1, 192.168.1.1, 10:30:00, 999.1.1.1",
        "in 1999-2024, 3.14159265358979, 12345678901234567890123",
        "password: forgotten, token: aaaaaaaaaaaaaaaa, secret = ???",
        "the year 2024, 100000 people, 7 of 9",
        "0000 0000 0000 0000",
    ],
)
def test_not_found(text):
    assert find_personal(text) == []


def test_without_a_region_only_numbers_with_a_country_code():
    text = "(650) 253-0000, +1 650 253 0000"
    assert masked(text, find_personal(text, None)) == "(650) 253-0000, <phone>"


def test_the_form_shows_nothing():
    assert form_of("Ann.9@mail.de") == "xxx.0@xxxx.xx"
    assert form_of("x" * 99) == "x" * 40 + "..."
