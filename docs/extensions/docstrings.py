"""Docstrings of mpjax as Markdown."""

import re

import griffe

# griffe knows "Examples:" as code, and "Example:" as a box of text.
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# A line that ends in "::" announces a literal block; Markdown knows it by its indent.
_LITERAL = re.compile(r"^::$|(?<=:):$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        """Rewrites the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _LITERAL.sub("", text)
