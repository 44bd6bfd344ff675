"""The one error of the image scripts: a sentence for whoever builds."""

from __future__ import annotations


class BuildError(Exception):
    """The build cannot go on; the message says what is wrong and what to do."""
