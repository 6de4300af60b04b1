"""Common wrong answers of lesson 11, each with words of the diagnosis it must get."""

from llama_edu.exercises.llama_tokenizers import (
    check_encode_turn,
    check_merge_by_score,
    check_read_varint,
    check_spell_bytes,
)

_TURN = """
def encode_turn(tokenizer, role, content):
    s = tokenizer.special_tokens
    return {body}
"""
_HEAD = '[s["<|start_header_id|>"], *tokenizer.encode(role), s["<|end_header_id|>"]]'

MISTAKES = [
    (
        check_spell_bytes,
        "def spell_bytes(text, known):\n    return [c if c in known else f'<0x{ord(c):02X}>' for c in text]",
        "code point of é",
    ),
    (
        check_spell_bytes,
        "def spell_bytes(text, known):\n"
        "    return [p for c in text for p in ([c] if c in known else [f'<0x{b:02x}>' for b in c.encode()])]",
        "in capitals",
    ),
    (
        check_spell_bytes,
        "def spell_bytes(text, known):\n    return [f'<0x{b:02X}>' for b in text.encode()]",
        "spelled every character",
    ),
    (
        check_spell_bytes,
        "def spell_bytes(text, known):\n"
        "    return [p for c in text for p in ([c] if c in known else [f'<0x{b:X}>' for b in c.encode()])]",
        "leading zero",
    ),
    (
        check_read_varint,
        "def read_varint(data):\n"
        "    value = 0\n"
        "    for i, b in enumerate(data):\n"
        "        value = value << 7 | b & 127\n"
        "        if b < 128:\n"
        "            return value, i + 1",
        "took the first byte as the highest",
    ),
    (
        check_read_varint,
        "def read_varint(data):\n"
        "    value = 0\n"
        "    for i, b in enumerate(data):\n"
        "        value |= b << 7 * i\n"
        "        if b < 128:\n"
        "            return value, i + 1",
        "mask each byte",
    ),
    (
        check_read_varint,
        "def read_varint(data):\n"
        "    value = 0\n"
        "    for i, b in enumerate(data):\n"
        "        value |= (b & 127) << 8 * i\n"
        "        if b < 128:\n"
        "            return value, i + 1",
        "Only seven of each",
    ),
    (
        check_read_varint,
        "def read_varint(data):\n"
        "    value = 0\n"
        "    for i, b in enumerate(data):\n"
        "        value |= (b & 127) << 7 * i\n"
        "        if b < 128:\n"
        "            break\n"
        "    return value, i + 1",
        "raise ValueError",
    ),
    (
        check_merge_by_score,
        "def merge_by_score(symbols, scores):\n"
        "    s = list(symbols)\n"
        "    while f := [(-len(a + b), i) for i, (a, b) in enumerate(zip(s, s[1:])) if a + b in scores]:\n"
        "        i = max(f, key=lambda x: (-x[0], -x[1]))[1]\n"
        "        s[i:i + 2] = [s[i] + s[i + 1]]\n"
        "    return s",
        "from left to right",
    ),
    (
        check_merge_by_score,
        "def merge_by_score(symbols, scores):\n"
        "    s = list(symbols)\n"
        "    while f := [(scores[a + b], i) for i, (a, b) in enumerate(zip(s, s[1:])) if a + b in scores]:\n"
        "        i = max(f)[1]\n"
        "        s[i:i + 2] = [s[i] + s[i + 1]]\n"
        "    return s",
        "took the pair on the right",
    ),
    (
        check_merge_by_score,
        "def merge_by_score(symbols, scores):\n"
        "    s = list(symbols)\n"
        "    f = [(-scores[a + b], i) for i, (a, b) in enumerate(zip(s, s[1:])) if a + b in scores]\n"
        "    if f:\n"
        "        i = min(f)[1]\n"
        "        s[i:i + 2] = [s[i] + s[i + 1]]\n"
        "    return s",
        "joined one pair and stopped",
    ),
    (
        check_encode_turn,
        "def encode_turn(tokenizer, role, content):\n"
        "    text = f'<|start_header_id|>{role}<|end_header_id|>\\n\\n{content.strip()}<|eot_id|>'\n"
        "    return tokenizer.encode(text, allowed_special=set(tokenizer.special_tokens))",
        "A user forged a turn",
    ),
    (
        check_encode_turn,
        "def encode_turn(tokenizer, role, content):\n"
        "    return tokenizer.encode(f'<|start_header_id|>{role}<|end_header_id|>\\n\\n{content.strip()}<|eot_id|>')",
        "spelled out as text",
    ),
    (
        check_encode_turn,
        _TURN.format(body=_HEAD + ' + tokenizer.encode("\\n\\n") + tokenizer.encode(content.strip())'),
        "The end is missing",
    ),
    (
        check_encode_turn,
        _TURN.format(body=_HEAD + ' + tokenizer.encode(content.strip()) + [s["<|eot_id|>"]]'),
        "a blank line",
    ),
    (
        check_encode_turn,
        _TURN.format(body=_HEAD + ' + tokenizer.encode("\\n\\n" + content) + [s["<|eot_id|>"]]'),
        "content.strip",
    ),
]
