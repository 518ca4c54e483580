"""The errors a user of qoqc can meet. Every message names the thing, the reason and the remedy."""

from __future__ import annotations


class QoqcError(Exception):
    """Base of every error qoqc raises on purpose."""


class OptionError(QoqcError):
    """An option is unknown or has a value outside its set."""


class Unsupported(QoqcError):
    """Something qoqc does not handle: a model kind, a dtype, a graph that needs gradients."""


class StaleWeights(QoqcError):
    """A weight changed after it was packed and its 16-bit original is no longer there to repack."""


class CacheFull(QoqcError):
    """More tokens were appended to a KV cache than it was allocated for."""


class ArtifactError(QoqcError):
    """An artifact directory is missing, damaged, or made by another format version."""


class VerifyError(QoqcError):
    """A rewritten graph breaks one of the rules in ir/verify.py: a bug in a pass."""


class NotCached(QoqcError):
    """Something had to be compiled although the option require_cached says that nothing may be."""


def own_error(error: BaseException) -> QoqcError | None:
    """The error of qoqc's that `error` is, or was raised for: Dynamo wraps what backends raise."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, QoqcError):
        link = getattr(link, "inner_exception", None) or link.__cause__
    return link
