"""Seeded damage to the bytes of a file: what a disk, an editor or an attacker may leave in it."""

import json
import re
import struct
import zlib

NUMBERS = (b"0", b"-1", b"1", b"0.5", b"1e400", b"-1e308", b"1e308", b"nan", b"NaN", b"Infinity", b"-inf", b"65536")
NUMBERS += (b"2147483648", b"4294967296", b"9223372036854775808", b"1" * 30, b"9" * 5000, b"0x10", b"1_0")
STRINGS = (b"", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"\x1b[31m", b"../../../../etc/passwd", b"/etc/passwd")
STRINGS += (b"a" * 300, b"b" * 200_000, b'"', b"'", b"<", b"&", b"&a;", b",", b",,", b"\n", b"\r", b"\t", b"null")
STRINGS += (b"true", b"{}", b"[]", b"=", b"\xe2\x80\xae", b"\xc2\x85", b"\xef\xbb\xbf", b"..", b"/", b"/dev/zero", b"#")
OPENINGS = (b"[", b'{"a":', b"<a>", b"(", b'"', b"\n[a]", b"[[")
VALUES = (None, True, False, 0, -1, 1, 2, 0.5, 65535, 1 << 31, 1 << 63, 10**30, 1e308, -1e308, float("nan"))
VALUES += (float("inf"), "", "x", "1", "nan", "a" * 300, "\ud800", "\x1b[2J", "../../../../etc/passwd", "/etc/passwd")
VALUES += ([], {}, [[]], [None], [0, 0, 0, 0], [1e6, 1e6], [10**6, 10**6], [-1, -1, 5, 5], {"a": 1}, "\0", "0 1 2")
VALUES += ([1.5] * 6, [[0, 0, 10**9, 0, 10**9, 10**9]], {"size": [10**6, 10**6], "counts": [10**12]})
VALUES += ([10**400, 1, 2, 3], [1e200, 1e200, 1e200, 1e200], [0, 0, 10**300, 10**300])
WORDS = re.compile(rb"[A-Za-z0-9_.+-]+|\s+|.", re.DOTALL)
MAX_WORDS = 1 << 16  # bytes around a place in which words are looked for


def mutated(content, suffix, random):
    """`content` (bytes of a file with this suffix) with one to three changes; random: a random.Random."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        changes = [flip, overwrite, cut, remove, repeat, swap, insert]
        if suffix in (".jpg", ".png", ".gif", ".webp", ".tif", ".bmp", ".npy", ".pt", ".pcd"):
            changes += [overwrite, overwrite, flip]
        if suffix not in (".jpg", ".gif", ".webp", ".tif", ".bmp", ".png", ".npy", ".pt"):
            changes += [replace_word, replace_word, swap_words, nest]
        if suffix in (".json", ".jsonl"):
            changes += [replace_value] * 8
        content = random.choice(changes)(content, random)
    if suffix == ".png" and random.random() < 0.7:
        content = with_checksums(content)
    return content


def flip(content, random):
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 4, 32))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def overwrite(content, random):
    """An extreme binary number in place of 1, 2, 4 or 8 bytes, more often near the beginning."""
    size = random.choice((1, 2, 4, 8))
    value = random.choice((0, 1, -1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, 1 << 4 * size, 100_000, 255))
    value = (value % (1 << 8 * size)).to_bytes(size, random.choice(("little", "big")))
    start = random.randrange(max(1, min(len(content), random.choice((64, 512, len(content) or 1)))))
    return content[:start] + value + content[start + size :]


def span(content, random):
    start = random.randrange(len(content) + 1)
    return start, min(len(content), start + random.choice((1, 2, 8, 40, 300)))


def cut(content, random):
    return content[: random.randrange(len(content) + 1)]


def remove(content, random):
    start, end = span(content, random)
    return content[:start] + content[end:]


def repeat(content, random):
    start, end = span(content, random)
    return content[:end] + content[start:end] * random.choice((1, 1, 3, 100)) + content[end:]


def swap(content, random):
    (a, b), (c, d) = sorted((span(content, random), span(content, random)))
    return content if b > c else content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def insert(content, random):
    start = random.randrange(len(content) + 1)
    return content[:start] + random.choice(NUMBERS + STRINGS) + content[start:]


def nest(content, random):
    start = random.randrange(len(content) + 1)
    return content[:start] + random.choice(OPENINGS) * random.choice((3, 1000, 100_000)) + content[start:]


def words_at(content, random):
    """(bytes before, words, bytes after) around a random place."""
    start = max(0, random.randrange(len(content) + 1) - MAX_WORDS // 2)
    return content[:start], WORDS.findall(content[start : start + MAX_WORDS]), content[start + MAX_WORDS :]


def replace_word(content, random):
    before, words, after = words_at(content, random)
    if words:
        places = [place for place, word in enumerate(words) if word[:1].isalnum()] or range(len(words))
        place = random.choice(places)
        words[place] = random.choice(NUMBERS if words[place][:1].isdigit() and random.random() < 0.7 else STRINGS)
    return before + b"".join(words) + after


def swap_words(content, random):
    before, words, after = words_at(content, random)
    if words:
        a, b = random.randrange(len(words)), random.randrange(len(words))
        words[a], words[b] = words[b], words[a]
    return before + b"".join(words) + after


def replace_value(content, random):
    """Another value, or none, at a random place of JSON (of its first line, if each line is one)."""
    line, newline, rest = content.partition(b"\n")
    try:
        tree = json.loads(content)
        rest = newline = b""
    except ValueError:
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            return content
    except RecursionError:
        return content
    parent, key = {"": tree}, ""
    while isinstance(parent[key], dict | list) and parent[key] and random.random() < 0.85:
        parent = parent[key]
        key = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    action = random.random()
    if action < 0.75 or key == "":
        value = random.choice(VALUES)
        if key == "":
            tree = value
        else:
            parent[key] = value
    elif action < 0.9:
        del parent[key]
    elif isinstance(parent, list):
        parent.append(parent[key])
    else:
        parent[random.choice(("id", "name", "size", "token", "a"))] = parent[key]
    try:
        return json.dumps(tree).encode() + newline + rest
    except ValueError:  # a number of thousands of digits, of an earlier change
        return content


def with_checksums(png):
    """A PNG file whose chunks have the checksums of their contents."""
    parts, position = [png[:8]], 8
    while position + 12 <= len(png):
        length, name = struct.unpack(">I4s", png[position : position + 8])
        if position + 12 + length > len(png):
            break
        body = name + png[position + 8 : position + 8 + length]
        parts += [struct.pack(">I", length), body, struct.pack(">I", zlib.crc32(body))]
        position += 12 + length
    return b"".join([*parts, png[position:]])
