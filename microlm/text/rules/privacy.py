"""Rules that mask what belongs to a person: numbers of identity, bank card and phone, addresses, accounts."""

from __future__ import annotations

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import NamedTuple

from microlm.core.records import Document
from microlm.text.rules import Rule, edited

LABEL_CHARS = 24  # before a number, where its label may stand
ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)

_HAN = re.compile("[\u4e00-\u9fff]")
_ID_LABEL = re.compile(r"(?:身份证|证件|\bID\b|identity)[^\n。]{0,12}$", re.IGNORECASE)
_CARD_LABEL = re.compile(r"(?:卡号?|账号|帐号|账户|card|account)[^\n。]{0,12}$", re.IGNORECASE)


def is_id_number(number: str) -> bool:
    """Whether the last of 18 characters is the check digit of the others (GB 11643-1999)."""
    total = sum(w * int(digit) for w, digit in zip(ID_WEIGHTS, number, strict=False))
    return number[17].upper() == "10X98765432"[total % 11]


def is_card_number(number: str) -> bool:
    """Whether the digits satisfy Luhn's formula (ISO/IEC 7812-1)."""
    digits = [int(d) for d in reversed(number) if d.isdigit()]
    doubled = sum(sum(divmod(2 * d, 10)) for d in digits[1::2])
    return (sum(digits[::2]) + doubled) % 10 == 0


def _is_id(match: re.Match[str]) -> bool:
    return is_id_number(match[0]) or _labelled(match, _ID_LABEL)


def _is_card(match: re.Match[str]) -> bool:
    return is_card_number(match[0]) or _labelled(match, _CARD_LABEL)


def _labelled(match: re.Match[str], label: re.Pattern[str]) -> bool:
    return bool(label.search(match.string[max(0, match.start() - LABEL_CHARS) : match.start()]))


def _is_host(match: re.Match[str]) -> bool:
    """An address that one machine has: not loopback, a mask, or for many."""
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:
        return False
    return not (address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved)


def _any(_: re.Match[str]) -> bool:
    return True


class Kind(NamedTuple):
    """What to look for, whether a match is one, and what stands for it in Chinese and in other text."""

    pattern: re.Pattern[str]  # the group `label`, where there is one, stays
    is_one: Callable[[re.Match[str]], bool]
    chinese: str
    latin: str


KINDS = {
    "mask_id_numbers": Kind(
        re.compile(
            r"(?<![0-9A-Za-z])[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9Xx]"
            r"(?![0-9A-Za-z])",
            re.ASCII,
        ),
        _is_id,
        "<身份证号>",
        "<ID_NUMBER>",
    ),
    "mask_bank_cards": Kind(
        re.compile(
            r"(?<![0-9A-Za-z.])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{3,4}(?:[ -]?\d{3})?(?![0-9A-Za-z])",
            re.ASCII,
        ),
        _is_card,
        "<银行卡号>",
        "<BANK_CARD>",
    ),
    "mask_phones": Kind(
        re.compile(
            r"(?<![0-9A-Za-z.+])(?:\+?86[ -]?)?1[3-9]\d(?:[ -]?\d{4}){2}(?![0-9A-Za-z])"
            r"|(?<![0-9A-Za-z.-])(?:\+?86[ -]?)?0(?:10|2\d|[3-9]\d{2})-\d{7,8}(?![0-9A-Za-z-])",
            re.ASCII,
        ),
        _any,
        "<电话号码>",
        "<PHONE>",
    ),
    "mask_emails": Kind(
        re.compile(
            r"(?<![0-9A-Za-z._%+-])[0-9A-Za-z][0-9A-Za-z._%+-]{0,63}@(?:[0-9A-Za-z-]{1,63}\.){1,8}[A-Za-z]{2,24}"
            r"(?![0-9A-Za-z])"
        ),
        _any,
        "<邮箱>",
        "<EMAIL>",
    ),
    "mask_ip_addresses": Kind(
        re.compile(
            r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\.?\w)|[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]))",
            re.ASCII,
        ),
        _is_host,
        "<IP地址>",
        "<IP_ADDRESS>",
    ),
    "mask_accounts": Kind(
        re.compile(
            r"(?P<label>(?:QQ|微信|WeChat)[ \t]*群?(?:号码?|账号|帐号|ID)?[ \t]*[:：]?[ \t]*)"
            r"(?=[A-Za-z_-]{0,19}\d)[0-9A-Za-z][0-9A-Za-z_-]{4,19}(?![0-9A-Za-z@.])",
            re.ASCII | re.IGNORECASE,
        ),
        _any,
        "<账号>",
        "<ACCOUNT>",
    ),
}


def rules() -> dict[str, Rule]:
    """A rule for each kind, so that each is counted."""
    return {name: functools.partial(mask, kind=kind) for name, kind in KINDS.items()}


def mask(document: Document, kind: Kind) -> tuple[Document, str | None]:
    """Put a placeholder for whatever is of this kind."""
    return edited(document, _masked(document.text, kind)), None


def masked(text: str) -> str:
    """The text with placeholders for all kinds."""
    for kind in KINDS.values():
        text = _masked(text, kind)
    return text


def _masked(text: str, kind: Kind) -> str:
    def placeholder(match: re.Match[str]) -> str:
        if not kind.is_one(match):
            return match[0]
        name = kind.chinese if _HAN.search(text) else kind.latin
        return (match["label"] if "label" in kind.pattern.groupindex else "") + name

    return kind.pattern.sub(placeholder, text)
