"""asr.decoding.texts: where texts differ, and how far they agree."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.decoding.texts import agreement, differences, edited

texts_of = st.lists(st.integers(0, 3), max_size=8).map(tuple)


@given(one=texts_of, other=texts_of)
def test_a_text_with_all_differences_of_another_is_that(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    assert edited(one, differences(one, other)) == other


def test_a_word_is_as_sure_as_the_texts_that_have_it() -> None:
    scores = {(1, 2, 3): 0.0, (1, 3): -1e9, (1, 4, 3): 0.0, (5, 2, 3): -1e9}
    assert agreement((1, 2, 3), scores) == pytest.approx([1.0, 0.5, 1.0])
    assert agreement((1, 4, 3), {(1, 4, 3): 0.0}) == pytest.approx([1.0, 1.0, 1.0])
    assert agreement((), {(): 0.0}) == []
