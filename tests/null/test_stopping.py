"""Stop strings on text that arrives in pieces, against a search in the whole text."""

from __future__ import annotations

import random

from xlpk.model import load_model
from xlpk.stopping import StopMatcher


def test_the_first_stop_string_ends_the_text_wherever_tokens_fall() -> None:
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    text = "def größe(wert):\n    return '→' + str(wert)\n\nclass Läufer:\n    pass\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) < len(text.encode())
    rng = random.Random(0)
    for _ in range(300):
        begin = rng.randrange(len(text) - 1)
        stops = [text[begin : begin + rng.randrange(1, 9)], text[rng.randrange(len(text)) :][:3], "nowhere"]
        matcher = StopMatcher(tokenizer, stops)
        expected = min(at for at in (text.find(stop) for stop in stops) if at >= 0)
        known = ""
        for index, token in enumerate(ids):
            found = matcher.push(token)
            known = tokenizer.decode(ids[: index + 1])
            if found is not None:
                assert found == text[: len(found)]
                assert len(found) >= expected
                assert any(known[len(found) :].startswith(stop) for stop in stops)
                assert not any(stop in text[: len(found)] for stop in stops if len(stop) == 1)
                break
        else:
            raise AssertionError(f"{stops} were not found in {known!r}")


def test_nothing_is_found_where_nothing_is() -> None:
    tokenizer = load_model("tiny").tokenizer
    assert tokenizer is not None
    matcher = StopMatcher(tokenizer, ["yield"])
    assert [matcher.push(token) for token in tokenizer.encode("return a\nyiel").ids][-1] is None
