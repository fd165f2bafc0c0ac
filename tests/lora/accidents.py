"""What can happen to an adapter's files: each accident maps good bytes and a `random.Random` to bad ones.

A safetensors file is a length of 8 bytes, a JSON header, and data.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from typing import Any

Accident = Callable[[bytes, random.Random], bytes]

JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, -7, 8.0, 0.5, -0.0, 1e-320, 1e308, 10**30, 10**400, 2**63, -(2**63)),
    *(math.nan, math.inf, -math.inf, "", " ", "q", "LORA", "8", "true", "none", "\x00", "\ud800", "é", "head", "."),
    *([], [[]], [None], [0], [1, 1], [-1], [10**9], [True], ["q"], ["q", None], [""], ["q\x00"], ["pissa"], [[0, 2]]),
    *({}, {"": 1}, {"q": None}, {"q": {}}, {"q": [1]}, {"embed": [0]}, {"a": {"b": {"c": [1, {"d": None}]}}}),
]
"""Values of every type, for a field that wants another."""

REGEXES = [
    *("(", ")", "[", "*", "+", "?", "\\", "(?", "(?P<", "(?P=x)", "(?#", "(?<=a*)b", "q)|(v", "(?i)Q", "(?x) q # c"),
    *("(x)|layers", "(?:)", "^$", ".*", "|", "a{99999999999999999999}", "a{1000,1}", "(?:a{0,65535}){0,65535}"),
    *("(" * 5000 + ")" * 5000, "(?:" * 300 + ")" * 300, "[" * 3000, "q|" * 20000 + "v", "." * 200000),
]
"""Patterns that `re` refuses, or that mean another thing inside a larger one."""

FIELDS = [
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "target_parameters", "rank_pattern"),
    *("alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "lora_bias", "bias", "fan_in_fan_out"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "trainable_token_indices", "layer_replication"),
    *("peft_type", "task_type", "use_qalora", "megatron_config", "inference_mode", "base_model_name_or_path"),
]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "X", "", 5]
RECORD = "lora_lightning"


def flip_bits(data: bytes, random: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 8])):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(data: bytes, random: random.Random) -> bytes:
    return data[: random.randrange(len(data))]


def splice(data: bytes, random: random.Random) -> bytes:
    """Some bytes are gone, there twice, or others."""
    start, end = (random.randrange(len(data) + 1) for _ in range(2))
    end = random.choice([end, start, start + random.randrange(64), start - random.randrange(min(64, start + 1))])
    return data[:start] + random.randbytes(random.randrange(9)) + data[end:]


ANY: list[Accident] = [flip_bits, cut, splice]


def change_json(document: Any, random: random.Random, values: list[Any]) -> None:
    """One value somewhere in an object is another, gone, or new."""
    place = document
    while inner := [key for key, value in place.items() if isinstance(value, dict) and value]:
        if random.random() < 0.4:
            break
        place = place[random.choice(inner)]
    key = random.choice([*place, *(FIELDS if "peft_type" in place else ()), "more", ""])
    if random.random() < 0.3:
        place.pop(key, None)
    else:
        place[key] = random.choice(values)


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def closed(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _entry(header: dict[str, Any], random: random.Random) -> dict[str, Any]:
    return header[random.choice([key for key in header if key != "__metadata__"])]


def flip_data(data: bytes, random: random.Random) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    changed = bytearray(data)
    changed[random.randrange(start, len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def other_length(data: bytes, random: random.Random) -> bytes:
    wrong = random.choice([0, 1, 7, len(data), 100_000_001, 2**31, 2**63, 2**64 - 1, random.randrange(len(data))])
    return wrong.to_bytes(8, "little") + data[8:]


def other_header(data: bytes, random: random.Random) -> bytes:
    header, body = opened(data)
    entry, other = _entry(header, random), _entry(header, random)
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    places = [[end, start], [start + 4, end + 4], [0, 2**63], [-4, end], [start, start], other["data_offsets"]]
    shapes = [shape[::-1], [math.prod(shape)], [1, *shape], [0, *shape], [2, 2, 2], [-1, -16], [2**40] * 2]
    change_json(random.choice([header, entry]), random, [*JUNK, *DTYPES, *shapes, *places, {"format": "np"}])
    return closed(header, body)


def other_record(data: bytes, random: random.Random) -> bytes:
    """One value somewhere in our record is another, or gone; a file without one gets one of junk."""
    header, body = opened(data)
    metadata = header.setdefault("__metadata__", {})
    record = json.loads(metadata.get(RECORD, "{}"))
    change_json(record, random, [*JUNK, *(r for r in REGEXES if len(r) < 100)])
    metadata[RECORD] = random.choice([json.dumps(record)] * 9 + ["[" * 50000 + "]" * 50000])
    return closed(header, body)


TENSORS: list[Accident] = [*ANY, flip_data, other_length, other_header, other_header, other_record]


def other_config(data: bytes, random: random.Random) -> bytes:
    config = json.loads(data)
    for _ in range(random.choice([1, 1, 1, 2, 5])):
        change_json(config, random, JUNK)
    return json.dumps(config).encode()


def bad_regex(data: bytes, random: random.Random) -> bytes:
    config, regex = json.loads(data), random.choice(REGEXES)
    field = random.choice(["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
    config[field] = {regex: 3} if field.endswith("_pattern") and field != "layers_pattern" else regex
    if field == "layers_pattern":
        config |= {"layers_to_transform": [0, 1], "layers_pattern": random.choice([regex, [regex]])}
    return json.dumps(config).encode()


def odd_json(data: bytes, random: random.Random) -> bytes:
    """No object, another encoding, more than one, a depth or a number without bound, a key twice."""
    depth, begun = random.choice([900, 1500, 100_000]), data.rstrip()[:-1]
    whole = [b"", b" ", b"null", b"[]", b"5", b'"LORA"', b"{}", b'{"peft_type": "LORA"}', b"[" * depth]
    whole += [b"[" * depth + b"]" * depth, b'{"a":' * depth + b"1" + b"}" * depth]
    around = [data + data, b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, b"// c\n" + data, data + b"\0"]
    around += [data.decode().encode("utf-16"), data.replace(b'"', b"'"), b" " * 1_000_000 + data]
    inside = [b'"x":' + b"[" * depth + b"]" * depth, b'"lora_alpha":1' + b"0" * 5000, b'"r":1', b'"r":3', b'"r":64']
    return random.choice([*whole, *around, *(begun + b"," + more + b"}" for more in inside)])


CONFIGS: list[Accident] = [*ANY, other_config, other_config, other_config, bad_regex, odd_json]
