"""Checks of the exercises of lesson 10: counting pairs, merging runs, encoding a word, whole characters."""

from __future__ import annotations

from collections.abc import Callable

from llama_edu.exercises import exercise

__all__ = ["check_count_pairs", "check_encode_word", "check_replace_run", "check_safe_text"]

LESSON = "10_bpe"


@exercise(lesson=LESSON, level=1, minutes=5)
def check_count_pairs(attempt: Callable) -> str | None:
    got = dict(attempt({b"ab": 5, b"aba": 2}))
    a, b = 97, 98
    if got == {(a, b): 2, (b, a): 1}:
        return "You counted each word once. A word that stands 5 times in the corpus gives each of its pairs 5 times."
    if any(isinstance(k, bytes) for k in got):
        return "The pairs must be tuples of two byte values; you returned slices of bytes."
    if (a, a) in dict(attempt({b"ba": 1, b"ab": 1})) or (b, b) in dict(attempt({b"ab": 1, b"ba": 1})):
        return "You counted pairs over the border of two words; no merge crosses it, so count inside each word."
    if got != {(a, b): 7, (b, a): 2}:
        return f"For {{b'ab': 5, b'aba': 2}} the counts are {{(97, 98): 7, (98, 97): 2}}; you returned {got}."
    runs = dict(attempt({b"aaa": 1}))
    if runs == {(a, a): 1}:
        return "b'aaa' has the pair (97, 97) twice, at places 0 and 1: neighbours are counted even where they overlap."
    return None if runs == {(a, a): 2} and dict(attempt({b"a": 3})) == {} else "A word of one byte has no pair."


@exercise(lesson=LESSON, level=1, minutes=10)
def check_replace_run(attempt: Callable) -> str | None:
    ids = [1, 1, 1]
    got = attempt(ids, (1, 1), 9)
    if ids != [1, 1, 1]:
        return "You changed the list that was handed in; return a new one."
    if list(got) == [1, 9]:
        return "You merged from right to left. The leftmost pair goes first: 1 1 1 becomes 9 1."
    if list(got) in ([9, 9], [9, 9, 1]):
        return "You used one id in two pairs: after a replacement go on behind both of its ids."
    if list(attempt([1, 2, 3], (1, 2), 9)) == [9, 2, 3]:
        return "You put the new id in the place of the first only; the second has to go as well."
    if list(attempt([5, 1, 2], (1, 2), 9)) == [5, 1, 2] or list(attempt([3, 4], (1, 2), 9)) == [3]:
        return "You stopped before the end: look at the last pair, and keep a last id that has no partner."
    for ids, want in (([1, 1, 1], [9, 1]), ([1, 1, 1, 1], [9, 9]), ([1, 2, 1], [1, 2, 1]), ([2], [2]), ([], [])):
        got = list(attempt(list(ids), (1, 1), 9))
        if got != want:
            return f"{ids} with the pair (1, 1) becomes {want}; you returned {got}."
    return None


@exercise(lesson=LESSON, level=2, minutes=15)
def check_encode_word(attempt: Callable) -> str | None:
    ranks = {bytes([b]): b for b in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"cd": 259, b"aa": 260}
    spelled = {i: token for token, i in ranks.items()}
    if list(attempt(b"abc", {t: i for t, i in ranks.items() if i <= 257})) == [257, 99]:
        return "You merged from left to right. The pair of lowest rank goes first: in b'abc' that is b'bc', not b'ab'."
    got = list(attempt(b"abcd", ranks))
    if b"".join(spelled.get(i, b"") for i in got) != b"abcd":
        return f"The tokens must spell the word again; for b'abcd' you returned {got}."
    if got == [257, 259]:
        return "You merged the highest rank first, or the longest token. The lowest rank goes first: b'bc'."
    if got in ([97, 256, 100], [97, 98, 259]):
        return "You stopped after one merge. Go on until no neighbours make a token: b'a' and b'bc' make b'abc'."
    if got != [258, 100]:
        return f"b'abcd' is [258, 100] (b'bc' first, then b'abc'); you returned {got}."
    runs = list(attempt(b"aaa", ranks))
    if runs == [97, 260]:
        return "Among equal ranks the leftmost goes first: b'aaa' is b'aa', b'a'."
    far = {bytes([b]): b for b in range(256)} | {b"xy": 256, b"yz": 257, b"xyz": 258, b"zx": 259}
    if list(attempt(b"xyzxy", far)) != [258, 256]:
        got = attempt(b"xyzxy", far)
        return f"b'xyzxy' with b'xy' 256, b'yz' 257, b'xyz' 258, b'zx' 259 is [258, 256]; you returned {got}."
    return None if runs == [260, 97] else f"b'aaa' is [260, 97]; you returned {runs}."


@exercise(lesson=LESSON, level=2, minutes=15)
def check_safe_text(attempt: Callable) -> str | None:
    for text in ("a", "né", "x猫", "🐈", ""):
        data = text.encode()
        for end in range(len(data) + 1):
            head = data[:end]
            got = attempt(head)
            whole = head.decode(errors="ignore")
            want = (whole, head[len(whole.encode()) :])
            if not isinstance(got, tuple | list) or len(got) != 2:
                return "Return two things: the text, and the bytes that wait."
            if "\ufffd" in got[0]:
                return "You printed half a character as U+FFFD; hold its bytes back until the rest comes."
            if got[0] == want[0] and not got[1] and want[1]:
                return "You dropped the bytes of the unfinished character; return them, they are needed later."
            if whole and len(got[0]) < len(whole):
                return f"You held back a character that is whole: {head!r} has the text {whole!r}."
            if (got[0], bytes(got[1])) != want:
                return f"{head!r} is {want}; you returned {got}."
    return None
