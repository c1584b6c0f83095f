"""Switch kernels on and off for each input, and leave out what is off in execution."""

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import select_set
from elastic.dynamic.skipping import make_skipping

__all__ = ["attach_modules", "make_skipping", "select_set"]
