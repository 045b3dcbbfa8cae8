"""The table of categories against the primitives that JAX has."""

import jax.extend.core.primitives
import jax.lax
import pytest

from mpjax._autocast.calls import CALLERS
from mpjax._autocast.categories import (
    _TABLE,
    CATEGORIES,
    MOVES,
    NEVER_LOW,
    Category,
    category,
)
from mpjax._autocast.derivatives import DERIVATIVES

PRIMITIVES = {
    getattr(module, name).name
    for module in (jax.lax, jax.extend.core.primitives)
    for name in dir(module)
    if name.endswith("_p")
}


def test_every_primitive_of_jax_has_a_category():
    assert PRIMITIVES - CATEGORIES.keys() == set()
    assert len(PRIMITIVES) > 170


def test_no_primitive_has_two():
    names = [name for names in _TABLE.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert set(_TABLE) == set(Category)


def test_a_missing_primitive_is_noticed(monkeypatch):
    monkeypatch.delitem(CATEGORIES, "tanh")
    with pytest.raises(AssertionError):
        test_every_primitive_of_jax_has_a_category()


def test_what_is_entered_has_one_who_enters():
    entered = {name for name, c in CATEGORIES.items() if c is Category.ENTERED}
    assert entered == CALLERS.keys() | DERIVATIVES.keys()


def test_subsets_are_of_their_categories():
    assert all(CATEGORIES[name] is Category.FLOAT32 for name in NEVER_LOW)
    assert all(CATEGORIES[name] is Category.FOLLOW for name in MOVES)


def test_what_is_unknown_is_unchanged():
    assert category("a primitive of tomorrow") is Category.UNCHANGED
