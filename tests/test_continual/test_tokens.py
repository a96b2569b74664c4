import numpy as np

from continual.tokens import TokenStream


def stream(lengths, length):
    ends = np.cumsum(lengths)
    return TokenStream(tokens=np.arange(ends[-1], dtype=np.uint16), ends=ends.astype(np.int64), length=length)


def test_windows_are_consecutive_and_the_rest_is_left():
    tokens = stream([7, 3, 1], 4)
    assert len(tokens) == 2
    assert tokens.windows(np.array([1, 0])).tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert tokens.windows(np.array([0])).dtype == np.int64


def test_places_restart_where_documents_begin():
    tokens = stream([7, 3, 1, 1, 4], 8)
    assert tokens.places(np.array([0, 1])).tolist() == [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 0, 0, 0, 1, 2, 3]]


def test_places_agree_with_a_slow_reading():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, size=60)
    tokens = stream(lengths, 16)
    inside = np.concatenate([np.arange(length) for length in lengths])
    for window in range(len(tokens)):
        start = window * 16
        expected = [min(int(inside[at]), at - start) for at in range(start, start + 16)]
        assert tokens.places(np.array([window]))[0].tolist() == expected
