"""experiments/nano_hybrid.py: texts with a key to be found again."""

import numpy as np
import pytest

from experiments.nano_hybrid import FIRST_FILLER, KEY_MARK, PASSKEY_VOCAB, QUERY_MARK, passkey_batch

# ---- passkeys ----


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.5, 7), (1, 14), (None, None)])
def test_a_passkey_text_asks_for_the_key_after_its_mark(depth, place):
    ids, targets = passkey_batch(np.random.default_rng(0), 50, 21, depth, digits=3)
    assert ids.shape == targets.shape == (50, 21) and ids.dtype == targets.dtype == np.int64
    assert (targets[:, :-3] == -100).all() and (targets[:, -3:] < 10).all()
    assert (ids[:, -2:] == targets[:, -3:-1]).all() and (ids[:, -3] == QUERY_MARK).all()
    rows, places = np.nonzero(ids == KEY_MARK)
    assert (rows == np.arange(50)).all()
    assert set(places) == {place} if place is not None else set(places) == set(range(15))
    for row, at in enumerate(places):
        assert (ids[row, at + 1 : at + 4] == targets[row, -3:]).all()
        filler = np.delete(ids[row, :-3], range(at, at + 4))
        assert (filler >= FIRST_FILLER).all() and (filler < PASSKEY_VOCAB).all()


def test_the_shortest_passkey_text_is_all_key_and_question():
    ids, _ = passkey_batch(np.random.default_rng(0), 4, 7, digits=3)
    assert (ids[:, [0, 4]] == [KEY_MARK, QUERY_MARK]).all() and (ids < FIRST_FILLER).all()


@pytest.mark.parametrize(
    ("length", "depth", "message"),
    [(10, None, "length=10 is too short"), (30, 1.5, "depth=1.5 must be"), (30, -0.1, "depth=-0.1 must be")],
)
def test_a_passkey_text_that_cannot_be_is_refused(length, depth, message):
    with pytest.raises(ValueError, match=message):
        passkey_batch(np.random.default_rng(0), 1, length, depth)
