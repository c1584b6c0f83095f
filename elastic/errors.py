"""The error that says which part of a model, or of a request, cannot be followed."""


class StructureError(ValueError):
    """A model, or a change asked of it, that cannot be followed; says which part and what to do."""
