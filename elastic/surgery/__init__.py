"""Change a network: every structural change is a re-indexing of widths."""

from elastic.surgery.depth import count_blocks, deepen
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import grow_index, reindex, resize_index, split_index

__all__ = ["count_blocks", "deepen", "grow_index", "rebuild", "reindex", "resize_index", "split_index"]
