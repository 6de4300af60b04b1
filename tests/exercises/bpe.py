"""Wrong answers that readers give to the exercises of lesson 10, and the words by which the checks must name them."""

from llama_edu.exercises.bpe import check_count_pairs, check_encode_word, check_replace_run, check_safe_text

_COUNT = "from collections import Counter\nfrom itertools import pairwise\ndef count_pairs(words):\n    c = Counter()\n"
_RUN = "def replace_run(ids, pair, new):\n    out, i = [], 0\n    while i < len(ids):\n"
_WORD = (
    "def encode_word(word, ranks):\n    p = [word[i:i+1] for i in range(len(word))]\n    while True:\n"
    "        k = [(ranks[p[i]+p[i+1]], i) for i in range(len(p)-1) if p[i]+p[i+1] in ranks]\n"
    "        if not k: return [ranks[x] for x in p]\n"
)

MISTAKES = [
    (check_count_pairs, _COUNT + "    for w in words: c.update(pairwise(w))\n    return c", "each word once"),
    (check_count_pairs, _COUNT + "    for w, n in words.items():\n        for i in range(len(w)-1): c[w[i:i+2]] += n\n"
     "    return c", "tuples"),
    (check_count_pairs, _COUNT + "    return Counter(pairwise(b''.join(w * n for w, n in words.items())))", "border"),
    (check_count_pairs, _COUNT + "    for w, n in words.items():\n        for q in set(pairwise(w)): c[q] += n\n"
     "    return c", "overlap"),
    (check_replace_run, "def replace_run(ids, pair, new):\n    out = list(ids)\n    i = len(out) - 2\n"
     "    while i >= 0:\n        if tuple(out[i:i+2]) == pair: out[i:i+2] = [new]\n        i -= 1\n    return out",
     "right to left"),
    (check_replace_run, _RUN + "        m = tuple(ids[i:i+2]) == pair\n        out.append(new if m else ids[i])\n"
     "        i += 1\n    return out", "in two pairs"),
    (check_replace_run, _RUN + "        if tuple(ids[i:i+2]) == pair:\n            ids[i:i+2] = [new]\n        i += 1\n"
     "    return ids", "handed in"),
    (check_replace_run, _RUN + "        if i + 1 == len(ids): break\n        m = tuple(ids[i:i+2]) == pair\n"
     "        out.append(new if m else ids[i])\n        i += 1 + m\n    return out", "before the end"),
    (check_encode_word, _WORD + "        i = k[0][1]\n        p[i:i+2] = [p[i]+p[i+1]]", "left to right"),
    (check_encode_word, _WORD + "        i = min(k)[1]\n        p[i:i+2] = [p[i]+p[i+1]]\n"
     "        return [ranks[x] for x in p]", "after one merge"),
    (check_encode_word, _WORD + "        i = min(k, key=lambda t: (t[0], -t[1]))[1]\n        p[i:i+2] = [p[i]+p[i+1]]",
     "leftmost"),
    (check_safe_text, "def safe_text(data):\n    return data.decode(errors='replace'), b''", "U+FFFD"),
    (check_safe_text, "def safe_text(data):\n    return data.decode(errors='ignore'), b''", "dropped"),
    (check_safe_text, "def safe_text(data):\n    i = len(data)\n    while i and data[i-1] > 127: i -= 1\n"
     "    return data[:i].decode(), data[i:]", "is whole"),
]  # fmt: skip
