"""The bytes of a file, and the text that they encode."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

from childtuning.errors import DataError, no_file

_MOST_SPECIAL = (
    0.25  # the share of bytes above 127 up to which text may be Windows-1252: Western languages have less
)


def content_of(path: Path) -> bytes:
    """Return the bytes of a file, unpacked if it is .gz.

    Raises:
        DataError: when the file is missing, empty or damaged.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder. Pass a file.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise no_file(path) from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and its permissions."
        ) from None
    if path.name.lower().endswith(".gz") and content:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(
                f"{path} is truncated or not gzip ({error}). Copy it again, or drop .gz from its name."
            ) from None
    if not content:
        raise DataError(f"{path} is empty. Pass a file with at least one example.")
    return content


def decode(content: bytes, path: Path, named: str | None = None) -> tuple[str, str | None]:
    """Decode UTF-8, UTF-16, and what is neither: as named, or Windows-1252.

    UTF-16 without a byte order mark is recognised by its zero bytes. Bytes that are not UTF-8 are Windows-1252 if
    all of them are defined there and they are few, as in Western languages.

    Args:
        content: the bytes of a file.
        path: the file.
        named: the encoding of what is not UTF-8; None allows Windows-1252 alone.
    Returns:
        the text, and what was guessed about it: None for UTF-8, and for UTF-16 with a mark.
    Raises:
        DataError: when the encoding cannot be decided.
    """
    if named is not None and not is_encoding(named):
        raise DataError(f"there is no encoding {named!r}. Pass cp1251, gb18030, shift_jis, …")
    if named is not None and not _extends_ascii(named):  # nothing is guessed then
        return _decoded_as(content, named, path), None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return _utf_16(content, "utf-16", path), None
    if content.startswith(b"PK"):
        raise DataError(
            f"{path} is a zip archive, such as Excel writes, not text. Name it .xlsx if it is a workbook."
        )
    if b"\0" in content:
        even, odd = content[::2].count(0), content[1::2].count(0)
        if len(content) % 2 or (even and odd):
            raise DataError(f"{path} contains zero bytes and is not text. Save it as UTF-8.")
        name = "utf-16-be" if even else "utf-16-le"
        return _utf_16(content, name, path), "read as UTF-16 without a byte order mark"
    try:
        return content.decode("utf-8-sig"), None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}"
    if named is not None:
        return _decoded_as(content, named, path), None
    special = sum(byte > 127 for byte in content) / len(content)
    damaged = any(mark > "\x7f" and mark != "\ufffd" for mark in content.decode("utf-8-sig", "replace"))
    if special <= _MOST_SPECIAL and not damaged:
        try:
            return content.decode(
                "cp1252"
            ), f"not UTF-8 ({found}), so read as Windows-1252; --encoding names another"
        except UnicodeDecodeError:
            pass
    raise DataError(
        f"{path} is neither UTF-8 nor Windows-1252: {found}. Name its --encoding, or save it as UTF-8."
    )


def is_encoding(name: str) -> bool:
    """Return whether Python knows an encoding of text by this name."""
    try:
        "a".encode(name)
        b"a".decode(name)
    except LookupError:
        return False
    except UnicodeError:  # of two bytes or more a character
        return name != "undefined"
    return True


def _extends_ascii(name: str) -> bool:
    """Whether text in ASCII is the same in this encoding, so that UTF-8 may be tried first."""
    plain = bytes(range(32, 127))
    return plain.decode(name, "replace") == plain.decode("ascii")


def _decoded_as(content: bytes, name: str, path: Path) -> str:
    try:
        return content.decode(name).removeprefix("\ufeff")
    except UnicodeError:
        raise DataError(f"{path} is not {name}. Pass another --encoding.") from None


def _utf_16(content: bytes, name: str, path: Path) -> str:
    try:
        return content.decode(name)
    except UnicodeDecodeError:
        raise DataError(f"{path} is truncated or damaged: it begins as UTF-16. Save it as UTF-8.") from None
