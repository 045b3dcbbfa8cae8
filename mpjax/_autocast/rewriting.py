"""A jaxpr with every operation in the precision that is wished for it."""

from collections.abc import Callable, Sequence
from typing import Any

from mpjax._autocast.body import Body
from mpjax._autocast.categories import Category
from mpjax._autocast.operations import is_product, rewrite_operation
from mpjax._autocast.products import rewrite_under_recipe
from mpjax._autocast.scopes import Scope
from mpjax._autocast.settings import Matches
from mpjax._autocast.values import Kind, Program


class Rewriter:
    """Rewrites the jaxprs of one program.

    A jaxpr that the program runs several times, such as that of a jitted function, is
    rewritten once for inputs of the same dtypes, so that JAX lowers it once too.

    Args:
      matches: what operations are to do.
      callers: by primitive, what writes an equation that runs a program.
    """

    def __init__(self, matches: Matches, callers: dict[str, Callable[..., None]]):
        self.matches = matches
        self._callers = callers
        # With each program the jaxpr that it is made of, whose id is in the key.
        self._written: dict[Any, tuple[Any, Program]] = {}

    def rewrite(
        self,
        jaxpr: Any,
        kinds: Sequence[Kind],
        scope: Scope,
        open_inputs: int = 0,
        results: Sequence[Kind] | None = None,
    ) -> Program:
        """Rewrites a jaxpr.

        Args:
          jaxpr: open or closed.
          kinds: what is known of its inputs.
          scope: around all of it.
          open_inputs: how many of the first inputs may become several.
          results: the dtypes of its results; None: as they are made.

        Returns:
          The program.
        """
        marks = scope.key if self.matches.settings.are_by_path else scope.is_marked
        wanted = None if results is None else tuple(results)
        key = id(jaxpr), tuple(kinds), marks, open_inputs, wanted
        if key not in self._written:
            body = self.begin(jaxpr, kinds, scope, open_inputs)
            program = body.close(wanted or body.kinds_of_results())
            self._written[key] = jaxpr, program
        return self._written[key][1]

    def begin(
        self, jaxpr: Any, kinds: Sequence[Kind], scope: Scope, open_inputs: int = 0
    ) -> Body:
        """Rewrites all equations of a jaxpr, whose results are still to be cast."""
        body = Body(jaxpr, kinds, open_inputs)
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        scope = Scope(scope.names, scope.is_marked)
        for eqn in inner.eqns:
            self._rewrite_equation(body, eqn, scope.of(eqn))
        return body

    def _rewrite_equation(self, body: Body, eqn: Any, scope: Scope) -> None:
        name = eqn.primitive.name
        wish = self.matches.wish(name, scope)
        if wish.category is Category.ENTERED:
            self._callers[name](self, body, eqn, scope)
        elif wish.rule is not None and is_product(eqn):
            rewrite_under_recipe(body, eqn, wish, self.matches)
        else:
            rewrite_operation(body, eqn, wish)
